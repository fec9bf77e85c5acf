"""Money: what an account was given, and every change of its balance, which is the sum of its ledger.

Knows rows and amounts; must not know HTTP or what a token is worth. Every function runs inside a transaction.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from datetime import UTC, datetime

from sqlalchemy import Connection, insert, select, update

from toptwo.accounts.tables import accounts, ledger, spending


class InsufficientQuotaError(Exception):
    """There is not enough left for what a request may cost. The message is one sentence for its caller."""


@dataclass(frozen=True)
class LedgerEntry:
    """One row. note: of who added or took credit."""

    id: int
    kind: str
    amount: int
    at: int
    key_id: str | None
    request_id: str | None
    note: str | None


def day_of(at: int) -> str:
    """The day of a time, in UTC."""
    return datetime.fromtimestamp(at, UTC).date().isoformat()


def grant(
    connection: Connection, account_id: str, amount: int, at: int, note: str, kind: str = "grant"
) -> int:
    """Add to a balance, or take from it; the new one. Raises InsufficientQuotaError below zero."""
    statement = (
        update(accounts)
        .where(accounts.c.id == account_id, accounts.c.balance + amount >= 0)
        .values(balance=accounts.c.balance + amount)
        .returning(accounts.c.balance)
    )
    balance = connection.execute(statement).scalar()
    if balance is None:
        raise InsufficientQuotaError("A balance cannot be less than nothing.")
    connection.execute(
        insert(ledger).values(account_id=account_id, kind=kind, amount=amount, at=at, note=note)
    )
    return int(balance)


def entries(
    connection: Connection, account_id: str, *, before: int | None = None, limit: int = 100
) -> list[LedgerEntry]:
    """An account's rows, the newest first. before: a row's id."""
    names = [field.name for field in fields(LedgerEntry)]
    query = select(*(ledger.c[name] for name in names)).where(ledger.c.account_id == account_id)
    if before is not None:
        query = query.where(ledger.c.id < before)
    rows = connection.execute(query.order_by(ledger.c.id.desc()).limit(limit))
    return [LedgerEntry(*row) for row in rows]


def spent(connection: Connection, owner: str, day: str) -> tuple[int, int]:
    """What an account or a key has spent or reserved on a day, and in its month."""
    month = spending.c.day.between(f"{day[:7]}-01", f"{day[:7]}-31")
    query = select(spending.c.day, spending.c.amount).where(spending.c.owner == owner, month)
    amounts = {row.day: row.amount for row in connection.execute(query)}
    return amounts.get(day, 0), sum(amounts.values())
