"""Accounts, keys, prices and the audit log, as rows."""

from __future__ import annotations

from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, Engine, delete, select, update

from accounts.conftest import ME, NOW
from toptwo.accounts import audit, key_store, store
from toptwo.accounts.caller import Limits
from toptwo.accounts.database import Database, open_engine
from toptwo.accounts.key_store import KeyRequest
from toptwo.accounts.migrations import migrate
from toptwo.accounts.money import FREE, Price
from toptwo.accounts.store import Account, NewAccount, NotFoundError
from toptwo.accounts.tables import audit as audit_table
from toptwo.accounts.tables import keys as keys_table
from toptwo.accounts.tables import metadata
from toptwo.errors import StartupError


def test_migrations_make_the_tables_that_the_code_knows(engine: Engine) -> None:
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_migrating_again_changes_nothing(engine: Engine) -> None:
    migrate(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(StartupError, match="newer version"):
        migrate(engine)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("mysql://x/y", "only sqlite"),
        ("sqlite://", "memory"),
        ("nonsense", "no URL"),
        ("sqlite:////proc/no/such.db", "cannot be"),
        ("postgresql://nobody@127.0.0.1:1/x", "cannot be used"),
    ],
)
def test_a_database_that_cannot_be_is_named(url: str, words: str) -> None:
    with pytest.raises(StartupError, match=words) as caught:
        migrate(open_engine(url))
    assert "\n" not in str(caught.value)


def test_passwords_of_databases_are_not_shown() -> None:
    with pytest.raises(StartupError) as caught:
        migrate(open_engine("postgresql://nobody:hunter2@127.0.0.1:1/x"))
    assert "hunter2" not in str(caught.value)


def test_an_account_is_what_was_asked_for(database: Database) -> None:
    limits = Limits(requests_per_minute=5, monthly_budget=7)
    new = NewAccount("a", "a@b.c", 250, limits, "issuer subject")

    def create(connection: Connection) -> Account:
        return store.create_account(connection, ME, new, NOW)

    made = database.write(create).result()
    assert (made.name, made.email, made.balance, made.limits) == ("a", "a@b.c", 250, limits)
    assert database.read(lambda c: store.account_of(c, "issuer subject")).result() == made
    with pytest.raises(Exception, match=r"(?i)unique"):
        database.write(create).result()
    with pytest.raises(NotFoundError):
        database.read(lambda c: store.get_account(c, "nobody")).result()


def test_pages_follow_one_another(database: Database) -> None:
    def create(connection: Connection) -> None:
        for number in range(7):
            store.create_account(connection, ME, NewAccount(f"n{number}"), NOW)

    database.write(create).result()

    def page(after: str) -> list[str]:
        found = database.read(lambda c: store.list_accounts(c, after=after, limit=3)).result()
        return [one.id for one in found]

    seen = [""]
    while more := page(seen[-1]):
        seen += more
    seen.remove("")
    assert len(seen) == len(set(seen)) == 7


def test_the_text_of_a_key_is_nowhere(database: Database, account: Account) -> None:
    request = KeyRequest("k", account.id, models=("m",), limits=Limits(tokens_per_minute=9))
    info, new = database.write(lambda c: key_store.create_key(c, ME, request, NOW)).result()
    assert (info.models, info.limits, info.last4) == (("m",), request.limits, new.text[-4:])
    secret = new.text.split("_")[3]

    def everything(connection: Connection) -> str:
        return "".join(str(connection.execute(select(t)).all()) for t in metadata.sorted_tables)

    found = database.read(everything).result()
    assert info.id in found
    assert secret not in found
    assert secret[:20] not in found


def test_a_key_is_found_by_all_of_it(database: Database, account: Account) -> None:
    info, new = database.write(
        lambda c: key_store.create_key(c, ME, KeyRequest("k", account.id), NOW)
    ).result()
    holder = database.read(lambda c: key_store.find(c, new.key)).result()
    assert holder is not None
    assert holder.key == info
    assert holder.may_act(NOW)
    database.write(
        lambda c: c.execute(update(keys_table).where(keys_table.c.id == info.id).values(hash=bytes(32)))
    ).result()
    assert database.read(lambda c: key_store.find(c, new.key)).result() is None


