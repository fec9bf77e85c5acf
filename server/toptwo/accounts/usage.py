"""What was used: sums over requests that have ended.

Knows rows; must not know who asks.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from sqlalchemy import Connection, func, select

from toptwo.accounts.tables import usage

Grouping = Literal["day", "key", "model", "account"]
GROUPINGS: tuple[Grouping, ...] = get_args(Grouping)
_COLUMNS = {"day": usage.c.day, "key": usage.c.key_id, "model": usage.c.model, "account": usage.c.account_id}
MOST_ROWS = 10_000


@dataclass(frozen=True)
class UsageQuery:
    """What to sum, and by what. first_day and last_day: inclusive, in UTC, like 2026-11-27."""

    by: tuple[Grouping, ...] = ("day",)
    account_id: str | None = None
    key_id: str | None = None
    model: str | None = None
    first_day: str | None = None
    last_day: str | None = None


@dataclass(frozen=True)
class UsageRow:
    """One sum. What was not grouped by is None. cost_microcredits: what was charged."""

    day: str | None
    account: str | None
    key: str | None
    model: str | None
    requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    cost_microcredits: int


def summarise(connection: Connection, query: UsageQuery) -> list[UsageRow]:
    """The sums, in the order of what they are grouped by; at most MOST_ROWS."""
    groups = [_COLUMNS[name].label(f"by_{name}") for name in query.by]
    sums = [
        func.count().label("requests"),
        *(
            func.coalesce(func.sum(usage.c[name]), 0).label(name)
            for name in ("prompt_tokens", "cached_tokens", "completion_tokens", "cost")
        ),
    ]
    statement = select(*groups, *sums).where(usage.c.outcome.is_not(None))
    for column, wanted in (
        (usage.c.account_id, query.account_id),
        (usage.c.key_id, query.key_id),
        (usage.c.model, query.model),
    ):
        if wanted is not None:
            statement = statement.where(column == wanted)
    if query.first_day is not None:
        statement = statement.where(usage.c.day >= query.first_day)
    if query.last_day is not None:
        statement = statement.where(usage.c.day <= query.last_day)
    if groups:
        columns = [_COLUMNS[name] for name in query.by]
        statement = statement.group_by(*columns).order_by(*columns)
    return [_row(row) for row in connection.execute(statement.limit(MOST_ROWS))]


def as_csv(rows: Sequence[UsageRow]) -> str:
    """The rows under a line of their names."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(UsageRow)], lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _defused(value) for name, value in asdict(row).items()} for row in rows)
    return text.getvalue()


def _defused(value: object) -> object:
    """A model's name must not become a formula in somebody's spreadsheet."""
    return f"'{value}" if isinstance(value, str) and value[:1] in tuple("=+-@\t\r") else value


def _row(row: Any) -> UsageRow:
    return UsageRow(
        day=getattr(row, "by_day", None),
        account=getattr(row, "by_account", None),
        key=getattr(row, "by_key", None),
        model=getattr(row, "by_model", None),
        requests=int(row.requests),
        prompt_tokens=int(row.prompt_tokens),
        cached_tokens=int(row.cached_tokens),
        completion_tokens=int(row.completion_tokens),
        cost_microcredits=int(row.cost),
    )
