"""The embedded server, started for a measurement and gone after it: `toptwo serve` in a process of its own.

Knows how to read that command's output; must not import the server.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from toptwo.errors import StartupError

POLL_SECONDS = 0.05
STOP_SECONDS = 20.0  # nobody waits for an answer any more, so that draining takes no time
_SERVING = re.compile(r"^\s*serving\s+(https?://\S+)", re.MULTILINE)


@dataclass(frozen=True)
class EmbeddedServer:
    """A running server: where it is, and the key that it accepts."""

    url: str
    key: str


@contextlib.contextmanager
def embedded_server(arguments: Sequence[str], tell: Callable[[str], None]) -> Iterator[EmbeddedServer]:
    """Start `toptwo serve` with these arguments, on a free port, and stop it at the end, whatever that is.

    tell: is given the last line of what the server says while it starts.
    Raises StartupError when it does not start.
    """
    key = secrets.token_urlsafe(24)
    command = [sys.executable, "-P", "-m", "toptwo", "serve", "--port", "0", "--api-key", key, *arguments]
    with _signals_as_exit(), tempfile.TemporaryDirectory(prefix="toptwo-bench-") as directory:
        said, complained = Path(directory, "stdout"), Path(directory, "stderr")
        with said.open("wb") as out, complained.open("wb") as err:
            # A session of its own: Ctrl-C is for us, and the server must outlive it until we have told it.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
            )
        try:
            yield EmbeddedServer(_wait_for_url(process, said, complained, tell), key)
        finally:
            _stop(process)


def _wait_for_url(
    process: subprocess.Popen[bytes], said: Path, complained: Path, tell: Callable[[str], None]
) -> str:
    """The URL in the banner, which is printed when the server is ready."""
    while True:
        ended = process.poll()
        text = said.read_text(errors="replace")
        if found := _SERVING.search(text):
            return found[1]
        if ended is not None:
            reason = _last_line(complained.read_text(errors="replace")).removeprefix("toptwo: ")
            raise StartupError(f"the embedded server ended with status {ended}: {reason or 'without a word'}")
        tell(_last_line(text))
        time.sleep(POLL_SECONDS)


def _last_line(text: str) -> str:
    """The last line that says something; usage errors are drawn in boxes."""
    lines = [line.strip(" │╭╮╰╯─") for line in text.splitlines()]
    return next((line for line in reversed(lines) if line), "")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM drains, a second one cuts what is still open."""
    try:
        for _ in range(2):
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
                return
    finally:
        process.kill()  # also when we are interrupted here; it does nothing to a process that has ended
        process.wait()


@contextlib.contextmanager
def _signals_as_exit() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end us as an exception does, so that the server is stopped."""

    def leave(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    previous = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
