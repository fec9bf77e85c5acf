"""Keeps an engine process alive: start, connect the client, restart when it dies or hangs, give up in time.

Knows processes and the client; must not know what the engine process does inside.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import structlog

from toptwo.engine.client import EngineClient
from toptwo.engine.process import progress_path, read_explanation, read_progress
from toptwo.engine.watchdog import WATCHFUL, HangPolicy, wait_until_hung
from toptwo.errors import CheckpointError, StartupError
from toptwo.messages import EngineInfo

log = structlog.get_logger()


@dataclass(frozen=True)
class RestartPolicy:
    """Give up after `max_crashes` within `window` seconds, or of engines that in a row never got ready."""

    max_crashes: int = 3
    window: float = 60.0


PATIENT = RestartPolicy()


@dataclass(frozen=True)
class EngineCommand:
    """How to start an engine process; the path of its socket is added to the arguments.

    configure: its configuration, one line for its standard input. It is given what the first engine
        resolved its settings to, once that is known, so that a restart changes nothing.
    """

    arguments: list[str]
    environment: dict[str, str]
    configure: Callable[[EngineInfo | None], bytes]


class _End(NamedTuple):
    """How a process ended: its exit status, a word on why, if there is one, and whether it was ever ready."""

    status: int
    reason: str | None
    was_ready: bool


class Supervisor:
    """Runs an engine as long as it is wanted.

    run_dir: private directory for the sockets; each process gets a new one, so that nothing of a
    dead engine can reach its successor's clients.
    """

    def __init__(
        self,
        command: EngineCommand,
        run_dir: Path,
        policy: RestartPolicy = PATIENT,
        hang_policy: HangPolicy = WATCHFUL,
    ) -> None:
        self.client = EngineClient()
        self._command = command
        self._run_dir = run_dir
        self._policy = policy
        self._hang_policy = hang_policy
        self._crashes: deque[float] = deque(maxlen=policy.max_crashes)
        self._num_unready = 0  # engines in a row
        self._generation = 0
        self._first_info: EngineInfo | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = False

    @property
    def pid(self) -> int | None:
        """Process id of the engine that runs now."""
        return self._process.pid if self._process and self._process.returncode is None else None

    async def run(self) -> None:
        """Until `stop`. Raises StartupError when the first engine cannot start, or engines keep dying."""
        while not self._stopping:
            end = await self._run_once()
            if self._stopping:  # set by `stop` while the process ran
                return  # type: ignore[unreachable]
            reason = end.reason or f"the engine ended with status {end.status}"
            if self._first_info is None:
                # Python has uses of its own for that status, but then nothing is told.
                blames_model = end.reason and end.status == CheckpointError.exit_code
                raise CheckpointError(reason) if blames_model else StartupError(reason)
            log.error("engine died", reason=reason)
            self._crashes.append(time.monotonic())
            self._num_unready = 0 if end.was_ready else self._num_unready + 1
            if len(self._crashes) == self._policy.max_crashes and self._within_window():
                raise StartupError(
                    f"the engine died {len(self._crashes)} times within {self._policy.window:g} s; giving up"
                )
            if self._num_unready == self._policy.max_crashes:
                raise StartupError(f"{self._num_unready} engines in a row never got ready; giving up")

    async def stop(self, timeout: float = 5.0) -> None:
        """End the engine process: first by closing its standard input, then by force."""
        self._stopping = True
        process = self._process
        if process is None or process.returncode is not None:
            return
        if process.stdin:
            process.stdin.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await process.wait()
                return
        process.kill()
        await process.wait()

    def _within_window(self) -> bool:
        return self._crashes[-1] - self._crashes[0] <= self._policy.window

    async def _run_once(self) -> _End:
        """One engine process from start to end."""
        self._generation += 1
        path = self._run_dir / f"engine-{self._generation}.sock"
        process = await asyncio.create_subprocess_exec(
            *self._command.arguments,
            str(path),
            stdin=asyncio.subprocess.PIPE,
            env=self._command.environment,
            start_new_session=True,  # a terminal's Ctrl-C is for the parent alone
        )
        self._process = process
        if self._stopping:  # `stop` came while the process was being started, and saw none to end
            process.kill()
        watching = asyncio.create_task(self._watch(process, path), name="engine watchdog")
        try:
            # It died at once; RuntimeError is uvloop's word for a pipe that is closed.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError, RuntimeError):
                assert process.stdin is not None  # noqa: S101
                process.stdin.write(self._command.configure(self._first_info) + b"\n")
                await process.stdin.drain()
            await self.client.connect(path)
            status = await process.wait()
            self._first_info = self._first_info or self.client.info
            reason = watching.result() if watching.done() else read_explanation(path)
            return _End(status, reason, was_ready=self.client.info is not None)
        finally:
            watching.cancel()
            await self.client.disconnect("the engine stopped while it worked on this request")
            for left in (path, progress_path(path)):
                left.unlink(missing_ok=True)
            if process.returncode is None:
                process.kill()
                await process.wait()

    async def _watch(self, process: asyncio.subprocess.Process, path: Path) -> str:
        """Kill the engine when it hangs, and say why; what follows is that of any other death."""

        progress = partial(read_progress, path)
        reason = await wait_until_hung(self.client, process.pid, progress, self._hang_policy)
        log.error("engine hangs", reason=reason)
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        return f"the engine was killed: {reason}"
