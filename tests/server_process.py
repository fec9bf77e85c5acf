"""A real `toptwo serve` process, started as a person starts it and read as a person reads it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx2

START_TIMEOUT = 120.0


@dataclass
class ServerProcess:
    """arguments: what follows `toptwo serve`. Output goes to two files in `directory`."""

    directory: Path
    arguments: list[str]
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._out, self._err = self.directory / "stdout", self.directory / "stderr"
        clean = {key: value for key, value in os.environ.items() if not key.startswith("TOPTWO_")}
        own = {f"TOPTWO_{name.upper()}_DIR": str(self.directory / name) for name in ("cache", "data")}
        clean |= {**own, **self.environment}
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "toptwo", "serve", "--port", "0", *self.arguments],
                stdout=out,
                stderr=err,
                env=clean,
                start_new_session=True,
            )

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    @property
    def url(self) -> str:
        """Base URL for OpenAI clients, from the banner."""
        return self._read(r"serving +(\S+)")

    @property
    def root(self) -> str:
        return self.url.removesuffix("/v3/openai")

    @property
    def key(self) -> str:
        """The created key, from the banner."""
        return self._read(r"key +(sk-\S+)")

    @property
    def engine_pid(self) -> int:
        """The engine process that runs now."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        assert len(children) == 1, children
        return int(children[0])

    def wait_until_ready(self) -> ServerProcess:
        deadline = time.monotonic() + START_TIMEOUT
        while "Try it" not in self.out:
            assert self.process.poll() is None, f"the server ended:\n{self.out}{self.err}"
            assert time.monotonic() < deadline, f"the server is not ready:\n{self.out}{self.err}"
            time.sleep(0.05)
        return self

    def readiness(self) -> int:
        """Status of /health/ready; 0 when nobody answers."""
        try:
            return httpx2.get(f"{self.root}/health/ready").status_code
        except httpx2.TransportError:
            return 0

    def stop(self, number: int = signal.SIGTERM, timeout: float = 30.0) -> int:
        """Signal the whole group, as a service manager does, and return the exit status."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)
        return self.process.wait(timeout)

    def kill(self) -> None:
        """Whatever is left of it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _read(self, pattern: str) -> str:
        found = re.search(pattern, self.out)
        assert found, f"{pattern!r} is not in:\n{self.out}"
        return found[1]
