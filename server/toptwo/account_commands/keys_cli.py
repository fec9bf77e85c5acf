"""`toptwo keys …` and `toptwo usage`: arguments in, a table or JSON out."""

from __future__ import annotations

from dataclasses import asdict
from datetime import date
from typing import Annotated, get_args

import typer
from rich.console import Console

from toptwo.account_commands import office
from toptwo.account_commands.office import Office, open_office
from toptwo.account_commands.options import KeyId, LimitOptions, Permissions, Place, UsageFilter
from toptwo.accounts import key_store, store
from toptwo.accounts.caller import SCOPES, Limits
from toptwo.accounts.key_store import KeyInfo, KeyRequest
from toptwo.accounts.keys import NewKey
from toptwo.accounts.store import NewAccount
from toptwo.accounts.usage import GROUPINGS, Grouping, UsageQuery, as_csv, summarise
from toptwo.accounts.views import show_key
from toptwo.errors import StartupError
from toptwo.option_groups import grouped

keys_cli = typer.Typer(no_args_is_help=True, help="API keys of accounts, and keys to manage them with.")

_COLUMNS = ("id", "kind", "account_id", "name", "status", "expires_at")


@keys_cli.command("create")
@grouped
def create(
    *,
    account: Annotated[
        str | None,
        typer.Option(metavar="ACCOUNT", help="Whose it is (default: the only account; the first is made)."),
    ] = None,
    management: Annotated[
        bool, typer.Option("--management", help="A key to manage accounts with, and for nothing else.")
    ] = False,
    name: Annotated[str, typer.Option(help="What it is for.")] = "",
    permissions: Permissions,
    limit_options: LimitOptions,
    place: Place,
) -> None:
    """Create a key. It is shown this once, and kept nowhere."""
    limits = office.limits_of(limit_options)
    if management and (account or permissions != Permissions() or limits):
        raise StartupError("--management: such a key has no account, permissions or limits")
    with open_office(place) as here:
        wanted = KeyRequest(
            name=name or ("management" if management else "key"),
            account_id=None if management else account or _only_account(here),
            scopes=office.scopes_of(permissions.scopes) or SCOPES,
            models=office.names_of(permissions.models),
            limits=Limits(**limits),
            expires_at=office.time_of(permissions.expires, here.now, "--expires"),
        )
        made = key_store.create_key(here.connection, here.actor, wanted, here.now)
    _show_new(*made, here.now, as_json=place.as_json)


@keys_cli.command("list")
@grouped
def list_keys(
    *,
    account: Annotated[str | None, typer.Option(metavar="ACCOUNT", help="Only those of this one.")] = None,
    place: Place,
) -> None:
    """List keys, those that have ended too."""
    with open_office(place) as here:
        found = key_store.list_keys(here.connection, account_id=account, limit=100_000)
    rows = [show_key(key, here.now) for key in found]
    office.show_rows(rows, _COLUMNS, as_json=place.as_json, empty="There are no keys yet: toptwo keys create")


@keys_cli.command("show")
@grouped
def show(*, key: KeyId, place: Place) -> None:
    """Show everything about a key but the key."""
    with open_office(place) as here:
        found = key_store.get_key(here.connection, key)
    office.show_one(show_key(found, here.now), as_json=place.as_json)


@keys_cli.command("change")
@grouped
def change(
    *,
    key: KeyId,
    name: Annotated[str | None, typer.Option(help="What it is for.")] = None,
    permissions: Permissions,
    limit_options: LimitOptions,
    place: Place,
) -> None:
    """Change what a key may do; a limit of "none" is lifted, and so are --models all."""
    changes: dict[str, object] = dict(office.limits_of(limit_options))
    if name is not None:
        changes["name"] = name
    if permissions.scopes is not None:
        changes["scopes"] = office.scopes_of(permissions.scopes)
    if permissions.models is not None:
        changes["models"] = None if permissions.models == "all" else office.names_of(permissions.models)
    with open_office(place) as here:
        if permissions.expires is not None:
            changes["expires_at"] = office.time_of(permissions.expires, here.now, "--expires")
        found = key_store.change_key(here.connection, here.actor, key, changes, here.now)
    office.show_one(show_key(found, here.now), as_json=place.as_json)


@keys_cli.command("revoke")
@grouped
def revoke(*, key: KeyId, place: Place) -> None:
    """Refuse a key for good. A server that runs knows within seconds."""
    with open_office(place) as here:
        found = key_store.revoke_key(here.connection, here.actor, key, here.now)
    office.show_one(show_key(found, here.now), as_json=place.as_json)


@keys_cli.command("rotate")
@grouped
def rotate(
    *,
    key: KeyId,
    overlap: Annotated[str, typer.Option(metavar="24h", help="How long the old one still works.")] = "24h",
    place: Place,
) -> None:
    """Create a key like another, which ends after a while. The new one is shown this once."""
    seconds = office.seconds_of(overlap, "--overlap")
    with open_office(place) as here:
        made = key_store.rotate_key(here.connection, here.actor, key, seconds, here.now)
    _show_new(*made, here.now, as_json=place.as_json)


@grouped
def usage(
    *,
    by: Annotated[str, typer.Option(metavar=",".join(GROUPINGS), help="What to sum by.")] = "day,model",
    chosen: UsageFilter,
    csv: Annotated[
        bool, typer.Option("--csv", help="Print comma-separated values and nothing else.")
    ] = False,
    place: Place,
) -> None:
    """Show what was used: requests, tokens, and what they cost."""
    query = UsageQuery(
        by=_groupings(by),
        account_id=chosen.account,
        key_id=chosen.key,
        model=chosen.model,
        first_day=_day(chosen.first, "--from"),
        last_day=_day(chosen.last, "--to"),
    )
    with open_office(place) as here:
        rows = summarise(here.connection, query)
    if csv:
        Console().print(as_csv(rows), end="", markup=False, highlight=False, soft_wrap=True)
        return
    columns = [
        *query.by,
        "requests",
        "prompt_tokens",
        "cached_tokens",
        "completion_tokens",
        "cost_microcredits",
    ]
    office.show_rows([asdict(row) for row in rows], columns, as_json=place.as_json, empty="Nothing was used.")


def _only_account(here: Office) -> str:
    """The account of a key for which none was named: the only one, made if there is none."""
    found = store.list_accounts(here.connection, limit=2)
    if len(found) > 1:
        raise StartupError("--account: there are several accounts; say whose key it is: toptwo accounts list")
    if found:
        return found[0].id
    return store.create_account(
        here.connection, here.actor, NewAccount("default", grant=here.grant), here.now
    ).id


def _show_new(info: KeyInfo, new: NewKey, now: int, *, as_json: bool) -> None:
    if as_json:
        office.print_json(show_key(info, now) | {"key": new.text})
        return
    console = Console()
    console.print(new.text, markup=False, highlight=False, soft_wrap=True)
    owner = "it manages accounts" if info.account_id is None else f"account {info.account_id}"
    console.print(f"Key {info.id}, {owner}. It is not shown again.", markup=False, highlight=False)


def _groupings(text: str) -> tuple[Grouping, ...]:
    names = office.names_of(text) or ()
    for name in names:
        if name not in get_args(Grouping):
            raise StartupError(f"--by: there is no {name!r}; there are {', '.join(GROUPINGS)}")
    return tuple(name for name in GROUPINGS if name in names)


def _day(text: str | None, flag: str) -> str | None:
    if text is None:
        return None
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError:
        raise StartupError(f"{flag}: {text!r} is no date like 2026-11-27") from None
