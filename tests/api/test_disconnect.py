"""Clients that leave: whatever they were waiting for, the engine is told to stop."""

from __future__ import annotations

import asyncio

import pytest
from fastapi import FastAPI

from fakes import KEY, AsgiCall, FakeEngine, Script, chat

URL = "/v1/chat/completions"
BEARER = [("authorization", f"Bearer {KEY}")]
STREAM = pytest.mark.parametrize("stream", [True, False])


async def leave_when(app: FastAPI, engine: FakeEngine, call: AsgiCall, ready: asyncio.Event) -> None:
    """Run the call, hang up once `ready` is set, and wait for the engine to be told."""
    running = asyncio.create_task(call.run(app))
    await asyncio.wait_for(ready.wait(), 5)
    call.leave()
    await asyncio.wait_for(running, 5)
    await asyncio.wait_for(engine.closed.wait(), 5)


@STREAM
@pytest.mark.parametrize("slow_close", [0.0, 0.05])
async def test_leaving_during_the_prompt_aborts(
    app: FastAPI, engine: FakeEngine, stream: bool, slow_close: float
) -> None:
    engine.script = Script(hang_after=0)
    engine.slow_close = slow_close
    call = AsgiCall.post_json(URL, chat(stream=stream), BEARER)
    await leave_when(app, engine, call, engine.started)
    assert engine.aborted == [engine.requests[0].request_id]
    assert engine.num_open == 0


@STREAM
async def test_leaving_in_the_middle_aborts(app: FastAPI, engine: FakeEngine, stream: bool) -> None:
    engine.script = Script(token_ids=[65] * 100_000, pause=0.001)
    call = AsgiCall.post_json(URL, chat(stream=stream), BEARER)
    await leave_when(app, engine, call, call.first_bytes if stream else engine.started)
    count = engine.num_tokens
    await asyncio.sleep(0.02)
    assert engine.num_tokens == count
    assert engine.aborted == [engine.requests[0].request_id]


@STREAM
async def test_a_cancelled_server_task_aborts(app: FastAPI, engine: FakeEngine, stream: bool) -> None:
    engine.script = Script(hang_after=0)
    engine.slow_close = 0.02
    call = AsgiCall.post_json(URL, chat(stream=stream), BEARER)
    running = asyncio.create_task(call.run(app))
    await asyncio.wait_for(engine.started.wait(), 5)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert (engine.num_open, len(engine.aborted)) == (0, 1)


@STREAM
async def test_leaving_before_the_engine_is_asked(app: FastAPI, engine: FakeEngine, stream: bool) -> None:
    call = AsgiCall.post_json(URL, chat(stream=stream), BEARER)
    call.leave()
    await asyncio.wait_for(call.run(app), 5)
    assert engine.num_open == 0
    assert len(engine.aborted) == len(engine.requests)


async def test_leaving_in_the_middle_of_the_body(app: FastAPI, engine: FakeEngine) -> None:
    call = AsgiCall("POST", URL, BEARER, b'{"model": ')
    call.more_body = True
    call.leave()
    await asyncio.wait_for(call.run(app), 5)
    assert call.status == 499
    assert engine.requests == []


async def test_many_leave_at_random_points(app: FastAPI, engine: FakeEngine) -> None:
    engine.script = Script(token_ids=[65] * 20, pause=0.001)

    async def visit(number: int) -> None:
        call = AsgiCall.post_json(URL, chat(stream=number % 2 == 0), BEARER)
        running = asyncio.create_task(call.run(app))
        await asyncio.sleep(number % 17 * 0.002)
        call.leave()
        await running

    before = len(asyncio.all_tasks())
    await asyncio.wait_for(asyncio.gather(*(visit(number) for number in range(100))), 30)
    assert engine.num_open == 0
    async with asyncio.timeout(5):  # what a thread has begun it ends, though nobody waits for it
        while len(asyncio.all_tasks()) > before:
            await asyncio.sleep(0.001)
