"""R5: whenever the server is killed, nothing that it has started outlives it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from pathlib import Path

import httpx2
import psutil
import pytest

from reliability.figures import record
from reliability.live import Answer, chat, checkpoint, client_of, engine_of, serving
from server_process import ServerProcess

BAR_SECONDS = 5.0
HUNGRY = {"allOf": [{"type": "string", "pattern": f".*a.{{{i}}}"} for i in range(20)]}  # minutes of compiling


def schema_format(schema: dict[str, object]) -> dict[str, object]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


async def wait_until_busy(process: psutil.Process) -> None:
    idle = process.cpu_times().user
    async with asyncio.timeout(20):
        while process.cpu_times().user < idle + 0.1:
            await asyncio.sleep(0.01)


def wait_for_death(processes: list[psutil.Process]) -> float:
    """Seconds until all are gone, or waited for by whoever inherited them."""
    began = time.monotonic()
    for process in processes:
        while alive(process):
            assert time.monotonic() - began < 30, f"{process} outlives its parent"
            time.sleep(0.01)
    return time.monotonic() - began


def alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


async def test_engine_and_busy_grammar_checker_end_with_the_server(tmp_path: Path) -> None:
    with serving(tmp_path, faults="slow@20") as server:
        async with client_of(server) as client:
            simple = await client.post(
                "/chat/completions", json=chat(response_format={"type": "json_object"})
            )
            assert simple.status_code == 200
            children = psutil.Process(server.process.pid).children(recursive=True)
            (checker,) = [child for child in children if "toptwo.text.grammar_worker" in child.cmdline()]
            streams = [Answer(chat(f"{i}", stream=True, max_tokens=2000)) for i in range(4)]
            hungry = Answer(chat(response_format=schema_format(HUNGRY)))
            following = [asyncio.create_task(stream.follow(client)) for stream in streams]
            await asyncio.gather(*(stream.begun.wait() for stream in streams))
            following.append(asyncio.create_task(hungry.follow(client)))
            await wait_until_busy(checker)
            os.kill(server.process.pid, signal.SIGKILL)
            seconds = await asyncio.to_thread(wait_for_death, children)
            broken = await asyncio.gather(*following, return_exceptions=True)
    assert all(isinstance(one, httpx2.TransportError) for one in broken)
    assert seconds <= BAR_SECONDS
    figure = f"the last child gone after {seconds:.2f} s"
    record("R5", f"SIGKILL of the API process with {len(children)} busy children", 1, 0, figure)


@pytest.mark.parametrize("step", ["hang@20", "SIGSTOP"])
async def test_a_hanging_engine_ends_with_the_server(step: str, tmp_path: Path) -> None:
    with serving(tmp_path, faults="slow@10" if step == "SIGSTOP" else step) as server:
        async with client_of(server) as client:
            answer = Answer(chat(stream=True, max_tokens=2000))
            following = asyncio.create_task(answer.follow(client))
            await answer.begun.wait()
            engine = engine_of(server)
            if step == "SIGSTOP":
                engine.suspend()
            os.kill(server.process.pid, signal.SIGKILL)
            seconds = await asyncio.to_thread(wait_for_death, [engine])
            await asyncio.gather(following, return_exceptions=True)
    assert seconds <= BAR_SECONDS
    record(
        f"R5 {step}", f"SIGKILL of the API process, its engine in {step}", 1, 0, f"gone after {seconds:.2f} s"
    )


@pytest.mark.parametrize("moment", [0.0, 0.3, 1.0, 2.0])
def test_an_engine_that_loads_ends_with_the_server(moment: float, tmp_path: Path) -> None:
    server = ServerProcess(tmp_path, [str(checkpoint()), "--threads", "1"])
    try:
        me = psutil.Process(server.process.pid)
        deadline = time.monotonic() + 30
        while not (children := me.children(recursive=True)):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(moment)
        os.kill(server.process.pid, signal.SIGKILL)
        seconds = wait_for_death(children)
    finally:
        server.kill()
    assert seconds <= BAR_SECONDS
    assert "Traceback" not in server.err
    what = f"SIGKILL of the API process {moment:g} s after it started its engine"
    record("R5", what, 1, 0, f"gone after {seconds:.2f} s")
