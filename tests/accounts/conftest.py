"""Every test of the accounts runs on both databases."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from accounts.databases import PostgreSQL, run_postgresql
from toptwo.accounts import store
from toptwo.accounts.audit import Actor
from toptwo.accounts.database import Database, create_directory, open_engine
from toptwo.accounts.migrations import migrate
from toptwo.accounts.store import Account, NewAccount

NOW = 1_800_000_000
ME = Actor("a test")


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQL | None]:
    with run_postgresql() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/accounts.db"
    server: PostgreSQL | None = request.getfixturevalue("postgresql")
    if server is None:
        pytest.skip("PostgreSQL is not installed")
    return server.create_database()


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    """Of a migrated database."""
    create_directory(url)
    engine = open_engine(url)
    migrate(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def database(engine: Engine) -> Iterator[Database]:
    database = Database(engine)
    yield database
    database.close()


@pytest.fixture
def account(database: Database) -> Account:
    """One with half a credit."""
    new = NewAccount("team", grant=500_000)
    return database.write(lambda connection: store.create_account(connection, ME, new, NOW)).result()
