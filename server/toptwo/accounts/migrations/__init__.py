"""How the tables came about, version by version: the same for SQLite and PostgreSQL.

`migrate` brings a database to the newest version. A server does so at its start, in one transaction, so that
several that start together wait for one another.
"""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from toptwo.errors import StartupError

_LOCK = 7_486_412  # any number; that of PostgreSQL's advisory lock around migrations


def migrate(engine: Engine) -> None:
    """Make or bring up to date all tables. Raises StartupError."""
    try:
        with engine.begin() as connection:
            if connection.dialect.name == "postgresql":
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")
            _upgrade(connection)
    except CommandError:
        raise StartupError(f"{_shown(engine)}: the database was made by a newer version of toptwo") from None
    except (SQLAlchemyError, OSError) as error:
        cause = str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
        raise StartupError(f"{_shown(engine)}: the accounts' database cannot be used: {cause}") from None


def _upgrade(connection: Connection) -> None:
    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.set_main_option("path_separator", "os")
    command.upgrade(config, "head")


def _shown(engine: Engine) -> str:
    """The database's name without the password."""
    return engine.url.render_as_string(hide_password=True)
