"""Accounts and prices: rows and what may be done with them.

Knows rows; must not know HTTP, commands or money's rules. Every function runs inside a transaction, and what
changes something leaves an entry in the audit log.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sqlalchemy import Connection, Row, delete, insert, select, update

from toptwo.accounts import audit, ledger
from toptwo.accounts.audit import Actor
from toptwo.accounts.caller import LIMIT_NAMES, NO_LIMITS, Limits
from toptwo.accounts.keys import new_id
from toptwo.accounts.money import FREE, Price
from toptwo.accounts.tables import accounts, prices

Status = Literal["active", "suspended"]

_ID_LENGTH = 12


class NotFoundError(Exception):
    """There is no such account or key. The message is one sentence."""


@dataclass(frozen=True)
class Account:
    """balance: in micro-credits. identity: of whoever signed in through OpenID Connect, or None."""

    id: str
    name: str
    email: str | None
    status: Status
    balance: int
    created_at: int
    limits: Limits
    identity: str | None = None


@dataclass(frozen=True)
class NewAccount:
    """What an account is made from. grant: micro-credits that it begins with."""

    name: str
    email: str | None = None
    grant: int = 0
    limits: Limits = NO_LIMITS
    identity: str | None = None


def create_account(connection: Connection, actor: Actor, new: NewAccount, at: int) -> Account:
    """A new account with its grant."""
    account_id = f"acct_{new_id(_ID_LENGTH)}"
    values = {"name": new.name, "email": new.email, "identity": new.identity, **asdict(new.limits)}
    connection.execute(
        insert(accounts).values(id=account_id, status="active", balance=0, created_at=at, **values)
    )
    if new.grant:
        ledger.grant(connection, account_id, new.grant, at, "on creation")
    audit.record(
        connection, actor, "account.create", account_id, at, name=new.name, grant_microcredits=new.grant
    )
    return get_account(connection, account_id)


def get_account(connection: Connection, account_id: str) -> Account:
    """Raises NotFoundError."""
    row = connection.execute(select(accounts).where(accounts.c.id == account_id)).one_or_none()
    if row is None:
        raise NotFoundError(f"There is no account '{account_id[:64]}'.")
    return _account(row)


def account_of(connection: Connection, identity: str) -> Account | None:
    """That of whoever signed in through OpenID Connect."""
    row = connection.execute(select(accounts).where(accounts.c.identity == identity)).one_or_none()
    return None if row is None else _account(row)


def list_accounts(connection: Connection, *, after: str = "", limit: int = 100) -> list[Account]:
    """In the order of their ids. after: the last id of the page before."""
    query = select(accounts).where(accounts.c.id > after).order_by(accounts.c.id).limit(limit)
    return [_account(row) for row in connection.execute(query)]


def change_account(
    connection: Connection, actor: Actor, account_id: str, changes: Mapping[str, Any], at: int
) -> Account:
    """Change columns: name, email, status and limits. Raises NotFoundError."""
    get_account(connection, account_id)
    if changes:
        connection.execute(update(accounts).where(accounts.c.id == account_id).values(**changes))
        audit.record(connection, actor, "account.change", account_id, at, **changes)
    return get_account(connection, account_id)


def credit_account(
    connection: Connection, actor: Actor, account_id: str, amount: int, note: str, at: int
) -> Account:
    """Add micro-credits, or take some. Raises NotFoundError and InsufficientQuotaError."""
    get_account(connection, account_id)
    ledger.grant(connection, account_id, amount, at, note, kind="credit")
    audit.record(connection, actor, "account.credit", account_id, at, amount_microcredits=amount, note=note)
    return get_account(connection, account_id)


def price_of(connection: Connection, model: str) -> Price:
    """Nothing, unless one has been set."""
    row = connection.execute(select(prices).where(prices.c.model == model)).one_or_none()
    return FREE if row is None else Price(row.prompt, row.cached, row.completion)


def list_prices(connection: Connection) -> dict[str, Price]:
    """By model."""
    rows = connection.execute(select(prices).order_by(prices.c.model))
    return {row.model: Price(row.prompt, row.cached, row.completion) for row in rows}


def set_price(connection: Connection, actor: Actor, model: str, price: Price, at: int) -> None:
    """What a model costs from now on; running requests keep the price that they began with."""
    connection.execute(delete(prices).where(prices.c.model == model))
    connection.execute(insert(prices).values(model=model, **asdict(price)))
    audit.record(connection, actor, "price.set", model, at, **asdict(price))


def limits_of(row: Row[Any]) -> Limits:
    """A row's limit columns."""
    return Limits(**{name: getattr(row, name) for name in LIMIT_NAMES})


def _account(row: Row[Any]) -> Account:
    return Account(
        row.id, row.name, row.email, row.status, row.balance, row.created_at, limits_of(row), row.identity
    )
