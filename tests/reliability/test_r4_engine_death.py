"""R4: an engine that dies, fails or hangs under 16 streams: all are told, and it comes back."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

from reliability.figures import record
from reliability.live import Answer, chat, client_of, engine_of, serving, struck_at, watched

NUM_STREAMS, NUM_WHOLE = 16, 4
WATCHDOG_SECONDS = 11.0  # still_seconds and tick_seconds of HangPolicy
TELL_SECONDS = 2.0
BACK_SECONDS = 10.0  # on a machine that is busy with other things, twice what the server's own start took

# Steps of 30 ms, so that all requests are there before the 100th.
FAULTS = {
    "SIGKILL": ("slow@30", signal.SIGKILL),
    "SIGSTOP": ("slow@30", signal.SIGSTOP),
    "exception": ("slow@30,raise@100", None),
    "out of memory": ("slow@30,oom@100", None),
    "killed for memory": ("slow@30,kill@100", None),
    "exit with status 0": ("slow@30,exit@100", None),
    "step that never ends": ("slow@30,hang@100", None),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_every_client_is_told_and_the_engine_comes_back(fault: str, tmp_path: Path) -> None:
    faults, number = FAULTS[fault]
    allowed = TELL_SECONDS + (WATCHDOG_SECONDS if fault in ("SIGSTOP", "step that never ends") else 0)
    began = time.monotonic()
    with serving(tmp_path, "--max-num-seqs", "8", faults=faults) as server:  # the other half waits
        started = time.monotonic() - began
        async with client_of(server) as client, watched(server) as readiness:
            before = await Answer(chat(stream=True)).follow(client)
            answers = [Answer(chat(f"number {i}", stream=True, max_tokens=4000)) for i in range(NUM_STREAMS)]
            answers += [Answer(chat(f"whole {i}", max_tokens=4000)) for i in range(NUM_WHOLE)]
            following = [asyncio.create_task(answer.follow(client)) for answer in answers]
            await asyncio.gather(*(answer.accepted.wait() for answer in answers[:NUM_STREAMS]))
            await answers[0].begun.wait()
            struck = time.monotonic()
            if number:
                os.kill(engine_of(server).pid, number)
            async with asyncio.timeout(60):
                await asyncio.gather(*following)  # a connection that breaks off raises
            if not number:
                struck = struck_at(server)
            told = max(answer.error for answer in answers) - struck
            unready = await readiness.wait_for(503, struck) - struck
            back = await readiness.wait_for(200, struck + unready) - struck
            after = await Answer(chat(stream=True)).follow(client)
    lost = 0
    for answer in answers[:NUM_STREAMS]:
        lost += not (answer.status == 200 and answer.done and not answer.finish_reasons and answer.error)
        assert answer.payloads[-1]["error"]["type"] == "server_error"
    for answer in answers[NUM_STREAMS:]:
        lost += answer.status not in (500, 503)
        assert answer.payloads[-1]["error"]["type"] == "server_error"
    assert lost == 0
    assert told <= allowed
    assert unready <= allowed - TELL_SECONDS + 1
    assert back - unready <= max(BACK_SECONDS, 2 * started)
    assert after.text == before.text
    assert after.finish_reasons == ["length"]
    figure = f"told after {told:.2f} s, unready after {unready:.2f} s, serving again after {back:.1f} s"
    record("R4", f"{fault} under {len(answers)} requests", 1, lost, figure)


@pytest.mark.parametrize("fault", ["raise@3*", "exit@3*"])
async def test_an_engine_that_fails_again_and_again_ends_the_server(fault: str, tmp_path: Path) -> None:
    with serving(tmp_path, faults=fault) as server:
        began = time.monotonic()
        async with client_of(server) as client, watched(server) as readiness:
            for crash in range(3):
                ready = await readiness.wait_for(200, time.monotonic())
                answer = await Answer(chat(stream=True)).follow(client)
                assert answer.done
                assert answer.error > ready
                if crash < 2:
                    await readiness.wait_for(503, answer.error)
        status = server.process.wait(10)
    assert status == 1
    assert server.err.splitlines()[-1] == "toptwo: the engine died 3 times within 60 s; giving up"
    record(
        f"R4 {fault}",
        "3 crashes in a minute",
        3,
        0,
        f"status {status} after {time.monotonic() - began:.0f} s",
    )