@pytest.mark.parametrize("how", ["revoke", "expire", "suspend"])
def test_a_key_ends(database: Database, account: Account, how: str) -> None:
    expires = NOW + 10 if how == "expire" else None
    info, new = database.write(
        lambda c: key_store.create_key(c, ME, KeyRequest("k", account.id, expires_at=expires), NOW)
    ).result()
    if how == "revoke":
        database.write(lambda c: key_store.revoke_key(c, ME, info.id, NOW + 5)).result()
    if how == "suspend":
        change = {"status": "suspended"}
        database.write(lambda c: store.change_account(c, ME, account.id, change, NOW)).result()
    holder = database.read(lambda c: key_store.find(c, new.key)).result()
    assert holder is not None
    assert not holder.may_act(NOW + 10)
    assert holder.may_act(NOW + 9) == (how == "expire")


def test_a_rotated_key_overlaps_with_its_successor(database: Database, account: Account) -> None:
    request = KeyRequest("k", account.id, ("chat",), ("m",), Limits(concurrent_requests=2))
    old, _ = database.write(lambda c: key_store.create_key(c, ME, request, NOW)).result()
    new, text = database.write(lambda c: key_store.rotate_key(c, ME, old.id, 60, NOW)).result()
    old = database.read(lambda c: key_store.get_key(c, old.id)).result()
    assert (old.status(NOW + 59), old.status(NOW + 60)) == ("active", "expired")
    assert (new.name, new.scopes, new.models, new.limits) == ("k", ("chat",), ("m",), request.limits)
    assert new.rotated_from == old.id
    assert text.key.id == new.id
    with pytest.raises(NotFoundError, match="expired"):
        database.write(lambda c: key_store.rotate_key(c, ME, old.id, 60, NOW + 61)).result()


def test_a_management_key_belongs_to_nobody(database: Database) -> None:
    info, new = database.write(lambda c: key_store.create_key(c, ME, KeyRequest("k", None), NOW)).result()
    assert info.kind == new.key.kind == "management"
    with pytest.raises(NotFoundError):
        database.write(lambda c: key_store.create_key(c, ME, KeyRequest("k", "nobody"), NOW)).result()


def test_a_model_is_free_until_it_has_a_price(database: Database) -> None:
    assert database.read(lambda c: store.price_of(c, "m")).result() == FREE
    for price in (Price(1, 2, 3), Price(4, 5, 6)):
        database.write(lambda c, price=price: store.set_price(c, ME, "m", price, NOW)).result()
    assert database.read(store.list_prices).result() == {"m": Price(4, 5, 6)}


def test_every_change_is_on_record(database: Database, account: Account) -> None:
    database.write(lambda c: store.credit_account(c, ME, account.id, 5, "thanks", NOW)).result()
    info, _ = database.write(lambda c: key_store.create_key(c, ME, KeyRequest("k", account.id), NOW)).result()
    database.write(lambda c: key_store.change_key(c, ME, info.id, {"name": "n"}, NOW)).result()
    database.write(lambda c: key_store.revoke_key(c, ME, info.id, NOW)).result()
    database.write(lambda c: key_store.revoke_key(c, ME, info.id, NOW)).result()
    entries = database.read(audit.entries).result()
    actions = [entry.action for entry in reversed(entries)]
    assert actions == ["account.create", "account.credit", "key.create", "key.change", "key.revoke"]
    assert {entry.actor for entry in entries} == {"a test"}
    assert database.read(audit.first_broken).result() is None


@pytest.mark.parametrize("how", ["change", "remove"])
def test_who_alters_the_record_is_found_out(engine: Engine, database: Database, how: str) -> None:
    for number in range(4):
        new = NewAccount(f"n{number}")
        database.write(lambda c, new=new: store.create_account(c, ME, new, NOW)).result()
    attack: Any = update(audit_table).values(actor="another") if how == "change" else delete(audit_table)
    with pytest.raises(Exception, match="append-only"):
        database.write(lambda c: c.execute(attack.where(audit_table.c.id == 2))).result()
    with engine.begin() as connection:  # by somebody who owns the database
        if connection.dialect.name == "sqlite":
            for verb in ("update", "delete"):
                connection.exec_driver_sql(f"DROP TRIGGER audit_no_{verb}")
        else:
            connection.exec_driver_sql("ALTER TABLE audit DISABLE TRIGGER ALL")
        connection.execute(attack.where(audit_table.c.id == 2))
    assert database.read(audit.first_broken).result() == (2 if how == "change" else 3)
