"""Streams: the contract of the chunks, and that every stream ends as one."""

from __future__ import annotations

import asyncio
import json

import httpx2
import openai
import pytest
from fastapi import FastAPI
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletionChunk

from fakes import KEY, AsgiCall, FakeEngine, Script, chat, payloads
from toptwo.api import sse
from toptwo.errors import EngineDeadError
from toptwo.text.model import ServedModel

URL = "/v1/chat/completions"
BEARER = [("authorization", f"Bearer {KEY}")]


async def stream(http: httpx2.AsyncClient, **fields: object) -> list[dict[str, object]]:
    response = await http.post(URL, json=chat(stream=True, **fields))
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-accel-buffering"] == "no"
    return payloads(response.text)


@pytest.mark.parametrize("include_usage", [False, True])
async def test_the_chunks_follow_the_contract(http: httpx2.AsyncClient, include_usage: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if include_usage else {}
    chunks = await stream(http, **options)
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)
    assert len({(c["id"], c["created"], c["model"], c["system_fingerprint"]) for c in chunks}) == 1
    if include_usage:
        *chunks, last = chunks
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] == 3  # type: ignore[index]
        assert all(chunk["usage"] is None for chunk in chunks)
    else:
        assert all("usage" not in chunk for chunk in chunks)
    choices = [chunk["choices"][0] for chunk in chunks]  # type: ignore[index]
    opening, *middle, closing = choices
    assert opening["delta"]["role"] == "assistant"
    assert opening["delta"]["content"] == ""
    assert all(set(choice["delta"]) == {"content"} for choice in middle)
    assert "".join(choice["delta"]["content"] for choice in middle) == "hello wo"
    assert all(choice["finish_reason"] is None for choice in (opening, *middle))
    assert (closing["delta"], closing["finish_reason"]) == ({}, "stop")


async def test_the_official_accumulator_agrees_with_the_whole_answer(sdk: openai.AsyncOpenAI) -> None:
    state = ChatCompletionStreamState()
    chunks = await sdk.chat.completions.create(
        model="org/tiny-moe",
        messages=[{"role": "user", "content": "hello"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    async for chunk in chunks:
        state.handle_chunk(chunk)
    accumulated = state.get_final_completion()
    whole = await sdk.chat.completions.create(
        model="org/tiny-moe", messages=[{"role": "user", "content": "hello"}]
    )
    assert accumulated.choices[0].message.content == whole.choices[0].message.content
    assert accumulated.choices[0].message.role == "assistant"
    assert accumulated.choices[0].finish_reason == whole.choices[0].finish_reason
    assert accumulated.usage == whole.usage


async def test_the_official_stream_helper(sdk: openai.AsyncOpenAI) -> None:
    async with sdk.chat.completions.stream(
        model="org/tiny-moe", messages=[{"role": "user", "content": "hello"}]
    ) as events:
        completion = await events.get_final_completion()
    assert completion.choices[0].message.content == "hello wo"


async def test_stop_strings_never_show_in_a_stream(http: httpx2.AsyncClient, engine: FakeEngine) -> None:
    engine.script.pause = 0.001
    chunks = await stream(http, stop=["o w"])
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)  # type: ignore[index]
    assert text == "hell"
    assert engine.num_open == 0


async def test_an_empty_answer_is_still_a_stream(http: httpx2.AsyncClient, engine: FakeEngine) -> None:
    engine.script = Script()
    opening, closing = await stream(http)
    assert opening["choices"][0]["delta"]["role"] == "assistant"  # type: ignore[index]
    assert closing["choices"][0]["finish_reason"] == "stop"  # type: ignore[index]


async def test_waiting_tokens_come_in_one_chunk(http: httpx2.AsyncClient, engine: FakeEngine) -> None:
    engine.script = Script(token_ids=[65] * 500, finish="length", burst=True)
    assert len(await stream(http)) < 10


async def test_no_chunk_has_half_a_character(
    http: httpx2.AsyncClient, engine: FakeEngine, model: ServedModel
) -> None:
    engine.script = Script(token_ids=model.tokenizer.encode(["a👍é👩‍💻"]), finish="length", pause=0.001)
    chunks = await stream(http)
    texts = [c["choices"][0]["delta"].get("content", "") for c in chunks]  # type: ignore[index]
    assert "".join(texts) == "a👍é👩‍💻"
    assert "\ufffd" not in "".join(texts)


FAILURES = {
    "error event": Script(token_ids=[65, 66], finish="error", error="The engine was lost."),
    "exception": Script(token_ids=[65, 66, 67], raises=RuntimeError("secret"), raises_after=2),
    "no terminal event": Script(token_ids=[65, 66], finish=None),
    "abort": Script(token_ids=[65, 66], finish="abort"),
}


@pytest.mark.parametrize("name", FAILURES)
async def test_a_failure_in_the_middle_is_an_error_event(
    http: httpx2.AsyncClient, sdk: openai.AsyncOpenAI, engine: FakeEngine, model: ServedModel, name: str
) -> None:
    engine.script = FAILURES[name]
    engine.script.pause = 0.001
    engine_text = model.tokenizer.decode([65, 66])
    *chunks, error = await stream(http)
    text = "".join(c["choices"][0]["delta"]["content"] for c in chunks)  # type: ignore[index]
    assert text == engine_text
    assert error["error"]["type"] == "server_error"  # type: ignore[index]
    assert "secret" not in json.dumps(error)
    with pytest.raises(openai.APIError):
        async for _ in await sdk.chat.completions.create(
            model="org/tiny-moe", messages=[{"role": "user", "content": "hello"}], stream=True
        ):
            pass
    assert engine.num_open == 0


@pytest.mark.parametrize("name", FAILURES)
async def test_a_failure_of_a_whole_answer_is_a_500(
    http: httpx2.AsyncClient, engine: FakeEngine, name: str
) -> None:
    engine.script = FAILURES[name]
    response = await http.post(URL, json=chat())
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "secret" not in response.text


async def test_an_engine_that_dies_before_the_first_token(
    http: httpx2.AsyncClient, engine: FakeEngine
) -> None:
    engine.script = Script(raises=EngineDeadError("gone"))
    response = await http.post(URL, json=chat())
    assert response.status_code == 503
    assert response.headers["retry-after"] == "5"
    (error,) = await stream(http)
    assert error["error"]["code"] == "engine_unavailable"  # type: ignore[index]


async def test_a_silent_engine_is_covered_by_comments(
    app: FastAPI, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sse, "PING_SECONDS", 0.02)
    engine.script.pause = 0.1
    call = AsgiCall.post_json(URL, chat(stream=True), BEARER)
    await asyncio.wait_for(call.run(app), 5)
    text = call.answer.decode()
    assert text.startswith(": keep-alive\n\n")
    assert len(payloads(text)) >= 4


async def test_headers_do_not_wait_for_the_first_token(app: FastAPI, engine: FakeEngine) -> None:
    engine.script = Script(hang_after=0)
    call = AsgiCall.post_json(URL, chat(stream=True), BEARER)
    running = asyncio.create_task(call.run(app))
    await asyncio.wait_for(engine.started.wait(), 5)
    await asyncio.sleep(0.01)
    assert call.status == 200
    call.leave()
    await asyncio.wait_for(running, 5)
