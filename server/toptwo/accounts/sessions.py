"""Sessions of people who signed in through a provider of identities: rows, and whose account they open.

A session is 256 random bits in a cookie; what is kept is its SHA-256, as with keys. Knows rows; must not know
HTTP, cookies or providers. Every function runs inside a transaction.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass

from sqlalchemy import Connection, delete, insert, select
from sqlalchemy.exc import IntegrityError

from toptwo.accounts import audit
from toptwo.accounts.audit import Actor
from toptwo.accounts.ownership import owner
from toptwo.accounts.store import Account, NewAccount, account_of, create_account, get_account
from toptwo.accounts.tables import sessions

SESSION_SECONDS = 12 * 3600
_TOKEN_BYTES = 32
_LONGEST_TOKEN = 64


@dataclass(frozen=True)
class Person:
    """Who signed in. identity: "issuer subject", which no other person has; the rest may change."""

    identity: str
    name: str
    email: str | None = None


def sign_in(connection: Connection, person: Person, address: str, grant: int, at: int) -> str:
    """A new session's token. Whoever comes for the first time gets an account that begins with `grant`."""
    connection.execute(delete(sessions).where(sessions.c.expires_at <= at))
    account = account_of(connection, person.identity)
    if account is None:
        account = _new_account(connection, person, address, grant, at)
    audit.record(connection, owner(account, address), "session.begin", account.id, at)
    token = secrets.token_urlsafe(_TOKEN_BYTES)
    connection.execute(
        insert(sessions).values(
            hash=_digest(token), account_id=account.id, created_at=at, expires_at=at + SESSION_SECONDS
        )
    )
    return token


def signed_in(connection: Connection, token: str, at: int) -> Account | None:
    """Whose session it is; None where it has ended, never was, or the account is suspended."""
    if not (token.isascii() and len(token) <= _LONGEST_TOKEN):
        return None
    row = connection.execute(select(sessions).where(sessions.c.hash == _digest(token))).one_or_none()
    if row is None or row.expires_at <= at:
        return None
    account = get_account(connection, row.account_id)
    return account if account.status == "active" else None


def sign_out(connection: Connection, token: str) -> None:
    """The end of a session, if it is one."""
    connection.execute(delete(sessions).where(sessions.c.hash == _digest(token)))


def _new_account(connection: Connection, person: Person, address: str, grant: int, at: int) -> Account:
    new = NewAccount(person.name, person.email, grant, identity=person.identity)
    try:
        with connection.begin_nested():
            return create_account(connection, Actor("sign-in", address), new, at)
    except IntegrityError:  # they signed in through another server at the same moment
        account = account_of(connection, person.identity)
        if account is None:
            raise
        return account


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
