"""More than one answer, reports on tokens, and everything else that an answer can be asked to carry."""

from __future__ import annotations

import asyncio
import math

import httpx2
import msgspec
import openai
import pytest
from fastapi import FastAPI
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from fakes import KEY, AsgiCall, FakeEngine, Script, chat, chat_tokenizer, payloads
from toptwo.api.token_text import LEAST_LOGPROB, report_tokens
from toptwo.messages import GenerateRequest, TokenLogprobs
from toptwo.text.model import ServedModel

URL = "/v1/chat/completions"
BEARER = [("authorization", f"Bearer {KEY}")]
ANSWERS = ("hello", "he wo", "im")


@pytest.fixture
def many(engine: FakeEngine, model: ServedModel) -> FakeEngine:
    """Choice i answers ANSWERS[i]; the first is the slowest."""

    def script_of(request: GenerateRequest) -> Script:
        index = int(request.request_id.partition("-")[2].partition("-")[2] or 0)
        ids = model.tokenizer.encode([ANSWERS[index] + "<|im_end|>"])
        return Script(token_ids=ids, pause=0.001 * (3 - index), num_cached_tokens=index)

    engine.script_of = script_of
    return engine


async def test_every_choice_is_an_answer_of_its_own(http: httpx2.AsyncClient, many: FakeEngine) -> None:
    body = (await http.post(URL, json=chat(n=3, seed=5))).json()
    ChatCompletion.model_validate(body, strict=True)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert tuple(choice["message"]["content"] for choice in body["choices"]) == ANSWERS
    prompt = len(many.requests[0].prompt_ids)
    assert body["usage"]["prompt_tokens"] == prompt
    assert body["usage"]["completion_tokens"] == many.num_tokens
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    seeds = [request.sampling.seed for request in many.requests]
    assert seeds[0] == 5
    assert len(set(seeds)) == 3
    assert (await http.post(URL, json=chat(n=3, seed=5))).json()["choices"] == body["choices"]
    assert [request.sampling.seed for request in many.requests[3:]] == seeds


async def test_the_prompt_is_computed_before_others_ask_for_it(many: FakeEngine, app: FastAPI) -> None:
    many.script_of = lambda request: Script(token_ids=[65], hang_after=0)
    call = AsgiCall.post_json(URL, chat(n=3), BEARER)
    running = asyncio.create_task(call.run(app))
    await asyncio.wait_for(many.started.wait(), 5)
    await asyncio.sleep(0.02)
    assert many.num_open == 1
    call.leave()
    await asyncio.wait_for(running, 5)
    assert many.num_open == 0


async def test_choices_mix_in_a_stream_and_open_in_order(http: httpx2.AsyncClient, many: FakeEngine) -> None:
    body = chat(n=3, stream=True, stream_options={"include_usage": True})
    chunks = payloads((await http.post(URL, json=body)).text)
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)
    *chunks, last = chunks
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == many.num_tokens  # type: ignore[index]
    cached = last["usage"]["prompt_tokens_details"]  # type: ignore[index]
    assert cached == {"cached_tokens": 0}, "what the first choice found, though it ends last"
    choices = [chunk["choices"][0] for chunk in chunks]  # type: ignore[index]
    assert [c["index"] for c in choices[:3]] == [0, 1, 2]
    assert [c["delta"].get("role") for c in choices].count("assistant") == 3
    for index, answer in enumerate(ANSWERS):
        own = [c for c in choices if c["index"] == index]
        assert "".join(c["delta"].get("content", "") for c in own) == answer
        assert [c["finish_reason"] for c in own if c["finish_reason"]] == ["stop"]


async def test_the_official_accumulator_takes_many_choices(sdk: openai.AsyncOpenAI, many: FakeEngine) -> None:
    state = ChatCompletionStreamState()
    async for chunk in await sdk.chat.completions.create(
        model="org/tiny-moe", messages=[{"role": "user", "content": "hello"}], stream=True, n=3
    ):
        state.handle_chunk(chunk)
    choices = state.get_final_completion().choices
    assert tuple(choice.message.content for choice in choices) == ANSWERS


