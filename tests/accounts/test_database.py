"""The database's faults: what is told, what is kept, and that one write's mistake is not another's."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, func, insert, select, update

from accounts.conftest import ME, NOW
from accounts.databases import PostgreSQL
from toptwo.accounts import charging, store
from toptwo.accounts import database as database_module
from toptwo.accounts.charging import Settlement
from toptwo.accounts.database import (
    Database,
    DatabaseUnavailableError,
    ForMany,
    create_directory,
    open_engine,
)
from toptwo.accounts.migrations import migrate
from toptwo.accounts.money import Tokens
from toptwo.accounts.store import NewAccount
from toptwo.accounts.tables import leases


def add(name: str) -> Callable[[Connection], None]:
    def work(connection: Connection) -> None:
        connection.execute(insert(leases).values(id=name, seen_at=NOW))

    return work


def count(connection: Connection) -> int:
    return int(connection.execute(select(func.count()).select_from(leases)).scalar_one())


def test_a_mistake_takes_nothing_else_with_it(database: Database) -> None:
    def spoilt(connection: Connection) -> None:
        add("spoilt")(connection)
        raise KeyError("no")

    gate = threading.Event()
    blocker = database.write(lambda _: gate.wait(10))  # so that the others are committed together
    futures = [database.write(work) for work in (add("a"), spoilt, add("a"), add("b"))]
    gate.set()
    assert blocker.result()
    assert [future.exception(10) is None for future in futures] == [True, False, False, True]
    assert database.read(count).result() == 2


def test_what_nobody_waits_for_any_more_is_not_begun(database: Database) -> None:
    gate = threading.Event()
    blocker = database.write(lambda _: gate.wait(10))
    left = database.write(add("left"))
    assert left.cancel()
    gate.set()
    blocker.result()
    database.write(add("last")).result()
    assert database.read(count).result() == 1


def test_a_read_sees_what_has_been_written(database: Database) -> None:
    for number in range(20):
        database.write(add(str(number))).result()
        assert database.read(count).result() == number + 1


class Sqlite:
    """A database in a file, with short patience."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(database_module, "BUSY_SECONDS", 0.2)
        monkeypatch.setattr(database_module, "RETRY_SECONDS", 0.1)
        self.path = directory / "accounts.db"
        url = f"sqlite:///{self.path}"
        create_directory(url)
        self.engine: Engine = open_engine(url)
        migrate(self.engine)
        self.database = Database(self.engine)


@pytest.fixture
def sqlite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    made = Sqlite(tmp_path, monkeypatch)
    yield made
    made.database.close()


def test_it_is_only_its_owners(sqlite: Sqlite) -> None:
    assert sqlite.path.stat().st_mode & 0o077 == 0


def test_what_is_acknowledged_survives_a_power_cut(sqlite: Sqlite) -> None:
    def settings(connection: Connection) -> tuple[Any, Any]:
        names = ("journal_mode", "synchronous")
        return tuple(connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in names)

    assert sqlite.database.write(settings).result() == ("wal", 2)  # 2: FULL


