"""The database: how it is opened, and the one thread that writes to it.

All writes go through one queue. Whatever waits in it is committed together, so that many requests share the
disk's slowest act, and nobody is told of a write before it is on the disk. Reads have a thread of their own.

Knows SQLAlchemy's engines and threads; must not know what is written.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import sqlalchemy
import structlog
from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError

from toptwo.errors import StartupError

log = structlog.get_logger()

Result = TypeVar("Result")
Item = TypeVar("Item")

BUSY_SECONDS = 2.0  # how long a write waits for somebody else's
RETRY_SECONDS = 1.0  # between attempts at what has to be written in the end
CLOSE_SECONDS = 5.0
PATIENCE_SECONDS = 0.02  # for what nobody waits for: it is committed with the next that somebody does
MOST_DEADLOCKS = 5  # in a row: servers that write to the same accounts may meet, and one has to begin anew
_DEADLOCK = "40P01"  # PostgreSQL's word for it
_MOST_AT_ONCE = 256
_Outcome = tuple[Any, Exception | None]  # the result of a write, or why there is none
_READING = "reading"


class DatabaseUnavailableError(Exception):
    """The database cannot be read or written now: locked, full, read-only or gone."""


def open_engine(url: str) -> Engine:
    """An engine for sqlite:///path or postgresql://…. Nothing is connected yet. Raises StartupError."""
    try:
        parsed = sqlalchemy.make_url(url)
        if parsed.get_backend_name() == "sqlite":
            return _open_sqlite(parsed)
        if parsed.get_backend_name() == "postgresql":
            return _open_postgresql(parsed)
    except (SQLAlchemyError, ValueError):
        raise StartupError("--database-url: this is no URL of a database") from None
    except ModuleNotFoundError:
        raise StartupError(
            "--database-url: PostgreSQL needs a driver: pip install 'toptwo[postgresql]'"
        ) from None
    raise StartupError("--database-url: only sqlite:///path and postgresql://… are supported")


def _open_sqlite(url: URL) -> Engine:
    if not url.database or url.database == ":memory:":
        raise StartupError("--database-url: a database in memory would forget every key; name a file")
    engine = sqlalchemy.create_engine(
        url.set(drivername="sqlite+pysqlite"),
        connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False},
    )

    @event.listens_for(engine, "connect")
    def configure(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # the driver begins no transactions by itself
        # FULL: what has been acknowledged survives a power cut too.
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}").close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A writer says so at once: one that began by reading could not wait for its turn.
        reads = connection.get_execution_options().get(_READING)
        connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")

    return engine


def _open_postgresql(url: URL) -> Engine:
    milliseconds = int(BUSY_SECONDS * 1000)
    return sqlalchemy.create_engine(
        url.set(drivername="postgresql+psycopg"),
        pool_pre_ping=True,  # a server that was restarted meanwhile is connected to again
        connect_args={
            "connect_timeout": int(BUSY_SECONDS),
            "options": f"-c lock_timeout={milliseconds} -c statement_timeout={10 * milliseconds}",
        },
    )


def create_directory(url: str) -> None:
    """Make the directory of an SQLite file, readable by its owner alone. Raises StartupError."""
    parsed = sqlalchemy.make_url(url)
    if parsed.get_backend_name() != "sqlite" or not parsed.database:
        return
    path = Path(parsed.database)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError as error:
        raise StartupError(f"{path}: accounts cannot be kept there: {error.strerror}") from None


@dataclass(frozen=True)
class ForMany(Generic[Item, Result]):
    """Work that can be done for many at once, and is, for all of a kind that wait.

    do: given items, it returns their results in their order, or raises where not all of them can be done.
    """

    do: Callable[[Connection, Sequence[Item]], Sequence[Result]]
    item: Item

    def __call__(self, connection: Connection) -> Result:
        """The work for this one alone."""
        return self.do(connection, [self.item])[0]


@dataclass
class _Write:
    """One piece of work. persistent: it is tried again until it has been written."""

    work: Callable[[Connection], Any]
    future: Future[Any]
    persistent: bool
    begun: bool = False

    def begin(self) -> bool:
        """Whether it is still wanted: whoever waits for it may have left before its turn came."""
        self.begun = self.begun or self.future.set_running_or_notify_cancel()
        return self.begun


