"""What the commands share: the open database, who acts, how amounts and times are read and results shown."""

from __future__ import annotations

import getpass
import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.table import Table
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from toptwo.account_commands.options import LimitOptions, Place
from toptwo.accounts.audit import Actor
from toptwo.accounts.caller import SCOPES
from toptwo.accounts.ledger import InsufficientQuotaError
from toptwo.accounts.money import format_credits, parse_credits
from toptwo.accounts.opening import grant_of, open_database
from toptwo.accounts.store import NotFoundError
from toptwo.errors import StartupError
from toptwo.settings import load_settings

_PERIOD = re.compile(r"(\d{1,9})([smhdw])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}

_AMOUNT = "_microcredits"  # how the names of amounts end


@dataclass(frozen=True)
class Office:
    """One command's work on the database. grant: micro-credits that a new account begins with by default."""

    connection: Connection
    actor: Actor
    now: int
    grant: int


@contextmanager
def open_office(place: Place) -> Iterator[Office]:
    """A transaction, committed at the end. Raises StartupError."""
    given = {"database_url": place.database_url, "data_dir": place.data_dir}
    settings, _ = load_settings({name: value for name, value in given.items() if value is not None})
    engine = open_database(settings)
    try:
        with engine.begin() as connection:
            yield Office(
                connection, Actor(f"{getpass.getuser()} on the machine"), int(time.time()), grant_of(settings)
            )
    except (NotFoundError, InsufficientQuotaError) as error:
        raise StartupError(str(error)) from None
    except SQLAlchemyError as error:
        cause = str(getattr(error, "orig", None) or type(error).__name__).strip().partition("\n")[0]
        raise StartupError(f"the accounts' database cannot be used: {cause}") from None
    finally:
        engine.dispose()


def amount_of(text: str | None, flag: str) -> int | None:
    """Micro-credits of what a person writes as credits; "none" is None. Raises StartupError."""
    if text is None or text == "none":
        return None
    try:
        return parse_credits(text)
    except ValueError as error:
        raise StartupError(f"{flag}: {error}") from None


def number_of(text: str | None, flag: str) -> int | None:
    """A positive number; "none" is None. Raises StartupError."""
    if text is None or text == "none":
        return None
    if not text.isdecimal() or not 0 < int(text) < 1 << 62:
        raise StartupError(f"{flag}: {text!r} is no positive number, and not 'none'")
    return int(text)


def seconds_of(text: str, flag: str) -> int:
    """Seconds of 30s, 15m, 24h, 30d or 4w. Raises StartupError."""
    period = _PERIOD.fullmatch(text)
    if period is None:
        raise StartupError(f"{flag}: {text!r} is no time like 30s, 15m, 24h, 30d or 4w")
    return int(period[1]) * _SECONDS[period[2]]


def time_of(text: str | None, now: int, flag: str) -> int | None:
    """When something ends: in 30d, at 2027-01-31, or "never". Raises StartupError."""
    if text is None or text == "never":
        return None
    if _PERIOD.fullmatch(text):
        return now + seconds_of(text, flag)
    try:
        return int(datetime.fromisoformat(text).timestamp())
    except ValueError:
        raise StartupError(f"{flag}: {text!r} is no date, no time like 30d, and not 'never'") from None


def scopes_of(text: str | None) -> tuple[str, ...] | None:
    """The scopes in a comma-separated list. Raises StartupError."""
    names = names_of(text)
    unknown = set(names or ()) - set(SCOPES)
    if unknown:
        raise StartupError(f"--scopes: there is no {sorted(unknown)[0]!r}; there are {', '.join(SCOPES)}")
    return names


def names_of(text: str | None) -> tuple[str, ...] | None:
    """The names in a comma-separated list."""
    return None if text is None else tuple(name.strip() for name in text.split(",") if name.strip())


def limits_of(given: LimitOptions) -> dict[str, int | None]:
    """The limits that were given, by their names; "none" lifts one. Raises StartupError."""
    return {
        name: (amount_of if "budget" in name else number_of)(text, "--" + name.replace("_", "-"))
        for name, text in asdict(given).items()
        if text is not None
    }


def show_rows(rows: Sequence[dict[str, Any]], columns: Sequence[str], *, as_json: bool, empty: str) -> None:
    """Rows as a table, or as JSON with everything in them."""
    console = Console()
    if as_json:
        print_json(list(rows))
        return
    if not rows:
        console.print(empty, highlight=False)
        return
    table = Table()
    for column in columns:
        shown = column.removesuffix(_AMOUNT).replace("_", " ")
        table.add_column(shown, no_wrap=column in ("id", "account_id"), overflow="fold")
    for row in rows:
        table.add_row(*(_cell(column, row[column]) for column in columns))
    console.print(table)


def show_one(row: dict[str, Any], *, as_json: bool) -> None:
    """One thing, a line for each of its parts."""
    if as_json:
        print_json(row)
        return
    console = Console()
    for name, value in _flat(row).items():
        shown = name.removesuffix(_AMOUNT).replace("_", " ")
        console.print(f"{shown:<22}{_cell(name, value)}", markup=False, highlight=False, soft_wrap=True)


def print_json(value: object) -> None:
    """The value and nothing else."""
    Console().print(json.dumps(value, indent=2), markup=False, highlight=False, soft_wrap=True)


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in row.items():
        flat |= value if isinstance(value, dict) else {name: value}
    return flat


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name.endswith(_AMOUNT):
        return format_credits(value)
    if name == "at" or name.endswith("_at"):
        return str(value).replace("T", " ").removesuffix("Z")[:16]
    if isinstance(value, dict):
        value = [
            f"{name.removesuffix(_AMOUNT)} {_cell(name, inner)}"
            for name, inner in value.items()
            if inner is not None
        ]
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
