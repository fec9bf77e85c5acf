"""A disk whose power can be cut: what has not been synced is lost, in part, in any order, and torn.

SQLite runs on it through a VFS of apsw. All goes to real files as well, so that it works as ever; beside
them is kept what the disk would hold if the power went now. `Connection` is as much of a DBAPI as SQLAlchemy
needs.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import apsw
from sqlalchemy import Engine, event

SECTOR = 512  # bytes that a disk writes whole
AUTOCHECKPOINT_PAGES = 60  # so that checkpoints are among what is interrupted


@dataclass
class DiskFile:
    """durable: what is on the disk for certain. pending: what was done since, in order."""

    durable: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)  # None: cut to that length
    exists: bool = False  # its name is on the disk

    def sync(self) -> None:
        for offset, data in self.pending:
            _apply(self.durable, offset, data)
        self.pending.clear()
        self.exists = True

    def after_a_cut(self, rng: random.Random) -> bytes:
        """What could be found: of what was not synced, any part may be there."""
        found = bytearray(self.durable)
        for offset, data in self.pending:
            if data is None:
                if rng.random() < 0.5:
                    _apply(found, offset, None)
                continue
            for at in range(0, len(data), SECTOR):
                if rng.random() < 0.5:
                    _apply(found, offset + at, data[at : at + SECTOR])
        return bytes(found)


@dataclass
class Disk:
    """watch: called before anything changes, and before a sync has been done."""

    watch: Callable[[], None]
    files: dict[str, DiskFile] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def after_a_cut(self, rng: random.Random) -> dict[str, bytes]:
        """The content of every file, by its name."""
        with self.lock:
            return {
                Path(path).name: file.after_a_cut(rng)
                for path, file in self.files.items()
                if file.exists or rng.random() < 0.5
            }


def _apply(content: bytearray, offset: int, data: bytes | None) -> None:
    if data is None:
        del content[offset:]
        return
    content.extend(bytes(max(0, offset - len(content))))
    content[offset : offset + len(data)] = data


class FileOnDisk(apsw.VFSFile):
    """A file that SQLite opened."""

    def __init__(self, disk: Disk, name: str | apsw.URIFilename, flags: list[int]) -> None:
        super().__init__("", name, flags)
        path = name if isinstance(name, str) else name.filename()
        self._disk = disk
        with disk.lock:
            self._file = disk.files.setdefault(path, DiskFile())

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802
        with self._disk.lock:
            self._disk.watch()
            self._file.pending.append((offset, bytes(data)))
            super().xWrite(data, offset)

    def xTruncate(self, size: int) -> None:  # noqa: N802
        with self._disk.lock:
            self._disk.watch()
            self._file.pending.append((size, None))
            super().xTruncate(size)

    def xSync(self, flags: int) -> None:  # noqa: N802
        with self._disk.lock:
            self._disk.watch()
            super().xSync(flags)
            self._file.sync()


class DiskVFS(apsw.VFS):
    """SQLite's way to the disk. It must live as long as connections through it."""

    def __init__(self, name: str, disk: Disk) -> None:
        super().__init__(name, "")
        self.name, self._disk = name, disk

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> apsw.VFSFile:  # noqa: N802
        if name is None:  # a temporary file, which nobody looks for afterwards
            return apsw.VFSFile("", name, flags)
        return FileOnDisk(self._disk, name, flags)

    def xDelete(self, name: str, sync_directory: bool) -> None:  # noqa: N802
        with self._disk.lock:
            self._disk.watch()
            super().xDelete(name, sync_directory)
            self._disk.files.pop(name, None)


class Cursor:
    """What SQLAlchemy asks of a cursor."""

    arraysize = 1

    def __init__(self, connection: apsw.Connection) -> None:
        self._connection = connection
        self.description: Sequence[Sequence[Any]] | None = None
        self.rowcount, self.lastrowid = -1, 0
        self._rows: list[tuple[Any, ...]] = []

    def execute(self, sql: str, values: Sequence[Any] = ()) -> Cursor:
        cursor = self._connection.cursor()
        cursor.exec_trace = self._describe
        self._rows = list(cursor.execute(sql, tuple(values)))
        self.rowcount, self.lastrowid = self._connection.changes(), self._connection.last_insert_rowid()
        return self

    def executemany(self, sql: str, many: Sequence[Sequence[Any]]) -> Cursor:
        for values in many:
            self.execute(sql, values)
        return self

    def _describe(self, cursor: apsw.Cursor, _sql: str, _values: Any) -> bool:
        self.description = [(*each, *(None,) * 5) for each in cursor.get_description()] or None
        return True

    def fetchone(self) -> tuple[Any, ...] | None:
        return self._rows.pop(0) if self._rows else None

    def fetchall(self) -> list[tuple[Any, ...]]:
        rows, self._rows = self._rows, []
        return rows

    def fetchmany(self, size: int = 1) -> list[tuple[Any, ...]]:
        rows, self._rows = self._rows[:size], self._rows[size:]
        return rows

    def close(self) -> None:
        self._rows = []


class Connection:
    """What SQLAlchemy asks of a connection."""

    isolation_level: str | None = None

    def __init__(self, path: str, vfs: DiskVFS) -> None:
        self._connection = apsw.Connection(path, vfs=vfs.name)
        self._connection.set_busy_timeout(2000)
        self.execute(f"PRAGMA wal_autocheckpoint={AUTOCHECKPOINT_PAGES}")

    def cursor(self) -> Cursor:
        return Cursor(self._connection)

    def execute(self, sql: str) -> Cursor:
        return self.cursor().execute(sql)

    def create_function(self, name: str, count: int, function: Any, **_options: Any) -> None:
        self._connection.create_scalar_function(name, function, count)

    def commit(self) -> None:
        if self._connection.in_transaction:
            self.execute("COMMIT")

    def rollback(self) -> None:
        if self._connection.in_transaction:
            self.execute("ROLLBACK")

    def close(self) -> None:
        self._connection.close()


def run_on(engine: Engine, vfs: DiskVFS) -> None:
    """Have an engine of SQLite make its connections on the disk."""

    @event.listens_for(engine, "do_connect")
    def connect(_dialect: Any, _record: Any, _arguments: Any, _options: Any) -> Connection:
        return Connection(str(engine.url.database), vfs)
