"""Many rows as one value: a table of a statement's own, given as JSON.

A statement that is run for each of many rows gives way to other threads as often, and waits as often for its
turn; one that is given all of them does so once. Knows the two databases' names for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import orjson
from sqlalchemy import JSON, Subquery, Text, bindparam, cast, column, func, select
from sqlalchemy.dialects import postgresql
from sqlalchemy.types import TypeEngine

ROWS = "rows"
DIALECTS = ("sqlite", "postgresql")


def given_rows(dialect: str, columns: Mapping[str, type[TypeEngine[Any]]]) -> Subquery:
    """A table with these columns, whose rows are the statement's parameter ROWS."""
    rows = bindparam(ROWS, type_=Text)
    if dialect == "sqlite":
        table = func.json_each(rows).table_valued(column("value", JSON))
    else:
        json = postgresql.JSON
        table = func.json_array_elements(cast(rows, json)).table_valued(column("value", json))
    value = table.alias("given_values").c.value
    cells = [
        cast(value[index].as_string(), kind).label(name) for index, (name, kind) in enumerate(columns.items())
    ]
    return select(*cells).subquery("given")


def as_rows(rows: Iterable[Sequence[Any]]) -> dict[str, str]:
    """The parameter, from the cells of every row in the columns' order."""
    return {ROWS: orjson.dumps([list(row) for row in rows]).decode()}
