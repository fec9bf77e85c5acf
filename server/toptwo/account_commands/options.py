"""Options that many of the commands have, as groups that a command takes as one parameter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from toptwo.accounts.caller import SCOPES

AccountId = Annotated[str, typer.Argument(metavar="ACCOUNT", help="The account's id.", show_default=False)]
KeyId = Annotated[
    str,
    typer.Argument(metavar="KEY_ID", help="The key's id: its letters after toptwo_sk_.", show_default=False),
]


@dataclass(frozen=True)
class Place:
    """Where accounts are kept, and how results are printed."""

    database_url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Where accounts are kept; by default in the data directory."),
    ] = None
    data_dir: Annotated[Path | None, typer.Option(metavar="PATH", help="The data directory.")] = None
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False


@dataclass(frozen=True)
class LimitOptions:
    """Those of `caller.Limits`, as people write them."""

    requests_per_minute: Annotated[
        str | None, typer.Option(metavar="N|none", help="Most requests a minute.")
    ] = None
    tokens_per_minute: Annotated[str | None, typer.Option(metavar="N|none", help="Most tokens a minute.")] = (
        None
    )
    concurrent_requests: Annotated[
        str | None, typer.Option(metavar="N|none", help="Most requests at once.")
    ] = None
    daily_budget: Annotated[
        str | None, typer.Option(metavar="CREDITS|none", help="Most credits a day, in UTC.")
    ] = None
    monthly_budget: Annotated[
        str | None, typer.Option(metavar="CREDITS|none", help="Most credits a month, in UTC.")
    ] = None


@dataclass(frozen=True)
class Permissions:
    """What a key may be used for, and for how long."""

    scopes: Annotated[
        str | None, typer.Option(metavar=",".join(SCOPES), help="What it may be used for (default: all).")
    ] = None
    models: Annotated[
        str | None, typer.Option(metavar="NAME,…|all", help="Models that it may use (default: all).")
    ] = None
    expires: Annotated[
        str | None, typer.Option(metavar="30d|DATE|never", help="When it ends (default: never).")
    ] = None


@dataclass(frozen=True)
class UsageFilter:
    """Whose usage, and when."""

    first: Annotated[str | None, typer.Option("--from", metavar="DATE", help="First day, in UTC.")] = None
    last: Annotated[str | None, typer.Option("--to", metavar="DATE", help="Last day, in UTC.")] = None
    account: Annotated[str | None, typer.Option(metavar="ACCOUNT", help="Only that of this one.")] = None
    key: Annotated[str | None, typer.Option(metavar="KEY_ID", help="Only that of this key.")] = None
    model: Annotated[str | None, typer.Option(metavar="NAME", help="Only that of this model.")] = None
