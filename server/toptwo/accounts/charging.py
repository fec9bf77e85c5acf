"""What requests reserve before they run, and what is settled behind them, for many requests at once.

A request reserves the most that it can cost, in the transaction that puts it on record, before it runs. When
it has ended, what it did cost is settled and the rest goes back; when nothing was delivered, all of it does.
Either happens once: the ledger takes one opening and one closing row of a request.

Knows rows and amounts; must not know HTTP or what a token is worth. Every function runs inside a transaction.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import (
    BigInteger,
    Connection,
    Insert,
    Integer,
    String,
    Table,
    Update,
    case,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.sql.dml import ReturningUpdate
from sqlalchemy.types import TypeEngine

from toptwo.accounts.caller import Limits
from toptwo.accounts.ledger import InsufficientQuotaError, day_of, spent
from toptwo.accounts.money import Tokens, format_credits
from toptwo.accounts.rows import DIALECTS, as_rows, given_rows
from toptwo.accounts.tables import accounts, ledger, spending, usage

Outcome = Literal["completed", "cancelled", "failed", "lost"]


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
class Settlement:
    """What a request came to. cost: in micro-credits; never more than was reserved is charged."""

    request_id: str
    cost: int
    tokens: Tokens
    outcome: Outcome
    at: int


def reserve(connection: Connection, charges: Sequence[Charge]) -> list[None]:
    """Put requests on record, and keep what they may cost.

    Raises InsufficientQuotaError where there is not enough for all of them together; it speaks of the first.
    """
    do = _STATEMENTS[connection.dialect.name]
    priced = [charge for charge in charges if charge.amount]
    if priced:
        _take(connection, priced)
        spent_by = _sums((owner, c.day, c.amount) for c in priced for owner in (c.key_id, c.account_id))
        connection.execute(do.spend, as_rows(spent_by))
        for charge in priced:
            _check_budgets(connection, charge)
        entries = [(c.account_id, "reserve", -c.amount, c.at, c.key_id, c.request_id, 0) for c in priced]
        connection.execute(do.add_entries, as_rows(entries))
    uses = [(c.request_id, c.account_id, c.key_id, c.model, c.at, c.day, c.lease, c.amount) for c in charges]
    connection.execute(do.begin_uses, as_rows(uses))
    return [None] * len(charges)


def settle(connection: Connection, settlements: Sequence[Settlement]) -> list[int | None]:
    """Close requests: what each cost, never more than was reserved. None for those closed before."""
    do = _STATEMENTS[connection.dialect.name]
    first = {one.request_id: one for one in reversed(settlements)}
    ends = [
        (s.request_id, s.cost, s.outcome, s.tokens.prompt, s.tokens.cached, s.tokens.completion)
        for s in first.values()
    ]
    closed = connection.execute(do.end_uses, as_rows(ends)).all()
    reserved = [row for row in closed if row.reserved]
    if reserved:
        unused = [(row, row.reserved - row.cost) for row in reserved]
        connection.execute(do.give_back, as_rows(_sums((row.account_id, rest) for row, rest in unused)))
        unspent = _sums(
            (owner, row.day, rest) for row, rest in unused for owner in (row.key_id, row.account_id)
        )
        connection.execute(do.unspend, as_rows(unspent))
        entries = [
            (
                *(row.account_id, "settle" if row.cost else "refund", rest),
                *(first[row.request_id].at, row.key_id, row.request_id, 1),
            )
            for row, rest in unused
        ]
        connection.execute(do.add_entries, as_rows(entries))
    costs = {row.request_id: int(row.cost) for row in closed}
    return [costs.get(one.request_id) if first[one.request_id] is one else None for one in settlements]


def _take(connection: Connection, charges: Sequence[Charge]) -> None:
    """First of all: from here on nobody else reserves for the same accounts until this is committed."""
    totals = _sums((charge.account_id, charge.amount) for charge in charges)
    do = _STATEMENTS[connection.dialect.name]
    if connection.execute(do.take, as_rows(totals)).rowcount == len(totals):
        return
    charge = charges[0]
    balance = connection.execute(
        select(func.coalesce(func.max(accounts.c.balance), 0)).where(accounts.c.id == charge.account_id)
    ).scalar_one()
    raise InsufficientQuotaError(
        f"The request may cost up to {format_credits(charge.amount)} credits; "
        f"your account has {format_credits(balance)}. Ask for fewer tokens, or add credit."
    )


def _check_budgets(connection: Connection, charge: Charge) -> None:
    """Behind what has been spent: what is seen there is with the charge, and all that are made with it."""
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
            if budget is not None and amount > budget:
                left = max(0, budget - (amount - charge.amount))
                raise InsufficientQuotaError(
                    f"The request may cost up to {format_credits(charge.amount)} credits; of your {whose}'s "
                    f"{period} budget of {format_credits(budget)} {format_credits(left)} are left."
                )


def _sums(rows: Iterable[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Rows whose last cell is an amount, each of the others once. In order, as all who lock them do."""
    sums: Counter[tuple[Any, ...]] = Counter()
    for *key, amount in rows:
        sums[tuple(key)] += amount
    return sorted((*key, amount) for key, amount in sums.items())