class Database:
    """Reads and writes of one process. Every callable gets a connection inside a transaction.

    A write that raises leaves nothing behind, and does not harm those that it is committed with. It may be
    called several times, the last of which counts.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._file = _FileWatch.of(engine)
        self._queue: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="accounts-read")
        self._writer = threading.Thread(target=self._write_all, name="accounts-write", daemon=True)
        self._writer.start()

    def write(self, work: Callable[[Connection], Result], *, persistent: bool = False) -> Future[Result]:
        """Its result, once it is on the disk. Raises DatabaseUnavailableError, or what `work` raises."""
        future: Future[Result] = Future()
        self._queue.put(_Write(work, future, persistent))
        return future

    def read(self, work: Callable[[Connection], Result]) -> Future[Result]:
        """Its result. Raises DatabaseUnavailableError, or what `work` raises."""
        return self._reader.submit(self._read, work)

    def close(self) -> None:
        """Write what waits, for so long as that is sensible, and let go of the database."""
        self._queue.put(None)
        self._writer.join(CLOSE_SECONDS + BUSY_SECONDS)
        self._reader.shutdown()
        self._engine.dispose()

    def _read(self, work: Callable[[Connection], Result]) -> Result:
        with _unavailable_when_broken():
            self._file.check()
            with self._engine.connect().execution_options(**{_READING: True}) as connection:
                return work(connection)

    def _write_all(self) -> None:
        kept: list[_Write] = []
        closing = None
        while closing is None or kept:
            batch, told_to_close = self._next(kept, closing is not None)
            if told_to_close:
                closing = time.monotonic() + CLOSE_SECONDS
            kept = self._commit(batch)
            if closing is not None and kept and time.monotonic() > closing:
                log.error("writes were given up", writes=len(kept))
                return

    def _next(self, kept: list[_Write], closing: bool) -> tuple[list[_Write], bool]:
        """What to commit together, that which failed before first; and whether there is no more to come."""
        batch = list(kept)
        with contextlib.suppress(queue.Empty):
            if kept:
                time.sleep(RETRY_SECONDS / 4 if closing else 0)
            first = self._queue.get(timeout=RETRY_SECONDS) if kept else self._queue.get()
            until = time.monotonic() + PATIENCE_SECONDS
            while first is not None:
                batch.append(first)
                if len(batch) >= _MOST_AT_ONCE + len(kept):
                    return batch, False
                can_wait = until - time.monotonic() if first.persistent else 0
                first = self._queue.get(timeout=can_wait) if can_wait > 0 else self._queue.get_nowait()
            return batch, True
        return batch, False

    def _commit(self, batch: list[_Write]) -> list[_Write]:
        """Commit all of it. What could not be written and must be in the end is returned."""
        batch = [write for write in batch if write.begin()]
        if not batch:
            return []
        try:
            with _unavailable_when_broken():
                self._file.check()
                outcomes = self._write_batch(batch)
        except DatabaseUnavailableError as error:
            for write in batch:
                if not write.persistent:
                    write.future.set_exception(error)
            return [write for write in batch if write.persistent]
        for write, (result, failure) in zip(batch, outcomes, strict=True):
            if failure is not None:
                write.future.set_exception(failure)
            else:
                write.future.set_result(result)
        return []

    def _write_batch(self, batch: list[_Write]) -> list[_Outcome]:
        for _ in range(MOST_DEADLOCKS):
            try:
                return self._together(batch) or self._apart(batch)
            except DBAPIError as error:
                if getattr(error.orig, "sqlstate", None) != _DEADLOCK:
                    raise
        raise DatabaseUnavailableError("deadlocks")

    def _together(self, batch: list[_Write]) -> list[_Outcome] | None:
        """All of it in one go, which is the fastest; None, and nothing done, where one of them fails."""
        try:
            with self._engine.begin() as connection:
                results = _do_all(connection, [write.work for write in batch])
            return [(result, None) for result in results]
        except Exception as error:
            if _is_the_databases(error):
                raise
            return None

    def _apart(self, batch: list[_Write]) -> list[_Outcome]:
        """Each by itself, so that one that fails takes nobody along, and then one commit."""
        with self._engine.begin() as connection:
            return [_attempt(connection, write.work) for write in batch]


def _do_all(connection: Connection, works: Sequence[Callable[[Connection], Any]]) -> list[Any]:
    """The results of all, in their order; those of a kind are done together, and first."""
    results: list[Any] = [None] * len(works)
    kinds: dict[Callable[..., Sequence[Any]], list[tuple[int, Any]]] = {}
    for index, work in enumerate(works):
        if isinstance(work, ForMany):
            kinds.setdefault(work.do, []).append((index, work.item))
    for do, of_kind in kinds.items():
        done = do(connection, [item for _, item in of_kind])
        for (index, _), result in zip(of_kind, done, strict=True):
            results[index] = result
    for index, work in enumerate(works):
        if not isinstance(work, ForMany):
            results[index] = work(connection)
    return results


def _attempt(connection: Connection, work: Callable[[Connection], Any]) -> _Outcome:
    """The result of one write of many, or why it did not come about. Raises what is the database's fault."""
    try:
        with connection.begin_nested():
            return work(connection), None
    except Exception as error:
        if _is_the_databases(error):
            raise
        return None, error


def _is_the_databases(error: Exception) -> bool:
    """Whether it says that the database cannot be used, and not that this cannot be done with it."""
    if isinstance(error, DBAPIError):
        return not isinstance(error, IntegrityError)
    return isinstance(error, DatabaseUnavailableError)


@contextlib.contextmanager
def _unavailable_when_broken() -> Iterator[None]:
    try:
        yield
    except (SQLAlchemyError, OSError) as error:
        # The statement and its values are nobody's business: the cause says what is wrong.
        first = _first_of(error)
        cause = str(getattr(first, "orig", None) or type(first).__name__).strip().partition("\n")[0]
        log.error("the accounts' database cannot be used", cause=cause)
        raise DatabaseUnavailableError(cause) from None


def _first_of(error: BaseException) -> BaseException:
    """What went wrong first: after some errors SQLite has ended the transaction that one goes on to end."""
    first, before = error, error.__context__
    while before is not None:
        first = before if isinstance(before, DBAPIError) else first
        before = before.__context__
    return first


@dataclass
class _FileWatch:
    """An SQLite file, which somebody might remove: writing to what nobody will find again would be no use."""

    path: Path | None
    identity: tuple[int, int] | None = None

    @classmethod
    def of(cls, engine: Engine) -> _FileWatch:
        """That of an engine; PostgreSQL looks after its own files."""
        return cls(Path(engine.url.database or "") if engine.dialect.name == "sqlite" else None)

    def check(self) -> None:
        """Raises DatabaseUnavailableError when the file is gone, or is another one."""
        if self.path is None:
            return
        try:
            found = self.path.stat()
        except OSError as error:
            raise DatabaseUnavailableError(f"{self.path}: {error.strerror}") from None
        identity = found.st_dev, found.st_ino
        if self.identity is None:
            self.identity = identity
        elif identity != self.identity:
            raise DatabaseUnavailableError(f"{self.path}: it was replaced while it was in use")
