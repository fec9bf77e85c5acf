"""Money: what an account was given, what its requests reserve before they run, and what is settled then.

A request reserves the most that it can cost, in the transaction that puts it on record, before it runs. When
it has ended, what it did cost is settled and the rest goes back; when nothing was delivered, all of it does.
Either happens once: the ledger takes one opening and one closing row of a request. A balance is the sum of
its ledger and is never negative.

Knows rows and amounts; must not know HTTP or what a token is worth. Every function runs inside a transaction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any, Literal

from sqlalchemy import Connection, delete, func, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite

from toptwo.accounts.caller import Limits
from toptwo.accounts.money import Tokens, format_credits
from toptwo.accounts.tables import accounts, leases, ledger, spending, usage

Outcome = Literal["completed", "cancelled", "failed", "lost"]


class InsufficientQuotaError(Exception):
    """There is not enough left for what a request may cost. The message is one sentence for its caller."""


@dataclass(frozen=True)
class Charge:
    """What a request reserves. amount: the most that it can cost. lease: of the process that answers it."""

    request_id: str
    account_id: str
    key_id: str
    model: str
    amount: int
    at: int
    lease: str
    key_limits: Limits
    account_limits: Limits

    @property
    def day(self) -> str:
        """In UTC, like 2026-11-27."""
        return day_of(self.at)


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


def reserve(connection: Connection, charge: Charge) -> None:
    """Put a request on record, and keep what it may cost. Raises InsufficientQuotaError."""
    if charge.amount:
        _take_from_balance(connection, charge)
        _check_budgets(connection, charge)
        for owner in (charge.key_id, charge.account_id):
            _spend(connection, owner, charge.day, charge.amount)
        connection.execute(
            insert(ledger).values(
                account_id=charge.account_id,
                kind="reserve",
                amount=-charge.amount,
                at=charge.at,
                key_id=charge.key_id,
                request_id=charge.request_id,
                closes=0,
            )
        )
    connection.execute(
        insert(usage).values(
            request_id=charge.request_id,
            account_id=charge.account_id,
            key_id=charge.key_id,
            model=charge.model,
            at=charge.at,
            day=charge.day,
            lease=charge.lease,
            reserved=charge.amount,
        )
    )


def settle(
    connection: Connection, request_id: str, cost: int, tokens: Tokens, outcome: Outcome, at: int
) -> int | None:
    """Close a request: what it cost, never more than was reserved. None where it was closed before."""
    closing = (
        update(usage)
        .where(usage.c.request_id == request_id, usage.c.outcome.is_(None))
        .values(
            outcome=outcome,
            prompt_tokens=tokens.prompt,
            cached_tokens=tokens.cached,
            completion_tokens=tokens.completion,
        )
        .returning(usage.c.account_id, usage.c.key_id, usage.c.reserved, usage.c.day)
    )
    row = connection.execute(closing).one_or_none()
    if row is None:
        return None
    cost = min(cost, row.reserved)
    if row.reserved:
        unused = row.reserved - cost
        connection.execute(update(usage).where(usage.c.request_id == request_id).values(cost=cost))
        connection.execute(
            update(accounts)
            .where(accounts.c.id == row.account_id)
            .values(balance=accounts.c.balance + unused)
        )
        for owner in (row.key_id, row.account_id):
            _spend(connection, owner, row.day, -unused)
        connection.execute(
            insert(ledger).values(
                account_id=row.account_id,
                kind="settle" if cost else "refund",
                amount=unused,
                at=at,
                key_id=row.key_id,
                request_id=request_id,
                closes=1,
            )
        )
    return cost


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


def renew_lease(connection: Connection, lease: str, at: int) -> None:
    """Say that a process is still there."""
    _upsert(connection, leases, {"id": lease, "seen_at": at}, ["id"], {"seen_at": at})


def end_lease(connection: Connection, lease: str) -> None:
    """Say that a process has closed all of its requests."""
    connection.execute(delete(leases).where(leases.c.id == lease))


def close_abandoned(connection: Connection, dead_since: int, at: int) -> int:
    """Give back what the requests of processes reserved that have not been seen since; how many there were.

    What they delivered before they died is known to nobody, so it is free.
    """
    alive = select(leases.c.id).where(leases.c.seen_at >= dead_since)
    query = select(usage.c.request_id).where(usage.c.outcome.is_(None), usage.c.lease.not_in(alive))
    abandoned: Sequence[str] = connection.execute(query).scalars().all()
    for request_id in abandoned:
        settle(connection, request_id, 0, Tokens(), "lost", at)
    connection.execute(delete(leases).where(leases.c.seen_at < dead_since))
    return len(abandoned)


def spent(connection: Connection, owner: str, day: str) -> tuple[int, int]:
    """What an account or a key has spent or reserved on a day, and in its month."""
    month = spending.c.day.between(f"{day[:7]}-01", f"{day[:7]}-31")
    query = select(spending.c.day, spending.c.amount).where(spending.c.owner == owner, month)
    amounts = {row.day: row.amount for row in connection.execute(query)}
    return amounts.get(day, 0), sum(amounts.values())


def _take_from_balance(connection: Connection, charge: Charge) -> None:
    """First of all: from here on nobody else reserves for the same account until this is committed."""
    taking = (
        update(accounts)
        .where(
            accounts.c.id == charge.account_id,
            accounts.c.status == "active",
            accounts.c.balance >= charge.amount,
        )
        .values(balance=accounts.c.balance - charge.amount)
    )
    if connection.execute(taking).rowcount:
        return
    balance = connection.execute(
        select(func.coalesce(func.max(accounts.c.balance), 0)).where(accounts.c.id == charge.account_id)
    ).scalar_one()
    raise InsufficientQuotaError(
        f"The request may cost up to {format_credits(charge.amount)} credits; "
        f"your account has {format_credits(balance)}. Ask for fewer tokens, or add credit."
    )


def _check_budgets(connection: Connection, charge: Charge) -> None:
    owners = {
        "key": (charge.key_id, charge.key_limits),
        "account": (charge.account_id, charge.account_limits),
    }
    for whose, (owner, limits) in owners.items():
        if limits.daily_budget is None and limits.monthly_budget is None:
            continue
        today, this_month = spent(connection, owner, charge.day)
        for period, budget, amount in (
            ("daily", limits.daily_budget, today),
            ("monthly", limits.monthly_budget, this_month),
        ):
            if budget is not None and amount + charge.amount > budget:
                raise InsufficientQuotaError(
                    f"The request may cost up to {format_credits(charge.amount)} credits; of your {whose}'s "
                    f"{period} budget of {format_credits(budget)} {format_credits(max(0, budget - amount))} "
                    "are left."
                )


def _spend(connection: Connection, owner: str, day: str, amount: int) -> None:
    values = {"owner": owner, "day": day, "amount": amount}
    if amount < 0:
        row = (spending.c.owner == owner) & (spending.c.day == day)
        connection.execute(update(spending).where(row).values(amount=spending.c.amount + amount))
    elif amount:
        _upsert(connection, spending, values, ["owner", "day"], {"amount": spending.c.amount + amount})


def _upsert(
    connection: Connection,
    table: Any,
    values: Mapping[str, Any],
    index: Sequence[str],
    change: Mapping[str, Any],
) -> None:
    """Insert, or change what is there. The two databases spell it alike, and SQLAlchemy does not."""
    dialect: Any = sqlite if connection.dialect.name == "sqlite" else postgresql
    statement = dialect.insert(table).values(**values)
    connection.execute(statement.on_conflict_do_update(index_elements=list(index), set_=dict(change)))
