"""Supervisors with fake engines behind them, for tests of waist 1."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from toptwo.engine.supervisor import EngineCommand, RestartPolicy, Supervisor
from toptwo.engine.watchdog import WATCHFUL, HangPolicy
from toptwo.messages import EngineInfo, GenerateRequest, SamplingParams, TokenEvent

PATIENT = RestartPolicy(max_crashes=3, window=60)
FAKE_ENGINE = Path(__file__).parent / "engine" / "fake_engine.py"


def request(name: str, prompt: list[int], max_tokens: int = 5) -> GenerateRequest:
    return GenerateRequest(name, prompt, SamplingParams(seed=0), max_tokens)


def configure(resolved: EngineInfo | None) -> bytes:
    return b"the configuration" + (b", again" if resolved else b"")


@contextlib.asynccontextmanager
async def supervised(
    run_dir: Path,
    mode: str = "serve",
    policy: RestartPolicy = PATIENT,
    hang_policy: HangPolicy = WATCHFUL,
) -> AsyncIterator[tuple[Supervisor, asyncio.Task[None]]]:
    """A supervisor with a fake engine, stopped at the end."""
    environment = "import sys; sys.path.insert(0, sys.argv.pop(1)); import runpy; sys.argv.pop(0); "
    command = [sys.executable, "-c", environment + "runpy.run_path(sys.argv[0], run_name='__main__')"]
    command += [str(FAKE_ENGINE.parent.parent), str(FAKE_ENGINE), mode]
    described = EngineCommand(command, dict(os.environ), configure)
    supervisor = Supervisor(described, run_dir, policy, hang_policy)
    running = asyncio.create_task(supervisor.run())
    try:
        yield supervisor, running
    finally:
        await supervisor.stop()
        await asyncio.gather(running, return_exceptions=True)


async def collect(supervisor: Supervisor, wanted: GenerateRequest) -> list[TokenEvent]:
    return [event async for event in supervisor.client.generate(wanted)]
