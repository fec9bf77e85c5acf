"""Which database holds the accounts, and the book or a connection that is opened on it.

Knows settings and the file system.
"""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Engine

from toptwo.accounts.book import AccountBook
from toptwo.accounts.database import Database, create_directory, open_engine
from toptwo.accounts.migrations import migrate
from toptwo.accounts.money import MICRO
from toptwo.errors import StartupError
from toptwo.settings import Settings

FILE_NAME = "accounts.db"


def are_on(settings: Settings) -> bool:
    """Whether a server with these settings has accounts. Raises StartupError for what contradicts itself."""
    wanted = settings.database_url is not None or bool(settings.admin_key) or settings.signs_in
    if settings.accounts == "off":
        if wanted:
            raise StartupError(
                "--accounts off: there is no use for --database-url, --admin-key or signing in then"
            )
        return False
    return settings.accounts == "on" or wanted or _file(settings).exists()


def open_book(settings: Settings) -> AccountBook:
    """The book of a server, its database made or brought up to date. Raises StartupError."""
    return AccountBook(Database(open_database(settings)), fail_open=settings.accounts_fail_open)


def open_database(settings: Settings) -> Engine:
    """The database, made or brought up to date. Raises StartupError."""
    url = settings.database_url or f"sqlite:///{_file(settings)}"
    engine = open_engine(url)
    create_directory(url)
    migrate(engine)
    return engine


def grant_of(settings: Settings) -> int:
    """Micro-credits that a new account begins with."""
    return int(settings.account_grant * MICRO)


def _file(settings: Settings) -> Path:
    return settings.data_dir / FILE_NAME
