"""Output that appears complete or not at all, and the bar that is shown while it is made."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from toptwo.default_model.cache import flush, termination_as_error
from toptwo.errors import StartupError


@contextmanager
def appearing(out: Path, needed_bytes: int) -> Iterator[Path]:
    """A name beside `out` for a file or directory. It becomes `out` at the end, or is removed where it fails.

    Raises StartupError where the disk has less than `needed_bytes` free, or cannot be written.
    """
    staged = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        free = shutil.disk_usage(out.parent).free
        if free < needed_bytes:
            raise StartupError(
                f"{out}: needs {needed_bytes / 1e9:.1f} GB of free disk, and there are {free / 1e9:.1f} GB"
            )
        with termination_as_error(str(out)):
            yield staged
            for path in (*staged.glob("*"), staged):
                flush(path)
            staged.replace(out)
    except OSError as error:
        raise StartupError(f"{out}: could not be written: {error.strerror or error}") from error
    finally:
        if staged.is_dir():
            shutil.rmtree(staged)
        else:
            staged.unlink(missing_ok=True)


@contextmanager
def progress(console: Console) -> Iterator[Progress]:
    """A bar in bytes."""
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as bar:
        yield bar
