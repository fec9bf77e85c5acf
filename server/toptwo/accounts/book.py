"""The accounts as the server sees them: who holds a key, what a request may take, what it is charged.

One for each server process. Knows the database and a clock; must not know HTTP. What is looked up for a key
is kept for CACHE_SECONDS, so a key that is revoked from outside this process is accepted for as long at most;
what this process changes holds at once.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import structlog
from sqlalchemy import Connection

from toptwo.accounts import charging, key_store, leases, store
from toptwo.accounts.caller import Caller, Manager
from toptwo.accounts.charging import Charge, Outcome, Settlement
from toptwo.accounts.database import Database, DatabaseUnavailableError, ForMany
from toptwo.accounts.key_store import Holder
from toptwo.accounts.keys import Key, new_id
from toptwo.accounts.limits import RateLimits
from toptwo.accounts.money import FREE, Price, Tokens, cost_of, most_cost_of

log = structlog.get_logger()

Result = TypeVar("Result")

CACHE_SECONDS = 5.0
MOST_CACHED = 4096
HEARTBEAT_SECONDS = 10.0
DEAD_SECONDS = 60  # without a heartbeat, after which a process' reservations are given back
WAIT_SECONDS = 5.0  # for a write, behind others


@dataclass(frozen=True)
class Reservation:
    """What a running request has reserved, and the price that it began with."""

    request_id: str
    price: Price


@dataclass
class _Known:
    """What the database said of a key; None for no such key."""

    holder: Holder | None
    until: float


class AccountBook:
    """Keys, limits and charges. All of it is called on one event loop.

    fail_open: whether keys that are known are served, uncharged, while the database cannot be used.
    """

    def __init__(
        self,
        database: Database,
        *,
        fail_open: bool = False,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.rates = RateLimits(clock)
        self._database = database
        self._fail_open = fail_open
        self._clock = clock
        self._now = now
        self._lease = new_id(16)
        self._known: OrderedDict[bytes, _Known] = OrderedDict()
        self._looking: dict[bytes, asyncio.Future[Holder | None]] = {}
        self._prices: dict[str, tuple[Price, float]] = {}
        self._used: dict[str, int] = {}
        self._num_changes = 0

    @property
    def now(self) -> int:
        """Seconds since 1970."""
        return int(self._now())

    def is_known(self, key: Key) -> bool:
        """Whether it is a key that was accepted lately, so that nothing needs to be looked up."""
        known = self._known.get(key.digest)
        return known is not None and known.holder is not None

    async def verify(self, key: Key) -> Caller | Manager | None:
        """Who holds a key; None for unknown, revoked and expired ones, and those of suspended accounts.

        Raises DatabaseUnavailableError.
        """
        holder = await self._holder(key)
        if holder is None or not holder.may_act(self.now):
            return None
        info = holder.key
        self._used[info.id] = self.now
        if info.kind == "management":
            return Manager(f"key {info.id}")
        return Caller(
            key_id=info.id,
            account_id=info.account_id,
            scopes=frozenset(info.scopes),
            models=None if info.models is None else frozenset(info.models),
            key_limits=info.limits,
            account_limits=holder.account_limits,
        )

    async def reserve(self, caller: Caller, request_id: str, model: str, most: Tokens) -> Reservation | None:
        """Put a request on record and keep what it may cost; None where it runs uncharged all the same.

        Raises InsufficientQuotaError and DatabaseUnavailableError.
        """
        if caller.account_id is None:
            raise ValueError("a key that belongs to nobody cannot be charged")
        try:
            price = await self._price(model)
            charge = Charge(
                request_id=request_id,
                account_id=caller.account_id,
                key_id=caller.key_id,
                model=model,
                amount=most_cost_of(most, price),
                at=self.now,
                lease=self._lease,
                key_limits=caller.key_limits,
                account_limits=caller.account_limits,
            )
            await self._reserve(charge)
        except DatabaseUnavailableError:
            if not self._fail_open:
                raise
            log.warning("a request runs uncharged: the accounts' database cannot be used", key=caller.key_id)
            return None
        return Reservation(request_id, price)

    def settle(self, reservation: Reservation, delivered: Tokens, outcome: Outcome) -> Future[int | None]:
        """Charge what was delivered, and give the rest back. It is tried until the database takes it."""
        cost = cost_of(delivered, reservation.price)
        settlement = Settlement(reservation.request_id, cost, delivered, outcome, self.now)
        return self._database.write(ForMany(charging.settle, settlement), persistent=True)

    async def read(self, work: Callable[[Connection], Result]) -> Result:
        """Raises DatabaseUnavailableError, or what `work` raises."""
        return await asyncio.wrap_future(self._database.read(work))

    async def write(self, work: Callable[[Connection], Result]) -> Result:
        """The result of a change, once it is on the disk; from then on nothing older is believed.

        Raises DatabaseUnavailableError, or what `work` raises.
        """
        try:
            return await asyncio.wrap_future(self._database.write(work))
        finally:
            self._num_changes += 1
            self._known.clear()
            self._prices.clear()

    async def keep_alive(self) -> None:
        """Say now and then that this process is there, and close what others left open. Runs for ever."""
        while True:
            beat = partial(self._beat, used=self._take_used())
            try:
                await asyncio.wrap_future(self._database.write(beat))
            except DatabaseUnavailableError:
                pass  # it has been logged, and the next one may be heard
            except Exception:
                log.exception("a heartbeat failed")
            await asyncio.sleep(HEARTBEAT_SECONDS)

    def close(self) -> None:
        """Write what waits. No request runs any more."""
        self._database.write(partial(key_store.note_use, times=self._take_used()))
        self._database.write(partial(leases.end, lease=self._lease))
        self._database.close()

    async def _holder(self, key: Key) -> Holder | None:
        known = self._known.get(key.digest)
        if known is not None and self._clock() < known.until:
            self._known.move_to_end(key.digest)
            return known.holder
        looking = self._looking.get(key.digest)
        if looking is None:  # whoever comes meanwhile waits for the same answer
            looking = asyncio.ensure_future(self._look_up(key))
            self._looking[key.digest] = looking
            looking.add_done_callback(lambda _: self._looking.pop(key.digest, None))
        try:
            return await asyncio.shield(looking)
        except DatabaseUnavailableError:
            if self._fail_open and known is not None and known.holder is not None:
                return known.holder
            raise

    async def _look_up(self, key: Key) -> Holder | None:
        changes = self._num_changes
        holder = await self.read(partial(key_store.find, key=key))
        if changes != self._num_changes:
            return holder  # it may be older than what was changed meanwhile
        self._known[key.digest] = _Known(holder, self._clock() + CACHE_SECONDS)
        self._known.move_to_end(key.digest)
        if len(self._known) > MOST_CACHED:
            self._known.popitem(last=False)
        return holder

    async def _price(self, model: str) -> Price:
        price, until = self._prices.get(model, (FREE, 0.0))
        if self._clock() >= until:
            price = await self.read(partial(store.price_of, model=model))
            self._prices[model] = price, self._clock() + CACHE_SECONDS
        return price

    async def _reserve(self, charge: Charge) -> None:
        writing = asyncio.wrap_future(self._database.write(ForMany(charging.reserve, charge)))
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                await writing
        except (TimeoutError, asyncio.CancelledError) as error:
            # It may be written yet, or have been without anybody to hear of it.
            self.settle(Reservation(charge.request_id, FREE), Tokens(), "cancelled")
            if isinstance(error, TimeoutError):
                raise DatabaseUnavailableError("it takes too long") from None
            raise

    def _take_used(self) -> dict[str, int]:
        """When keys were used since this was asked last. Here, because the database's thread is another."""
        used, self._used = self._used, {}
        return used

    def _beat(self, connection: Connection, used: dict[str, int]) -> None:
        leases.renew(connection, self._lease, self.now)
        num_closed = leases.close_abandoned(connection, self.now - DEAD_SECONDS, self.now)
        if num_closed:
            log.warning("reservations of a server that died were given back", requests=num_closed)
        key_store.note_use(connection, used)