async def test_leaving_ends_every_choice(app: FastAPI, engine: FakeEngine) -> None:
    engine.script_of = lambda request: Script(token_ids=[65] * 9, hang_after=2)
    call = AsgiCall.post_json(URL, chat(n=4, stream=True), BEARER)
    running = asyncio.create_task(call.run(app))
    async with asyncio.timeout(5):
        while engine.num_open < 4 or engine.num_tokens < 8:
            await asyncio.sleep(0.001)
    call.leave()
    await asyncio.wait_for(running, 5)
    assert engine.num_open == 0
    assert len(engine.aborted) == 4


async def test_one_choice_that_fails_ends_them_all(http: httpx2.AsyncClient, engine: FakeEngine) -> None:
    def script_of(request: GenerateRequest) -> Script:
        if request.request_id.endswith("-2"):
            return Script(token_ids=[65], finish="error", error="Lost.")
        return Script(token_ids=[65] * 5, hang_after=3)

    engine.script_of = script_of
    response = await http.post(URL, json=chat(n=3))
    assert (response.status_code, response.json()["error"]["message"]) == (500, "Lost.")
    assert engine.num_open == 0


async def test_reports_on_tokens(http: httpx2.AsyncClient, engine: FakeEngine, model: ServedModel) -> None:
    ids = model.tokenizer.encode(["hello 👍"])
    engine.script = Script(token_ids=[*ids, *model.stop_token_ids])
    body = (await http.post(URL, json=chat(logprobs=True, top_logprobs=2))).json()
    ChatCompletion.model_validate(body, strict=True)
    content = body["choices"][0]["logprobs"]["content"]
    assert [one["logprob"] for one in content] == [-i / 100 for i in ids]
    assert b"".join(bytes(one["bytes"]) for one in content) == "hello 👍".encode()
    assert [[top["logprob"] for top in one["top_logprobs"]] for one in content] == [[0.0, -0.01]] * len(ids)
    streamed = payloads((await http.post(URL, json=chat(logprobs=True, top_logprobs=2, stream=True))).text)
    together = []
    for chunk in streamed:
        ChatCompletionChunk.model_validate(chunk, strict=True)
        together += (chunk["choices"][0]["logprobs"] or {"content": []})["content"]  # type: ignore[index]
    assert together == content
    assert engine.requests[0].logprobs.output == 2


async def test_no_reports_unasked_and_no_likeliest_ones(http: httpx2.AsyncClient, engine: FakeEngine) -> None:
    assert (await http.post(URL, json=chat())).json()["choices"][0]["logprobs"] is None
    body = (await http.post(URL, json=chat(logprobs=True))).json()
    assert all(one["top_logprobs"] == [] for one in body["choices"][0]["logprobs"]["content"])
    assert [request.logprobs.output for request in engine.requests] == [None, 0]


def test_an_impossible_token_has_a_number_too() -> None:
    (report,) = report_tokens(chat_tokenizer(), [65], [TokenLogprobs(-math.inf, [66], [0.0])])
    assert report.token.logprob == LEAST_LOGPROB


async def test_the_engine_learns_of_bias_lengths_and_stops(
    http: httpx2.AsyncClient, engine: FakeEngine, model: ServedModel
) -> None:
    body = chat(logit_bias={"65": -100, "66": 2.5}, min_tokens=3, stop_token_ids=[7, 8])
    assert (await http.post(URL, json=body)).status_code == 200
    (request,) = engine.requests
    assert request.sampling.logit_bias == {65: -100.0, 66: 2.5}
    assert request.sampling.min_tokens == 3
    assert request.stop_token_ids == [*model.stop_token_ids, 7, 8]


async def test_the_fingerprint_is_that_of_the_weights(http: httpx2.AsyncClient, engine: FakeEngine) -> None:
    assert engine.info
    prints = set()
    for changes in ({}, {"weights_id": "other"}, {"quantization": "int4"}, {}):
        engine.info = msgspec.structs.replace(
            engine.info, **{"weights_id": "one", "quantization": "int8", **changes}
        )
        prints.add((await http.post(URL, json=chat())).json()["system_fingerprint"])
    assert len(prints) == 3