def test_locked(sqlite: Sqlite) -> None:
    with sqlite3.connect(sqlite.path, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        with pytest.raises(DatabaseUnavailableError, match="locked"):
            sqlite.database.write(add("a")).result(10)
        assert time.monotonic() - began < 2
        assert sqlite.database.read(count).result() == 0  # readers are not kept waiting
        kept = sqlite.database.write(add("kept"), persistent=True)
        time.sleep(0.5)
        assert not kept.done()
        other.execute("ROLLBACK")
    assert kept.result(10) is None
    sqlite.database.write(add("a")).result(10)
    assert sqlite.database.read(count).result() == 2
    other.close()


def test_full(sqlite: Sqlite) -> None:
    def limit(connection: Connection) -> None:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")

    def fill(connection: Connection) -> None:
        for number in range(500):
            store.create_account(connection, ME, NewAccount("x" * 200 + str(number)), NOW)

    sqlite.database.write(limit).result()
    with pytest.raises(DatabaseUnavailableError, match="full"):
        sqlite.database.write(fill).result(10)
    assert sqlite.database.read(store.list_accounts).result() == []


def test_read_only(sqlite: Sqlite) -> None:
    def forbid(connection: Connection) -> None:
        connection.exec_driver_sql("PRAGMA query_only = ON")

    sqlite.database.write(forbid).result()
    with pytest.raises(DatabaseUnavailableError, match="readonly"):
        sqlite.database.write(add("a")).result(10)
    assert sqlite.database.read(count).result() == 0


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_gone(sqlite: Sqlite, how: str) -> None:
    sqlite.database.write(add("a")).result()
    sqlite.path.rename(sqlite.path.with_suffix(".old"))
    if how == "replaced":
        sqlite.path.write_bytes(sqlite.path.with_suffix(".old").read_bytes())
    words = "No such file" if how == "removed" else "replaced"
    with pytest.raises(DatabaseUnavailableError, match=words):
        sqlite.database.write(add("b")).result(10)
    with pytest.raises(DatabaseUnavailableError, match=words):
        sqlite.database.read(count).result(10)
    sqlite.path.unlink(missing_ok=True)
    sqlite.path.with_suffix(".old").rename(sqlite.path)
    sqlite.database.write(add("b")).result(10)


def test_what_cannot_be_written_at_the_end_is_given_up(
    sqlite: Sqlite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "CLOSE_SECONDS", 0.3)
    sqlite.path.rename(sqlite.path.with_suffix(".old"))
    kept = sqlite.database.write(
        ForMany(charging.settle, Settlement("r", 0, Tokens(), "completed", NOW)), persistent=True
    )
    began = time.monotonic()
    sqlite.database.close()
    assert time.monotonic() - began < 3
    assert not kept.done()


def test_of_two_servers_that_wait_for_each_other_both_get_done(postgresql: PostgreSQL | None) -> None:
    if postgresql is None:
        pytest.skip("PostgreSQL is not installed")
    engine = open_engine(postgresql.create_database())
    migrate(engine)
    database = Database(engine)
    for name in ("a", "b"):
        database.write(add(name)).result(10)
    has_a, waits = threading.Event(), threading.Event()
    tries = 0

    def first_a_then_b(connection: Connection) -> None:
        nonlocal tries
        tries += 1
        connection.execute(update(leases).where(leases.c.id == "a").values(seen_at=1))
        has_a.set()
        waits.wait(10)
        connection.execute(update(leases).where(leases.c.id == "b").values(seen_at=1))

    with engine.begin() as other:
        other.exec_driver_sql("SET LOCAL deadlock_timeout = '60s'")  # it is not the one to give up
        other.execute(update(leases).where(leases.c.id == "b").values(seen_at=2))
        done = database.write(first_a_then_b)
        assert has_a.wait(10)
        waits.set()
        other.execute(update(leases).where(leases.c.id == "a").values(seen_at=2))
    done.result(20)
    assert tries == 2
    assert database.read(lambda c: c.execute(select(leases.c.seen_at)).scalars().all()).result(10) == [1, 1]
    database.close()


def test_postgresql_that_comes_back(postgresql: PostgreSQL | None) -> None:
    if postgresql is None:
        pytest.skip("PostgreSQL is not installed")
    engine = open_engine(postgresql.create_database())
    migrate(engine)
    database = Database(engine)
    database.write(add("a")).result(10)
    postgresql.stop()
    try:
        with pytest.raises(DatabaseUnavailableError):
            database.write(add("b")).result(10)
        kept = database.write(add("kept"), persistent=True)
    finally:
        postgresql.start()
    kept.result(10)
    database.write(add("b")).result(10)
    assert database.read(count).result(10) == 3
    database.close()
