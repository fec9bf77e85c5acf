"""The power goes amid changes: all that was acknowledged is on the disk, whatever was not synced."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from sqlalchemy import event
from sqlalchemy.exc import SQLAlchemyError

from accounts.crashing import work
from accounts.power_cut import Disk, DiskVFS, run_on
from accounts.test_crashes import check_books, is_true
from toptwo.accounts.database import Database, create_directory, open_engine
from toptwo.accounts.migrations import migrate
from toptwo.accounts.store import NotFoundError

CUTS = 200
CHANGES = 150
EVERY = 6  # of so many changes of the disk one is cut short


@dataclass
class Cut:
    """What had been acknowledged when the power went, and what the disk held then."""

    said: list[str]
    files: dict[str, bytes]


@dataclass
class Machine:
    """Works, and loses its power now and then; what is kept is how it would be found."""

    rng: random.Random
    said: list[str] = field(default_factory=list)
    cuts: list[Cut] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.disk = Disk(self.look)

    def look(self) -> None:
        if self.said and self.rng.random() < 1 / EVERY:
            said = list(self.said)
            self.cuts.append(Cut(said, self.disk.after_a_cut(self.rng)))

    def run(self, url: str, synchronous: str) -> None:
        create_directory(url)
        engine = open_engine(url)
        vfs = DiskVFS(f"powercut-{id(self)}", self.disk)
        run_on(engine, vfs)

        @event.listens_for(engine, "connect")
        def configure(connection: object, _record: object) -> None:
            connection.execute(f"PRAGMA synchronous={synchronous}")  # type: ignore[attr-defined]

        migrate(engine)
        database = Database(engine)
        for said in islice(work(database, 0), CHANGES):
            self.said.append(said)
        database.close()


def is_whole(cut: Cut, directory: Path) -> bool:
    """Whether what was found after a cut opens, and holds all that was acknowledged."""
    directory.mkdir()
    for name, content in cut.files.items():
        (directory / name).write_bytes(content)
    engine = open_engine(f"sqlite:///{directory}/accounts.db")
    try:
        with engine.connect() as connection:
            assert connection.exec_driver_sql("PRAGMA integrity_check").scalar_one() == "ok"
            if not all(is_true(connection, *said.split()) for said in cut.said):
                return False
            check_books(connection)
        return True
    except (NotFoundError, SQLAlchemyError):
        return False  # an account, a key or a whole table is not there
    finally:
        engine.dispose()


def test_what_was_acknowledged_survives_power_cuts(tmp_path: Path) -> None:
    machine = Machine(random.Random(5))
    machine.run(f"sqlite:///{tmp_path}/accounts.db", "FULL")
    assert len(machine.cuts) >= CUTS
    lost = [
        number for number, cut in enumerate(machine.cuts) if not is_whole(cut, tmp_path / f"cut-{number}")
    ]
    print(f"{len(machine.cuts)} power cuts in {CHANGES} acknowledged changes, {len(lost)} lost any of them")
    assert lost == []


def test_the_disk_forgets_what_is_not_synced(tmp_path: Path) -> None:
    """With less care than ours, SQLite's own NORMAL, the same disk loses what was acknowledged."""
    machine = Machine(random.Random(5))
    machine.run(f"sqlite:///{tmp_path}/accounts.db", "NORMAL")
    assert not all(is_whole(cut, tmp_path / f"cut-{number}") for number, cut in enumerate(machine.cuts))
