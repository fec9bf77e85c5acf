"""The inside of an engine process: private, deaf to signals meant for its parent, gone with it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from pathlib import Path

PR_SET_PDEATHSIG = 1


def bind_to_parent() -> None:
    """End this process when standard input closes, which also happens when the parent is killed.

    On Linux the kernel is asked as well, for a parent killed while this process is stuck in native
    code. Call it first of all.
    """
    # Ctrl-C and service managers signal the whole group. The parent then drains, which needs this
    # process alive, and ends it afterwards by closing the pipe.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def read_config() -> bytes:
    """The configuration line that the supervisor writes to standard input, which is watched from then on.

    Ends this process when there is none: the parent was killed before it could write it.
    """
    line = sys.stdin.buffer.readline()
    if not line.endswith(b"\n"):
        os._exit(0)
    threading.Thread(target=_exit_at_end_of_input, name="parent-watch", daemon=True).start()
    return line


def explain_failure(socket_path: Path, reason: str) -> None:
    """Tell the supervisor in one line why this process could not start."""
    _explanation_path(socket_path).write_text(reason)


def read_explanation(socket_path: Path) -> str | None:
    """The supervisor's side of `explain_failure`; the explanation is taken away."""
    path = _explanation_path(socket_path)
    try:
        reason = path.read_text()
        path.unlink()
    except FileNotFoundError:
        return None
    return reason


def report_progress(socket_path: Path, done: int, total: int) -> None:
    """Tell the supervisor how far the loading is: who tells nothing for long is taken for hung."""
    progress_path(socket_path).write_text(f"{done}/{total}")


def read_progress(socket_path: Path) -> str | None:
    """The supervisor's side of `report_progress`; None when nothing was reported."""
    try:
        return progress_path(socket_path).read_text()
    except FileNotFoundError:
        return None


def progress_path(socket_path: Path) -> Path:
    """Where a process that loads notes how far it is."""
    return socket_path.with_suffix(".progress")


def _explanation_path(socket_path: Path) -> Path:
    return socket_path.with_suffix(".failure")


def _exit_at_end_of_input() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os._exit(0)
