"""Sessions: whose they are, how long, and that no token is ever kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from sqlalchemy import Connection, Engine, select

from accounts.conftest import ME, NOW
from toptwo.accounts import audit, sessions, store
from toptwo.accounts.database import Database
from toptwo.accounts.sessions import SESSION_SECONDS, Person
from toptwo.accounts.tables import accounts
from toptwo.accounts.tables import sessions as rows

Result = TypeVar("Result")
JANE = Person("https://id.example 17", "Jane", "jane@example.org")


def write(database: Database, work: Callable[[Connection], Result]) -> Result:
    return database.write(work).result()


def sign_in(database: Database, person: Person = JANE, at: int = NOW) -> str:
    return write(database, lambda c: sessions.sign_in(c, person, "1.2.3.4", 500_000, at))


def whose(database: Database, token: str, at: int = NOW) -> store.Account | None:
    return database.read(lambda c: sessions.signed_in(c, token, at)).result()


def test_who_comes_first_gets_an_account_and_finds_it_again(database: Database) -> None:
    first, second = sign_in(database), sign_in(database, Person(JANE.identity, "Jane Doe", None))
    account = whose(database, first)
    assert account is not None
    assert account == whose(database, second)
    assert (account.name, account.email, account.balance) == ("Jane", "jane@example.org", 500_000)
    assert account.identity == JANE.identity
    other = whose(database, sign_in(database, Person("https://id.example 18", "Jane", "jane@example.org")))
    assert other is not None
    assert other.id != account.id  # the same address, said of another person, opens nothing
    entries = database.read(lambda c: audit.entries(c, before=None, limit=10)).result()
    assert [entry.action for entry in entries].count("account.create") == 2
    assert [entry.action for entry in entries].count("session.begin") == 3


def test_a_session_ends(database: Database) -> None:
    token = sign_in(database)
    assert whose(database, token, NOW + SESSION_SECONDS - 1) is not None
    assert whose(database, token, NOW + SESSION_SECONDS) is None
    write(database, lambda c: sessions.sign_out(c, token))
    assert whose(database, token) is None
    write(database, lambda c: sessions.sign_out(c, token))


def test_the_session_of_a_suspended_account_opens_nothing(database: Database) -> None:
    token = sign_in(database)
    account = whose(database, token)
    assert account is not None
    write(database, lambda c: store.change_account(c, ME, account.id, {"status": "suspended"}, NOW))
    assert whose(database, token) is None


def test_ended_sessions_are_not_kept_and_tokens_never_are(database: Database, engine: Engine) -> None:
    old = sign_in(database)
    new = sign_in(database, at=NOW + SESSION_SECONDS)
    with engine.connect() as connection:
        kept = connection.execute(select(rows)).all()
        everything = str(kept) + str(connection.execute(select(accounts)).all())
    assert len(kept) == 1
    assert whose(database, new, NOW + SESSION_SECONDS) is not None
    assert old not in everything
    assert new not in everything


def test_what_is_no_token_is_nobodys(database: Database) -> None:
    for token in ("", "x", "é" * 10, "x" * 5000, "' OR 1=1 --", "\udc80"):
        assert whose(database, token) is None
