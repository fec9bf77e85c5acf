"""R6: SIGTERM lets everything that was accepted end, takes nothing new, and exits with 0."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import httpx2
import pytest

from reliability.figures import record
from reliability.live import Answer, chat, client_of, serving

NUM_STREAMS, NUM_WHOLE = 16, 4


async def test_sigterm_lets_everything_end(tmp_path: Path) -> None:
    """Streams and whole answers, running and waiting, beside connections that are kept open for nothing."""
    with serving(tmp_path, "--max-num-seqs", "6", faults="slow@10") as server:
        async with client_of(server) as client, client_of(server) as kept, client_of(server) as idle:
            for connection in (kept, idle):
                assert (await connection.get("/models")).status_code == 200
            limits = {"max_tokens": 150, "stream_options": {"include_usage": True}}
            answers = [Answer(chat(f"number {i}", stream=True, **limits)) for i in range(NUM_STREAMS)]
            answers += [Answer(chat(f"whole {i}", max_tokens=150)) for i in range(NUM_WHOLE)]
            following = [asyncio.create_task(answer.follow(client)) for answer in answers]
            await asyncio.gather(*(answer.accepted.wait() for answer in answers[:NUM_STREAMS]))
            await answers[0].begun.wait()
            told = time.monotonic()
            os.kill(server.process.pid, signal.SIGTERM)
            refused, ready = await asyncio.gather(late(kept), late_readiness(server.root))
            assert not answers[0].ended, "it all ended before anything could be refused"
            await asyncio.gather(*following)
            status = await asyncio.to_thread(server.process.wait, 10)
            gone = time.monotonic() - max(answer.ended for answer in answers)
    lost = 0
    for answer in answers[:NUM_STREAMS]:
        usage = [payload["usage"] for payload in answer.payloads if payload.get("usage")]
        lost += not (answer.done and answer.finish_reasons == ["length"] and not answer.error)
        assert [one["completion_tokens"] for one in usage] == [150]
    lost += sum(answer.status != 200 for answer in answers[NUM_STREAMS:])
    assert lost == 0
    assert refused in (0, 503)
    assert ready in (0, 503)
    assert status == 0
    assert gone <= 5
    assert "Traceback" not in server.err
    took = max(answer.ended for answer in answers) - told
    figure = f"the last ended {took:.1f} s after SIGTERM, status {status} {gone:.1f} s later"
    record("R6", f"SIGTERM under {NUM_STREAMS} streams and {NUM_WHOLE} whole answers", 1, lost, figure)


async def late(client: httpx2.AsyncClient) -> int:
    """What a request gets that comes too late on a connection that was open before; 0 for none."""
    try:
        return (await client.post("/chat/completions", json=chat())).status_code
    except httpx2.TransportError:
        return 0


async def late_readiness(root: str) -> int:
    async with httpx2.AsyncClient() as client:
        try:
            return (await client.get(f"{root}/health/ready")).status_code
        except httpx2.TransportError:
            return 0


@pytest.mark.parametrize("how", ["second SIGTERM", "limit"])
async def test_what_must_be_cut_is_told_so(how: str, tmp_path: Path) -> None:
    limit = "2" if how == "limit" else "60"
    with serving(tmp_path, "--max-num-seqs", "6", "--drain-timeout", limit, faults="slow@20") as server:
        async with client_of(server) as client:
            answers = [Answer(chat(f"{i}", stream=True, max_tokens=6000)) for i in range(NUM_STREAMS)]
            answers += [Answer(chat(f"whole {i}", max_tokens=6000)) for i in range(NUM_WHOLE)]
            following = [asyncio.create_task(answer.follow(client)) for answer in answers]
            await asyncio.gather(*(answer.accepted.wait() for answer in answers[:NUM_STREAMS]))
            await answers[0].begun.wait()
            told = time.monotonic()
            os.kill(server.process.pid, signal.SIGTERM)
            if how != "limit":
                await asyncio.sleep(0.5)
                os.kill(server.process.pid, signal.SIGTERM)
            await asyncio.gather(*following)
            status = await asyncio.to_thread(server.process.wait, 10)
            took = time.monotonic() - told
    lost = sum(not answer.done for answer in answers[:NUM_STREAMS])
    for answer in answers:
        assert answer.payloads[-1]["error"]["message"] == "the server is shutting down"
    assert lost == 0
    assert status == 0
    assert took <= (2 if how == "limit" else 0.5) + 5
    assert "Traceback" not in server.err
    record(
        f"R6 {how}", f"{how} under {len(answers)} requests", 1, lost, f"all told, status 0 after {took:.1f} s"
    )