@dataclass(frozen=True)
class _Statements:
    """Made once for each database: to put one together takes SQLAlchemy longer than to run it."""

    take: Update
    give_back: Update
    spend: Insert
    unspend: Update
    add_entries: Insert
    begin_uses: Insert
    end_uses: ReturningUpdate[Any]


def _statements(dialect: str) -> _Statements:
    inserting: Any = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}[dialect]
    of_account = given_rows(dialect, {"account_id": String, "amount": BigInteger}).c
    of_owner = given_rows(dialect, {"owner": String, "day": String, "amount": BigInteger}).c
    is_owner = (spending.c.owner == of_owner.owner) & (spending.c.day == of_owner.day)
    spend = inserting(spending).from_select(
        [*of_owner.keys()],
        select(*of_owner).where(of_owner.owner.is_not(None)),  # without a WHERE, ON would be of a JOIN
    )
    return _Statements(
        take=update(accounts)
        .where(
            accounts.c.id == of_account.account_id,
            accounts.c.status == "active",
            accounts.c.balance >= of_account.amount,
        )
        .values(balance=accounts.c.balance - of_account.amount),
        give_back=update(accounts)
        .where(accounts.c.id == of_account.account_id)
        .values(balance=accounts.c.balance + of_account.amount),
        spend=spend.on_conflict_do_update(
            index_elements=["owner", "day"], set_={"amount": spending.c.amount + spend.excluded.amount}
        ),
        unspend=update(spending).where(is_owner).values(amount=spending.c.amount - of_owner.amount),
        add_entries=_insert_all(dialect, ledger, _ENTRY),
        begin_uses=_insert_all(dialect, usage, _USE),
        end_uses=_end_uses(dialect),
    )


_ENTRY = {
    "account_id": String,
    "kind": String,
    "amount": BigInteger,
    "at": BigInteger,
    "key_id": String,
    "request_id": String,
    "closes": Integer,
}
_USE = {
    "request_id": String,
    "account_id": String,
    "key_id": String,
    "model": String,
    "at": BigInteger,
    "day": String,
    "lease": String,
    "reserved": BigInteger,
}
_TOKENS = ("prompt_tokens", "cached_tokens", "completion_tokens")
_END = {
    "request_id": String,
    "cost": BigInteger,
    "outcome": String,
    **dict.fromkeys(_TOKENS, BigInteger),
}


def _insert_all(dialect: str, table: Table, columns: Mapping[str, type[TypeEngine[Any]]]) -> Insert:
    return insert(table).from_select([*columns], select(given_rows(dialect, columns)))


def _end_uses(dialect: str) -> ReturningUpdate[Any]:
    end = given_rows(dialect, _END).c
    return (
        update(usage)
        .where(usage.c.request_id == end.request_id, usage.c.outcome.is_(None))
        .values(
            outcome=end.outcome,
            cost=case((end.cost < usage.c.reserved, end.cost), else_=usage.c.reserved),
            **{name: end[name] for name in _TOKENS},
        )
        .returning(*usage.c["request_id", "account_id", "key_id", "day", "reserved", "cost"])
    )


_STATEMENTS = {dialect: _statements(dialect) for dialect in DIALECTS}
