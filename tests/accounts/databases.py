"""Databases to test on: an SQLite file, and a PostgreSQL server of our own on a private socket."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy


def postgresql_programs() -> Path | None:
    """Where Debian keeps them."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    return found[-1].parent if found else None


class PostgreSQL:
    """A server in a directory of its own, reached through a socket in it."""

    def __init__(self, directory: Path, programs: Path) -> None:
        self._directory = directory
        self._programs = programs
        # It refuses to run as root; Debian's package brings a user for it.
        self._user = "postgres" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
        if os.geteuid() == 0:
            shutil.chown(directory, self._user)
        self._run("initdb", "--pgdata", "data", "--username", "toptwo", "--auth", "trust", "--no-sync")
        self.start()

    def url(self, database: str) -> str:
        """Of one of its databases."""
        return f"postgresql://toptwo@/{database}?host={self._directory}"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        options = f"-c listen_addresses='' -c unix_socket_directories='{self._directory}'"
        self._run("pg_ctl", "start", "--wait", "--pgdata", "data", "--log", "log", "--options", options)

    def stop(self) -> None:
        """Stop it at once."""
        self._run("pg_ctl", "stop", "--wait", "--pgdata", "data", "--mode", "immediate")

    def create_database(self) -> str:
        """An empty database of any name; its URL."""
        name = f"t_{secrets.token_hex(8)}"
        engine = sqlalchemy.create_engine(
            sqlalchemy.make_url(self.url("postgres")).set(drivername="postgresql+psycopg"),
            isolation_level="AUTOCOMMIT",
        )
        with engine.connect() as connection:
            connection.exec_driver_sql(f"CREATE DATABASE {name}")
        engine.dispose()
        return self.url(name)

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self._programs / program), *arguments]
        if os.geteuid() == 0:
            command = ["setpriv", "--reuid", self._user, "--regid", self._user, "--clear-groups", *command]
        subprocess.run(
            command, cwd=self._directory, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )


@contextmanager
def run_postgresql() -> Iterator[PostgreSQL | None]:
    """A server until the end; None where the programs are missing."""
    programs = postgresql_programs()
    if programs is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="toptwo-pg-") as directory:
        Path(directory).chmod(0o755)
        server = PostgreSQL(Path(directory), programs)
        try:
            yield server
        finally:
            server.stop()
