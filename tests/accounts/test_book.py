"""The book: who holds a key, how long that is believed, and what happens while the database is away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
from sqlalchemy import Connection, Engine

from accounts.conftest import ME, NOW
from toptwo.accounts import book as book_module
from toptwo.accounts import key_store, ledger, store
from toptwo.accounts.book import CACHE_SECONDS, AccountBook
from toptwo.accounts.caller import Caller, Manager
from toptwo.accounts.database import Database, DatabaseUnavailableError
from toptwo.accounts.key_store import KeyRequest
from toptwo.accounts.keys import make_key, parse_key
from toptwo.accounts.ledger import InsufficientQuotaError
from toptwo.accounts.money import Price, Tokens
from toptwo.accounts.store import Account, NewAccount
from toptwo.accounts.usage import UsageQuery, summarise
from toptwo.api.security import NOBODY, Credentials
from toptwo.errors import ApiError


class CountingDatabase(Database):
    """One that counts, and can be switched off."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.num_reads = 0
        self.is_away = False

    def read(self, work: Any) -> Any:
        self.num_reads += 1
        return super().read(partial(self._refuse, work) if self.is_away else work)

    def write(self, work: Any, *, persistent: bool = False) -> Any:
        return super().write(partial(self._refuse, work) if self.is_away else work, persistent=persistent)

    def _refuse(self, _work: Any, _connection: Connection) -> None:
        raise DatabaseUnavailableError("it was switched off")


@dataclass
class Desk:
    """A book over a database, and a clock that the test moves."""

    database: CountingDatabase
    fail_open: bool = False
    clock: float = 0.0
    book: AccountBook = field(init=False)

    def __post_init__(self) -> None:
        self.book = AccountBook(
            self.database, fail_open=self.fail_open, clock=lambda: self.clock, now=lambda: NOW + self.clock
        )

    async def account(self, **fields: Any) -> Account:
        new = NewAccount("team", **{"grant": 500_000, **fields})
        return await self.book.write(lambda c: store.create_account(c, ME, new, NOW))

    async def key(self, account_id: str | None, **fields: Any) -> str:
        wanted = KeyRequest("k", account_id, **fields)
        _, new = await self.book.write(lambda c: key_store.create_key(c, ME, wanted, NOW))
        return new.text

    async def verify(self, text: str) -> Caller | Manager | None:
        key = parse_key(text)
        assert key is not None
        return await self.book.verify(key)

    async def balance(self, account: Account) -> int:
        return (await self.book.read(lambda c: store.get_account(c, account.id))).balance


@pytest.fixture
async def desk(engine: Engine) -> AsyncIterator[Desk]:
    made = Desk(CountingDatabase(engine))
    yield made
    made.database.is_away = False
    made.book.close()


async def caller_of(desk: Desk, text: str) -> Caller:
    caller = await desk.verify(text)
    assert isinstance(caller, Caller)
    return caller


async def test_a_key_is_looked_up_once_in_a_while(desk: Desk) -> None:
    account = await desk.account()
    text = await desk.key(account.id, models=("m",))
    desk.database.num_reads = 0
    found = await asyncio.gather(*(desk.verify(text) for _ in range(50)))
    assert desk.database.num_reads == 1
    assert {one.account_id for one in found if isinstance(one, Caller)} == {account.id}
    assert found[0] == found[-1]
    desk.clock += CACHE_SECONDS
    await desk.verify(text)
    assert desk.database.num_reads == 2


async def test_malformed_keys_never_reach_the_database(desk: Desk) -> None:
    text = await desk.key((await desk.account()).id)
    desk.database.num_reads = 0
    for wrong in ("", "x", text[:-1], text + "x", text[:-1] + "!", "' OR 1=1 --", "sk-" + "a" * 40, "é" * 67):
        with pytest.raises(ApiError) as caught:
            await Credentials(NOBODY, book=desk.book).identify(wrong, "1.2.3.4")
        assert caught.value.status == 401
    assert desk.database.num_reads == 0


