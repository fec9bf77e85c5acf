"""A hang is told from a long step: real engine processes that stop, wait or compute for ever."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from engine_processes import collect, request, supervised
from toptwo.engine.supervisor import RestartPolicy
from toptwo.engine.watchdog import HangPolicy, effort_of
from toptwo.errors import StartupError

HASTY = HangPolicy(
    still_seconds=1.0, step_seconds=2.0, load_still_seconds=1.0, load_seconds=2.0, tick_seconds=0.1
)
PATIENT = HangPolicy(still_seconds=1.0, step_seconds=60.0, tick_seconds=0.1)


@pytest.fixture
def logs() -> Iterator[list[dict[str, object]]]:
    with capture_logs() as captured:
        yield captured  # type: ignore[misc]


def reasons(logs: list[dict[str, object]]) -> list[object]:
    return [line["reason"] for line in logs if line["event"] == "engine hangs"]


@pytest.mark.parametrize("mode", ["sleep-in-step", "spin-in-step", "SIGSTOP"])
async def test_a_hang_ends_every_stream_and_the_engine_comes_back(
    tmp_path: Path, mode: str, logs: list[dict[str, object]]
) -> None:
    fake = "slow" if mode == "SIGSTOP" else mode
    async with supervised(tmp_path, fake, hang_policy=HASTY) as (supervisor, _):
        await supervisor.client.ready.wait()
        first = supervisor.pid
        assert first is not None
        answers = [asyncio.create_task(collect(supervisor, request(f"r{i}", [i], 900))) for i in range(12)]
        await asyncio.sleep(0.2)
        if mode == "SIGSTOP":
            os.kill(first, signal.SIGSTOP)
        async with asyncio.timeout(10):
            for events in await asyncio.gather(*answers):
                assert events[-1].finish_reason == "error"
            while supervisor.pid in (first, None):
                await asyncio.sleep(0.02)
            await supervisor.client.ready.wait()
            if fake == "slow":
                assert (await collect(supervisor, request("again", [1], 3)))[-1].finish_reason == "length"
    (reason,) = reasons(logs)
    found_late, found_early = "it has not answered for 2 s", "it has neither answered nor computed for 1 s"
    # On a busy machine what is left of a sleeping process may be seen to have computed.
    assert reason == found_late or (mode != "spin-in-step" and reason == found_early)


async def test_a_long_step_is_no_hang(tmp_path: Path, logs: list[dict[str, object]]) -> None:
    async with supervised(tmp_path, "slow-step", hang_policy=PATIENT) as (supervisor, _):
        await supervisor.client.ready.wait()
        began = time.monotonic()
        events = await collect(supervisor, request("r", [1], 20))
        assert events[-1].finish_reason == "length"
        assert time.monotonic() - began > 2
    assert reasons(logs) == []


async def test_what_once_took_long_may_take_long_again(tmp_path: Path, logs: list[dict[str, object]]) -> None:
    """The step of 3 s is over the 2 s that any may take, but not over 20 times what one took before."""
    async with supervised(tmp_path, "slow-step", hang_policy=HASTY) as (supervisor, _):
        await supervisor.client.ready.wait()
        pid = supervisor.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(0.7)
        os.kill(pid, signal.SIGCONT)
        await asyncio.sleep(0.5)
        assert (await collect(supervisor, request("r", [1], 20)))[-1].finish_reason == "length"
    assert reasons(logs) == []


async def test_an_idle_engine_is_no_hanging_one(tmp_path: Path, logs: list[dict[str, object]]) -> None:
    async with supervised(tmp_path, hang_policy=HASTY) as (supervisor, _):
        await supervisor.client.ready.wait()
        pid = supervisor.pid
        await asyncio.sleep(3)
        assert supervisor.pid == pid
        assert (await collect(supervisor, request("r", [1], 3)))[-1].finish_reason == "length"
    assert reasons(logs) == []


async def test_time_in_which_we_were_stopped_is_not_held_against_the_engine(
    tmp_path: Path, logs: list[dict[str, object]]
) -> None:
    async with supervised(tmp_path, "slow", hang_policy=HASTY) as (supervisor, _):
        await supervisor.client.ready.wait()
        answer = asyncio.create_task(collect(supervisor, request("r", [1], 90)))
        await asyncio.sleep(0.2)
        time.sleep(3)  # as if this whole process were stopped, and its loop with it
        assert (await answer)[-1].finish_reason == "length"
    assert reasons(logs) == []


@pytest.mark.parametrize("mode", ["sleep-in-load", "spin-in-load"])
async def test_a_server_whose_engine_hangs_while_it_loads_does_not_start(tmp_path: Path, mode: str) -> None:
    why = "neither answered nor computed for 1 s" if mode == "sleep-in-load" else "not answered for [0-9.]+ s"
    began = time.monotonic()
    async with supervised(tmp_path, mode, hang_policy=replace(HASTY, times_longest=1.0)) as (_, running):
        with pytest.raises(StartupError, match=f"the engine was killed: it has {why} while it loaded"):
            await running
    assert 1 < time.monotonic() - began < 10
    assert list(tmp_path.iterdir()) == []


async def test_an_engine_that_loads_slowly_is_waited_for(
    tmp_path: Path, logs: list[dict[str, object]]
) -> None:
    async with supervised(tmp_path, "slow-load", hang_policy=HASTY) as (supervisor, _):
        async with asyncio.timeout(10):
            await supervisor.client.ready.wait()
        assert (await collect(supervisor, request("r", [1], 3)))[-1].finish_reason == "length"
    assert reasons(logs) == []


async def test_engines_that_hang_while_they_load_are_given_up(tmp_path: Path) -> None:
    """However long each of them takes to be found out."""
    policy = RestartPolicy(max_crashes=2, window=0.5)
    async with supervised(tmp_path, "sleep-in-reload", policy, HASTY) as (supervisor, running):
        await supervisor.client.ready.wait()
        assert supervisor.pid is not None
        os.kill(supervisor.pid, signal.SIGKILL)
        with pytest.raises(StartupError, match="2 engines in a row never got ready; giving up"):
            await running


def test_computing_is_effort_and_waiting_is_none() -> None:
    before = effort_of(os.getpid())
    assert before is not None
    until = time.process_time() + 0.2
    while time.process_time() < until:
        pass
    after = effort_of(os.getpid())
    assert after is not None
    assert 15 <= after - before < 200
    assert effort_of(2**22 + 1) is None
