"""Waist 1 for real: client and supervisor against engine processes with a fake model."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import stat
from pathlib import Path

import pytest
import zmq
from structlog.testing import capture_logs

from engine_processes import PATIENT, collect, request, supervised
from fake_runner import generate
from toptwo.engine.transport import EngineSocket
from toptwo.errors import EngineDeadError, StartupError


async def test_requests_are_answered_side_by_side(tmp_path: Path) -> None:
    async with supervised(tmp_path) as (supervisor, _):
        await supervisor.client.ready.wait()
        wanted = [request(f"r{i}", [i, 1, 2], 20) for i in range(20)]
        answers = await asyncio.gather(*(collect(supervisor, one) for one in wanted))
        for one, events in zip(wanted, answers, strict=True):
            got = [token for event in events for token in event.token_ids]
            assert got == generate(one.prompt_ids, 20)
            assert [event.finish_reason for event in events[:-1]] == [None] * (len(events) - 1)
            assert events[-1].finish_reason == "length"
        assert supervisor.client.num_open == 0


async def test_closing_the_generator_aborts_and_frees(tmp_path: Path) -> None:
    async with supervised(tmp_path, "slow") as (supervisor, _):
        await supervisor.client.ready.wait()
        # More than the engine can run at once, so that the last one waits for an abort to work.
        streams = [supervisor.client.generate(request(f"r{i}", [i], 1000)) for i in range(8)]
        for stream in streams:
            await anext(stream)
        waiting = asyncio.create_task(collect(supervisor, request("last", [9], 2)))
        await asyncio.sleep(0.3)
        assert not waiting.done()
        await streams[0].aclose()
        async with asyncio.timeout(2):
            assert (await waiting)[-1].finish_reason == "length"
        for stream in streams[1:]:
            await stream.aclose()


async def test_a_refused_request_gets_its_one_terminal_event(tmp_path: Path) -> None:
    async with supervised(tmp_path) as (supervisor, _):
        await supervisor.client.ready.wait()
        events = await collect(supervisor, request("r", [1] * 2000))
        assert [event.finish_reason for event in events] == ["error"]
        assert "over the context of 1024" in (events[0].error or "")


@pytest.mark.parametrize("how", [signal.SIGKILL, "crash-in-step"])
async def test_engine_death_ends_every_stream_and_the_engine_comes_back(
    tmp_path: Path, how: signal.Signals | str
) -> None:
    mode = how if isinstance(how, str) else "slow"
    async with supervised(tmp_path, mode) as (supervisor, _):
        await supervisor.client.ready.wait()
        first = supervisor.pid
        answers = [asyncio.create_task(collect(supervisor, request(f"r{i}", [i], 900))) for i in range(12)]
        await asyncio.sleep(0.2)
        if not isinstance(how, str):
            assert first is not None
            os.kill(first, how)
        async with asyncio.timeout(5):
            for events in await asyncio.gather(*answers):
                assert events[-1].finish_reason == "error"
                assert events[-1].error
                assert all(event.finish_reason is None for event in events[:-1])
            while supervisor.pid in (first, None):
                await asyncio.sleep(0.02)
            await supervisor.client.ready.wait()
            assert (await collect(supervisor, request("again", [1], 3)))[-1].finish_reason == "length"


async def test_without_an_engine_requests_fail_at_once(tmp_path: Path) -> None:
    async with supervised(tmp_path) as (supervisor, _):
        assert supervisor.client.info is None
        with pytest.raises(EngineDeadError):
            await collect(supervisor, request("r", [1]))


async def test_an_engine_that_keeps_dying_is_given_up(tmp_path: Path) -> None:
    async with supervised(tmp_path, policy=PATIENT) as (supervisor, running):
        for _ in range(3):
            await supervisor.client.ready.wait()
            pid = supervisor.pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            while supervisor.pid == pid and not running.done():
                await asyncio.sleep(0.01)
        with pytest.raises(StartupError, match="died 3 times within 60 s"):
            await running


async def test_an_engine_that_cannot_start_is_not_tried_again(tmp_path: Path) -> None:
    async with supervised(tmp_path, "crash-on-start") as (_, running):
        with pytest.raises(StartupError, match="the engine ended with status 1"):
            await running


async def test_an_engine_says_in_its_own_words_why_it_cannot_start(tmp_path: Path) -> None:
    async with supervised(tmp_path, "cannot-load") as (_, running):
        with pytest.raises(StartupError, match=r"^there is no such tensor$"):
            await running
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("mode", "status"), [("cannot-load", 1), ("bad-model", 2), ("silent-2", 1), ("crash-on-start", 1)]
)
async def test_whether_the_model_is_to_blame_is_passed_on(tmp_path: Path, mode: str, status: int) -> None:
    async with supervised(tmp_path, mode) as (_, running):
        with pytest.raises(StartupError) as caught:
            await running
    assert caught.value.exit_code == status


async def test_an_engine_that_dies_while_it_restarts_is_one_crash_more_and_no_end(tmp_path: Path) -> None:
    async with supervised(tmp_path) as (supervisor, running):
        await supervisor.client.ready.wait()
        for _ in range(2):
            pid = supervisor.pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            while supervisor.pid in (pid, None):
                await asyncio.sleep(0.001)
        async with asyncio.timeout(5):
            await supervisor.client.ready.wait()
        assert not running.done()


async def test_a_request_without_valid_logits_ends_alone(tmp_path: Path) -> None:
    async with supervised(tmp_path, "nonsense") as (supervisor, _):
        await supervisor.client.ready.wait()
        bad, good = await asyncio.gather(
            collect(supervisor, request("bad", [13, 1])), collect(supervisor, request("good", [12, 1]))
        )
        assert [event.finish_reason for event in bad] == ["error"]
        assert good[-1].finish_reason == "length"


async def test_ending_all_requests_frees_them_in_the_engine(tmp_path: Path) -> None:
    async with supervised(tmp_path, "slow") as (supervisor, _):
        await supervisor.client.ready.wait()
        running = [asyncio.create_task(collect(supervisor, request(f"r{i}", [i], 900))) for i in range(8)]
        await asyncio.sleep(0.2)
        await supervisor.client.end_all("closing time")
        async with asyncio.timeout(2):
            for events in await asyncio.gather(*running):
                assert (events[-1].finish_reason, events[-1].error) == ("error", "closing time")
            # All eight slots are needed for this one to be served at once.
            assert (await collect(supervisor, request("next", [1], 2)))[-1].finish_reason == "length"


async def test_stopping_ends_the_process(tmp_path: Path) -> None:
    async with supervised(tmp_path) as (supervisor, running):
        await supervisor.client.ready.wait()
        pid = supervisor.pid
        await supervisor.stop()
        await running
        assert pid is not None
        assert not Path(f"/proc/{pid}").exists()
        assert list(tmp_path.iterdir()) == []


async def test_stopping_while_an_engine_is_being_started_ends_that_one_too(tmp_path: Path) -> None:
    async with supervised(tmp_path) as (supervisor, running):
        await asyncio.sleep(0)  # the process is asked for, and not there yet
        assert supervisor.pid is None
        await supervisor.stop()
        async with asyncio.timeout(5):
            await running
        assert supervisor.pid is None


async def test_the_engine_outlives_signals_but_not_its_parent(tmp_path: Path) -> None:
    async with supervised(tmp_path) as (supervisor, _):
        await supervisor.client.ready.wait()
        process = supervisor._process
        assert process is not None
        assert process.stdin is not None
        for number in (signal.SIGINT, signal.SIGTERM):
            process.send_signal(number)
        assert (await collect(supervisor, request("r", [1])))[-1].finish_reason == "length"
        supervisor._stopping = True
        process.stdin.close()  # what the kernel does when the parent is killed
        async with asyncio.timeout(5):
            assert await process.wait() == 0


def test_the_socket_is_private_and_drops_what_it_cannot_read(tmp_path: Path) -> None:
    path = tmp_path / "engine.sock"
    endpoint = EngineSocket(path)
    stranger = zmq.Context.instance().socket(zmq.DEALER)
    stranger.linger = 0
    try:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        stranger.connect(f"ipc://{path}")
        for frames in ([pickle.dumps(print)], [b""], [b"\x00" * 100], [b"a", b"b", b"c"]):
            stranger.send_multipart(frames)
            with capture_logs():
                assert endpoint.receive(block=True) is None
    finally:
        stranger.close()
        endpoint.close()
