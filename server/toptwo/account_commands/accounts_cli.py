"""`toptwo accounts …` and `toptwo prices …`: arguments in, a table or JSON out."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from toptwo.account_commands import office
from toptwo.account_commands.office import open_office
from toptwo.account_commands.options import AccountId, LimitOptions, Place
from toptwo.accounts import audit, ledger, store
from toptwo.accounts.caller import Limits
from toptwo.accounts.money import Price
from toptwo.accounts.store import NewAccount
from toptwo.accounts.views import show_account, show_audit, show_entry, show_price
from toptwo.errors import StartupError
from toptwo.option_groups import grouped

accounts_cli = typer.Typer(no_args_is_help=True, help="Accounts: who uses the server, and their credit.")
prices_cli = typer.Typer(no_args_is_help=True, help="What tokens cost; nothing, unless a price is set.")

_COLUMNS = ("id", "name", "email", "status", "balance_microcredits", "created_at")


@accounts_cli.command("create")
@grouped
def create_account(
    *,
    name: Annotated[str, typer.Argument(help="What it is called.", show_default=False)],
    email: Annotated[str | None, typer.Option(metavar="ADDRESS", help="Whose it is.")] = None,
    grant: Annotated[
        str | None, typer.Option(metavar="CREDITS", help="What it begins with (default: 0.5).")
    ] = None,
    limit_options: LimitOptions,
    place: Place,
) -> None:
    """Create an account, with credit to begin with."""
    limits = office.limits_of(limit_options)
    if not name.strip() or len(name) > 200:
        raise StartupError("NAME: an account's name has 1 to 200 characters")
    amount = office.amount_of(grant, "--grant")
    if amount is not None and amount < 0:
        raise StartupError("--grant: an account cannot begin with less than nothing")
    with open_office(place) as here:
        new = NewAccount(name, email, here.grant if amount is None else amount, Limits(**limits))
        account = store.create_account(here.connection, here.actor, new, here.now)
    office.show_one(show_account(account), as_json=place.as_json)


@accounts_cli.command("list")
@grouped
def list_accounts(*, place: Place) -> None:
    """List all accounts."""
    with open_office(place) as here:
        rows = [show_account(one) for one in store.list_accounts(here.connection, limit=100_000)]
    office.show_rows(rows, _COLUMNS, as_json=place.as_json, empty="There are no accounts yet.")


@accounts_cli.command("show")
@grouped
def show(*, account: AccountId, place: Place) -> None:
    """Show an account and its limits."""
    with open_office(place) as here:
        found = store.get_account(here.connection, account)
    office.show_one(show_account(found), as_json=place.as_json)


@accounts_cli.command("change")
@grouped
def change(
    *,
    account: AccountId,
    name: Annotated[str | None, typer.Option(help="What it is called.")] = None,
    email: Annotated[str | None, typer.Option(metavar="ADDRESS", help="Whose it is.")] = None,
    limit_options: LimitOptions,
    place: Place,
) -> None:
    """Change an account's name, address or limits; a limit of "none" is lifted."""
    changes: dict[str, object] = dict(office.limits_of(limit_options))
    changes |= {key: value for key, value in {"name": name, "email": email}.items() if value is not None}
    _change(account, changes, place)


@accounts_cli.command("suspend")
@grouped
def suspend(*, account: AccountId, place: Place) -> None:
    """Refuse all keys of an account until it is resumed."""
    _change(account, {"status": "suspended"}, place)


@accounts_cli.command("resume")
@grouped
def resume(*, account: AccountId, place: Place) -> None:
    """Accept the keys of an account again."""
    _change(account, {"status": "active"}, place)


@accounts_cli.command("credit")
@grouped
def credit(
    *,
    account: AccountId,
    amount: Annotated[str, typer.Argument(metavar="CREDITS", help="How much; behind -- also less than 0.")],
    note: Annotated[str, typer.Option(metavar="TEXT", help="Why; kept in the ledger.")] = "",
    place: Place,
) -> None:
    """Add credit to an account, or take some."""
    micro = office.amount_of(amount, "CREDITS")
    if not micro:
        raise StartupError("CREDITS: nothing would change")
    with open_office(place) as here:
        found = store.credit_account(here.connection, here.actor, account, micro, note[:500], here.now)
    office.show_one(show_account(found), as_json=place.as_json)


@accounts_cli.command("ledger")
@grouped
def show_ledger(
    *,
    account: AccountId,
    limit: Annotated[int, typer.Option(min=1, help="How many rows.")] = 50,
    place: Place,
) -> None:
    """Show what an account was given and charged, the newest first."""
    with open_office(place) as here:
        store.get_account(here.connection, account)
        rows = [show_entry(one) for one in ledger.entries(here.connection, account, limit=limit)]
    columns = ("at", "kind", "amount_microcredits", "request_id", "note")
    office.show_rows(rows, columns, as_json=place.as_json, empty="Nothing yet.")


@accounts_cli.command("audit")
@grouped
def show_audit_log(
    *,
    limit: Annotated[int, typer.Option(min=1, help="How many entries.")] = 50,
    place: Place,
) -> None:
    """Show who changed what, the newest first, after checking that nobody has altered the log."""
    with open_office(place) as here:
        broken = audit.first_broken(here.connection)
        rows = [show_audit(one) for one in audit.entries(here.connection, limit=limit)]
    if broken is not None:
        raise StartupError(
            f"the audit log was altered: entry {broken} is not what was written, or follows another"
        )
    columns = ("id", "at", "actor", "action", "target", "detail")
    office.show_rows(rows, columns, as_json=place.as_json, empty="Nothing yet.")


@prices_cli.command("list")
@grouped
def list_prices(*, place: Place) -> None:
    """List the prices per million tokens."""
    with open_office(place) as here:
        rows = [show_price(model, price) for model, price in store.list_prices(here.connection).items()]
    columns = ("model", "prompt_microcredits", "cached_prompt_microcredits", "completion_microcredits")
    office.show_rows(rows, columns, as_json=place.as_json, empty="No model has a price: all are free.")


@prices_cli.command("set")
@grouped
def set_price(
    *,
    model: Annotated[str, typer.Argument(help="The model's name, as clients use it.", show_default=False)],
    prompt: Annotated[
        str | None, typer.Option(metavar="CREDITS", help="Per million tokens of prompts.")
    ] = None,
    cached: Annotated[
        str | None, typer.Option(metavar="CREDITS", help="Of those that were cached; as others, by default.")
    ] = None,
    completion: Annotated[
        str | None, typer.Option(metavar="CREDITS", help="Per million tokens of answers.")
    ] = None,
    place: Place,
) -> None:
    """Set what a model costs from now on. What is not given stays."""
    given = {
        "prompt": office.amount_of(prompt, "--prompt"),
        "cached": office.amount_of(cached, "--cached"),
        "completion": office.amount_of(completion, "--completion"),
    }
    if any(amount is not None and amount < 0 for amount in given.values()):
        raise StartupError("a price cannot be less than nothing")
    with open_office(place) as here:
        known = store.list_prices(here.connection)
        price = replace(
            known.get(model, Price()), **{key: value for key, value in given.items() if value is not None}
        )
        if cached is None and model not in known:
            price = replace(price, cached=price.prompt)
        store.set_price(here.connection, here.actor, model, price, here.now)
    office.show_one(show_price(model, price), as_json=place.as_json)


def _change(account: str, changes: dict[str, object], place: Place) -> None:
    with open_office(place) as here:
        found = store.change_account(here.connection, here.actor, account, changes, here.now)
    office.show_one(show_account(found), as_json=place.as_json)
