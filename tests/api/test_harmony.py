"""A model that speaks Harmony, behind every endpoint: thoughts, texts, calls and forms come out as ever."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from fakes import FakeEngine, FakeGrammars, Script, chat, payloads
from harmony_model import harmony_model
from toptwo.text.model import ServedModel

URL = "/v1/chat/completions"
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
THOUGHT = "<|channel|>analysis<|message|>The user greets.<|end|><|start|>assistant"
ANSWER = f"{THOUGHT}<|channel|>final<|message|>Hello. Łódź!<|return|>"
CALL = (
    f"{THOUGHT}<|channel|>commentary<|message|>Let me see.<|end|><|start|>assistant"
    '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Łódź"}<|call|>'
)


@pytest.fixture(scope="module")
def model() -> ServedModel:
    return harmony_model()


@pytest.fixture
def engine(model: ServedModel) -> FakeEngine:
    """Thinks, then answers."""
    return FakeEngine(Script(token_ids=model.tokenizer.encode([ANSWER])))


def says(engine: FakeEngine, model: ServedModel, text: str) -> None:
    engine.script = Script(token_ids=model.tokenizer.encode([text]))


def prompt_of(engine: FakeEngine, model: ServedModel) -> str:
    return model.tokenizer.decode(engine.requests[-1].prompt_ids)


async def test_an_answer(http: httpx2.AsyncClient, engine: FakeEngine, model: ServedModel) -> None:
    body = (await http.post(URL, json=chat())).json()
    ChatCompletion.model_validate(body, strict=True)
    (choice,) = body["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["content"] == "Hello. Łódź!"
    assert choice["message"]["reasoning_content"] == "The user greets."
    thought_tokens = len(model.tokenizer.encode(["The user greets.<|end|>"]))
    assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] == thought_tokens
    assert body["usage"]["completion_tokens"] == len(engine.script.token_ids)
    (request,) = engine.requests
    ends = ["<|endoftext|>", "<|return|>", "<|call|>"]
    assert sorted(request.stop_token_ids) == sorted(model.tokenizer.id_of(end) for end in ends)  # type: ignore[type-var]
    assert prompt_of(engine, model).endswith("<|start|>user<|message|>hello<|end|><|start|>assistant")


async def test_a_stream_is_the_answer(http: httpx2.AsyncClient) -> None:
    chunks = payloads((await http.post(URL, json=chat(stream=True))).text)
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)
    deltas: list[dict[str, Any]] = [chunk["choices"][0]["delta"] for chunk in chunks]  # type: ignore[index]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "The user greets."
    assert "".join(delta.get("content") or "" for delta in deltas) == "Hello. Łódź!"


async def test_a_call(sdk: openai.AsyncOpenAI, engine: FakeEngine, model: ServedModel) -> None:
    says(engine, model, CALL)
    answer = await sdk.chat.completions.create(
        model="org/tiny-moe",
        messages=[{"role": "user", "content": "hello"}],
        tools=TOOLS,  # type: ignore[arg-type]
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    assert choice.message.tool_calls
    ((called),) = choice.message.tool_calls
    assert called.type == "function"
    assert (called.function.name, json.loads(called.function.arguments)) == ("weather", {"city": "Łódź"})
    assert "type weather = () => any;" in prompt_of(engine, model)


async def test_a_call_and_its_thought_go_back_into_the_prompt(
    http: httpx2.AsyncClient, engine: FakeEngine, model: ServedModel
) -> None:
    says(engine, model, CALL)
    message = (await http.post(URL, json=chat(tools=TOOLS))).json()["choices"][0]["message"]
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "<|end|> rain"}
    messages = [{"role": "user", "content": "hello"}, message, result]
    assert (await http.post(URL, json=chat(messages=messages, tools=TOOLS))).status_code == 200
    prompt = prompt_of(engine, model)
    thought = "<|channel|>analysis<|message|>The user greets.\n\nLet me see.<|end|>"
    called = ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Łódź"}<|call|>'
    assert prompt.index(thought) < prompt.index(called) < prompt.index('"<|end|> rain"')
    assert engine.requests[-1].prompt_ids.count(model.tokenizer.id_of("<|call|>")) == 1


async def test_thoughts_may_stay_in_the_text(http: httpx2.AsyncClient) -> None:
    (choice,) = (await http.post(URL, json=chat(separate_reasoning=False))).json()["choices"]
    assert choice["message"]["content"] == "The user greets.\n\nHello. Łódź!"
    assert "reasoning_content" not in choice["message"]


async def test_stop_strings_end_the_text_and_nothing_else(
    http: httpx2.AsyncClient, engine: FakeEngine
) -> None:
    engine.script.pause = 0.001
    (choice,) = (await http.post(URL, json=chat(stop=[".", "final"]))).json()["choices"]
    assert choice["message"]["content"] == "Hello"
    assert choice["message"]["reasoning_content"] == "The user greets."
    assert choice["finish_reason"] == "stop"
    assert len(engine.aborted) == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_object"}},
        {"guided_regex": "Hello.*"},
        {"guided_grammar": 'start: "x"'},
        {"tools": TOOLS, "tool_choice": "required"},
    ],
    ids=lambda fields: next(iter(fields)),
)
async def test_a_form_leaves_room_for_thoughts(
    http: httpx2.AsyncClient, engine: FakeEngine, grammars: FakeGrammars, fields: dict[str, object]
) -> None:
    (choice,) = (await http.post(URL, json=chat(**fields))).json()["choices"]
    assert choice["message"]["reasoning_content"] == "The user greets."
    (request,) = engine.requests
    assert request.grammar
    assert request.grammar.end_token_ids == tuple(request.stop_token_ids)
    assert grammars.checked == [request.grammar.source]
    assert "thought" in request.grammar.source


async def test_efforts(http: httpx2.AsyncClient, engine: FakeEngine, model: ServedModel) -> None:
    for body in (chat(reasoning_effort="low"), chat(chat_template_kwargs={"reasoning_effort": "low"})):
        response = await http.post(URL, json=body)
        assert response.status_code == 200
        assert "x-toptwo-ignored" not in response.headers
        assert "\nReasoning: low\n" in prompt_of(engine, model)
    assert (await http.post(URL, json=chat())).status_code == 200
    assert "\nReasoning: medium\n" in prompt_of(engine, model)
    for effort in ("none", "minimal", "xhigh", "max"):
        response = await http.post(URL, json=chat(reasoning_effort=effort))
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, "reasoning_effort")
        assert error["code"] == "unsupported_parameter"
        assert "low, medium, high" in error["message"]


async def test_responses(http: httpx2.AsyncClient, engine: FakeEngine, model: ServedModel) -> None:
    ask = {"model": "org/tiny-moe", "input": "hello"}
    response = await http.post("/v1/responses", json={**ask, "reasoning": {"effort": "high"}})
    assert "x-toptwo-ignored" not in response.headers
    thought, message = response.json()["output"]
    assert thought["content"] == [{"type": "reasoning_text", "text": "The user greets."}]
    assert message["content"][0]["text"] == "Hello. Łódź!"
    assert "\nReasoning: high\n" in prompt_of(engine, model)
    refused = await http.post("/v1/responses", json={**ask, "reasoning": {"effort": "minimal"}})
    error = refused.json()["error"]
    assert (refused.status_code, error["param"]) == (400, "reasoning.effort")
    assert "'reasoning.effort'" in error["message"]


async def test_messages(http: httpx2.AsyncClient, engine: FakeEngine, model: ServedModel) -> None:
    says(engine, model, CALL)
    ask = {
        "model": "org/tiny-moe",
        "max_tokens": 500,
        "messages": [{"role": "user", "content": "hello"}],
        "tools": [{"name": "weather", "input_schema": {"type": "object"}}],
        "thinking": {"type": "enabled", "budget_tokens": 1024},
    }
    body = (await http.post("/v1/messages", json={**ask, "max_tokens": 1500})).json()
    assert [block["type"] for block in body["content"]] == ["thinking", "text", "tool_use"]
    assert body["content"][2]["input"] == {"city": "Łódź"}
    assert body["stop_reason"] == "tool_use"


async def test_raw_prompts_are_the_callers_affair(http: httpx2.AsyncClient) -> None:
    body = {"model": "org/tiny-moe", "prompt": "<|start|>assistant", "max_tokens": 500}
    (choice,) = (await http.post("/v1/completions", json=body)).json()["choices"]
    assert choice["text"] == "analysisThe user greets.assistantfinalHello. Łódź!"
