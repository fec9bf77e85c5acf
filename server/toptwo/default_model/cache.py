"""Directories that appear in the cache complete or not at all, made by one process at a time.

Knows locks, staging directories, free space, signals and what a full or read-only disk looks like.
Must not know what is in the directories.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from toptwo.errors import StartupError

MANIFEST = "prepared.json"

_GB = 1e9
_WAIT_SECONDS = 0.2
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_READ_ONLY = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST})


def is_complete(directory: Path) -> bool:
    """Whether every file that `publish` saw is still there with its size. Reads no file but the manifest."""
    try:
        sizes: dict[str, int] = json.loads((directory / MANIFEST).read_bytes())
        return all((directory / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def publish(staged: Path, target: Path) -> None:
    """Make the finished directory `staged` durable and give it its name, in that order."""
    files = [path for path in staged.iterdir() if path.is_file()]
    manifest = json.dumps({path.name: path.stat().st_size for path in sorted(files)}, indent=2)
    (staged / MANIFEST).write_text(manifest + "\n", "utf-8")
    for path in (*files, staged / MANIFEST, staged):
        flush(path)
    staged.rename(target)
    flush(target.parent)


def flush(path: Path) -> None:
    """Return when the file's bytes (or the directory's entries) are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def exclusive(target: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Be the only process that prepares `target`; `on_wait` is called once if another one is at it."""
    with (target.parent / f".{target.name}.lock").open("wb") as lock:
        waiting = False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waiting:
                    on_wait()
                waiting = True
                time.sleep(_WAIT_SECONDS)
        # Closing the file gives the lock back, and so does the kernel when a process dies.
        yield


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A new directory beside `target` that is gone afterwards, whatever happens. Hold `exclusive` around it.

    Staging directories of dead processes and a damaged `target` are removed first: the holder of the
    lock is the only living process that may have one.
    """
    prefix = f".{target.name}.staging-"
    for leftover in target.parent.glob(prefix + "*"):
        shutil.rmtree(leftover)
    path = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        if target.exists():
            # Renamed first, so that nobody ever sees it half removed.
            target.rename(path / "damaged")
            shutil.rmtree(path / "damaged")
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def check_free_space(directory: Path, needed_bytes: int, what: str) -> None:
    """Raise StartupError where the disk of `directory` has less than `needed_bytes` free."""
    free = shutil.disk_usage(directory).free
    if free < needed_bytes:
        raise StartupError(
            f"{what} needs {needed_bytes / _GB:.1f} GB of free disk to be prepared and {directory} has "
            f"{free / _GB:.1f} GB; free some or choose another disk with --cache-dir"
        )


@contextmanager
def disk_errors_explained(directory: Path, needed_bytes: int, what: str) -> Iterator[None]:
    """Turn an OSError into a StartupError that names the directory and says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            reason = (
                f"the disk of {directory} is full ({needed_bytes / _GB:.1f} GB are needed); "
                "free some or choose another disk with --cache-dir"
            )
        elif error.errno in _READ_ONLY:
            reason = f"cannot write to {directory} ({error.strerror}); choose another one with --cache-dir"
        else:
            reason = str(error)
        raise StartupError(f"{what} could not be prepared: {reason}") from error


@contextmanager
def termination_as_error(what: str) -> Iterator[None]:
    """Let SIGTERM raise StartupError in the block, so that it cleans up; only in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise StartupError(f"stopped by SIGTERM while {what} was being prepared; nothing was kept")

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        # None stands for a handler that Python did not install and cannot put back.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)