async def test_unknown_keys_are_remembered_and_forgotten(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.database.num_reads = 0
    made = make_key("inference")
    unknown = made.text
    for _ in range(10):
        assert await desk.verify(unknown) is None
    assert desk.database.num_reads == 1
    assert not desk.book.is_known(made.key)
    monkeypatch.setattr(book_module, "MOST_CACHED", 4)
    keys = [unknown, *(make_key("inference").text for _ in range(4))]
    for text in [*keys, *keys[1:]]:
        await desk.verify(text)
    assert desk.database.num_reads == 5
    await desk.verify(unknown)
    assert desk.database.num_reads == 6


async def test_what_this_process_changes_holds_at_once(desk: Desk) -> None:
    text = await desk.key((await desk.account()).id)
    caller = await caller_of(desk, text)
    await desk.book.write(lambda c: key_store.revoke_key(c, ME, caller.key_id, NOW))
    assert await desk.verify(text) is None


async def test_what_another_process_changes_holds_soon(desk: Desk, engine: Engine) -> None:
    text = await desk.key((await desk.account()).id)
    caller = await caller_of(desk, text)
    with engine.begin() as connection:
        key_store.revoke_key(connection, ME, caller.key_id, NOW)
    desk.clock += CACHE_SECONDS
    assert await desk.verify(text) is None


async def test_a_key_expires_while_it_is_remembered(desk: Desk) -> None:
    text = await desk.key((await desk.account()).id, expires_at=NOW + 2)
    assert await desk.verify(text)
    desk.clock += 2
    assert await desk.verify(text) is None


async def test_management_keys_are_told_apart(desk: Desk) -> None:
    assert isinstance(await desk.verify(await desk.key(None)), Manager)


async def test_a_request_is_charged_what_it_used(desk: Desk) -> None:
    account = await desk.account()
    caller = await caller_of(desk, await desk.key(account.id))
    await desk.book.write(lambda c: store.set_price(c, ME, "m", Price(1_000_000, 500_000, 2_000_000), NOW))
    reservation = await desk.book.reserve(caller, "r1", "m", Tokens(100, 0, 1000))
    assert reservation is not None
    assert await desk.balance(account) == 500_000 - 2100
    settled = desk.book.settle(reservation, Tokens(100, 40, 10), "completed")
    assert await asyncio.wrap_future(settled) == 60 + 20 + 20
    assert await desk.balance(account) == 500_000 - 100
    assert await asyncio.wrap_future(desk.book.settle(reservation, Tokens(100, 0, 10), "completed")) is None


async def test_more_than_there_is_cannot_be_reserved(desk: Desk) -> None:
    account = await desk.account(grant=2000)
    caller = await caller_of(desk, await desk.key(account.id))
    await desk.book.write(lambda c: store.set_price(c, ME, "m", Price(1_000_000, 0, 1_000_000), NOW))
    with pytest.raises(InsufficientQuotaError, match=r"0\.0021 credits; your account has 0\.002"):
        await desk.book.reserve(caller, "r1", "m", Tokens(100, 0, 2000))
    assert await desk.balance(account) == 2000


async def test_a_caller_who_leaves_while_it_is_reserved_gets_it_back(desk: Desk) -> None:
    account = await desk.account()
    caller = await caller_of(desk, await desk.key(account.id))
    await desk.book.write(lambda c: store.set_price(c, ME, "m", Price(1_000_000, 0, 0), NOW))
    for number in range(20):
        reserving = asyncio.ensure_future(desk.book.reserve(caller, f"r{number}", "m", Tokens(100)))
        await asyncio.sleep(0.0005 * number)
        if reserving.cancel():
            with pytest.raises(asyncio.CancelledError):
                await reserving
        else:
            reservation = await reserving
            assert reservation is not None
            desk.book.settle(reservation, Tokens(), "cancelled")
    await desk.book.write(lambda _: None)
    assert await desk.balance(account) == 500_000


async def test_without_the_database_nothing_runs(desk: Desk) -> None:
    text = await desk.key((await desk.account()).id)
    caller = await caller_of(desk, text)
    desk.database.is_away = True
    with pytest.raises(DatabaseUnavailableError):
        await desk.book.reserve(caller, "r1", "m", Tokens(1))
    desk.clock += CACHE_SECONDS
    with pytest.raises(DatabaseUnavailableError):
        await desk.verify(text)


async def test_without_the_database_known_keys_run_uncharged_if_so_wanted(engine: Engine) -> None:
    desk = Desk(CountingDatabase(engine), fail_open=True)
    text = await desk.key((await desk.account()).id)
    stranger = await desk.key((await desk.account()).id)
    caller = await caller_of(desk, text)
    desk.database.is_away = True
    desk.clock += CACHE_SECONDS
    assert await desk.verify(text) == caller
    assert await desk.book.reserve(caller, "r1", "m", Tokens(1)) is None
    with pytest.raises(DatabaseUnavailableError):
        await desk.verify(stranger)
    desk.database.is_away = False
    desk.book.close()


async def test_uses_and_life_are_noted(desk: Desk, engine: Engine) -> None:
    account = await desk.account()
    caller = await caller_of(desk, await desk.key(account.id))
    other = AccountBook(Database(engine), now=lambda: NOW - 1000)
    alive = asyncio.create_task(other.keep_alive())
    await other.write(lambda _: None)
    assert await other.reserve(caller, "r1", "m", Tokens(1)) is not None
    beating = asyncio.create_task(desk.book.keep_alive())
    await desk.book.write(lambda _: None)
    await desk.book.write(lambda _: None)
    beating.cancel()
    alive.cancel()
    await asyncio.gather(beating, alive, return_exceptions=True)
    key = await desk.book.read(lambda c: key_store.get_key(c, caller.key_id))
    assert key.last_used_at == NOW
    rows = await desk.book.read(lambda c: summarise(c, UsageQuery(by=())))
    assert rows[0].requests == 1  # closed, as nobody had been heard of for so long
    other.close()


async def test_closing_writes_what_waits(engine: Engine) -> None:
    desk = Desk(CountingDatabase(engine))
    account = await desk.account()
    caller = await caller_of(desk, await desk.key(account.id))
    for number in range(50):
        reservation = await desk.book.reserve(caller, f"r{number}", "m", Tokens(1))
        assert reservation is not None
        desk.book.settle(reservation, Tokens(1, 0, 1), "completed")
    desk.book.close()
    with engine.connect() as connection:
        assert summarise(connection, UsageQuery(by=()))[0].requests == 50
        assert ledger.spent(connection, account.id, ledger.day_of(NOW)) == (0, 0)
