"""Tools and forms of answers: what the model is told, what it is held to, and how calls come back."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import openai
import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from fakes import FakeEngine, FakeGrammars, Script, chat, payloads
from toptwo.text.model import ServedModel

URL = "/v1/chat/completions"
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "Of a city.", "parameters": PARAMETERS},
    },
    {"type": "function", "function": {"name": "clock"}},
]
TWO_CALLS = (
    'Let me see. <tool_call>\n{"name": "weather", "arguments": {"city": "Łódź"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call><|im_end|>'
)


@pytest.fixture
def calling(engine: FakeEngine, model: ServedModel) -> FakeEngine:
    """An engine that says something and calls both tools."""
    engine.script = Script(token_ids=model.tokenizer.encode([TWO_CALLS]))
    return engine


def prompt_of(engine: FakeEngine, model: ServedModel, index: int = -1) -> str:
    return model.tokenizer.decode(engine.requests[index].prompt_ids)


async def test_calls_come_back_as_calls(http: httpx2.AsyncClient, calling: FakeEngine) -> None:
    body = (await http.post(URL, json=chat(tools=TOOLS))).json()
    ChatCompletion.model_validate(body, strict=True)
    (choice,) = body["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Let me see."
    calls = choice["message"]["tool_calls"]
    assert [call["function"]["name"] for call in calls] == ["weather", "clock"]
    assert [json.loads(call["function"]["arguments"]) for call in calls] == [{"city": "Łódź"}, {}]
    assert len({call["id"] for call in calls}) == 2


async def test_fragments_of_calls_rebuild_them(
    sdk: openai.AsyncOpenAI, http: httpx2.AsyncClient, calling: FakeEngine
) -> None:
    chunks = payloads((await http.post(URL, json=chat(tools=TOOLS, stream=True))).text)
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)
    state: Any = ChatCompletionStreamState(input_tools=TOOLS)  # type: ignore[arg-type]
    async for each in await sdk.chat.completions.create(
        model="org/tiny-moe", messages=[{"role": "user", "content": "hello"}], tools=TOOLS, stream=True
    ):  # type: ignore[call-overload]
        state.handle_chunk(each)
    (choice,) = state.get_final_completion().choices
    assert choice.finish_reason == "tool_calls"
    assert [json.loads(c.function.arguments) for c in choice.message.tool_calls] == [{"city": "Łódź"}, {}]
    heads = [
        call
        for chunk in chunks
        for call in chunk["choices"][0]["delta"].get("tool_calls", [])  # type: ignore[index]
        if "id" in call
    ]
    assert [head["index"] for head in heads] == [0, 1]


async def test_one_call_where_one_is_wanted(http: httpx2.AsyncClient, calling: FakeEngine) -> None:
    calling.script.pause = 0.001
    body = (await http.post(URL, json=chat(tools=TOOLS, parallel_tool_calls=False))).json()
    (call,) = body["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert body["choices"][0]["finish_reason"] == "tool_calls"
    assert calling.num_open == 0


async def test_without_tools_a_call_is_text(http: httpx2.AsyncClient, calling: FakeEngine) -> None:
    for body in (chat(), chat(tools=TOOLS, tool_choice="none")):
        (choice,) = (await http.post(URL, json=body)).json()["choices"]
        assert choice["finish_reason"] == "stop"
        assert "tool_calls" not in choice["message"]
        assert choice["message"]["content"] == TWO_CALLS.removesuffix("<|im_end|>")


async def test_the_model_is_told_of_the_tools_it_may_call(
    http: httpx2.AsyncClient, engine: FakeEngine, model: ServedModel
) -> None:
    one = {"type": "function", "function": {"name": "clock"}}
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [one]}}
    for choice, told in (
        ("auto", {"weather", "clock"}),
        ("none", set()),
        (one, {"clock"}),
        (allowed, {"clock"}),
    ):
        assert (await http.post(URL, json=chat(tools=TOOLS, tool_choice=choice))).status_code == 200
        prompt = prompt_of(engine, model)
        assert {name for name in ("weather", "clock") if f'"{name}"' in prompt} == told


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
async def test_a_forced_call_is_a_grammar(
    http: httpx2.AsyncClient, engine: FakeEngine, grammars: FakeGrammars, choice: object
) -> None:
    assert (await http.post(URL, json=chat(tools=TOOLS, tool_choice=choice))).status_code == 200
    (request,) = engine.requests
    assert request.grammar
    assert grammars.checked == [request.grammar.source]
    assert "weather" in request.grammar.source
    assert ("clock" in request.grammar.source) == (choice == "required")
    assert request.grammar.end_token_ids == tuple(request.stop_token_ids)


async def test_a_call_and_its_result_go_into_the_prompt(
    http: httpx2.AsyncClient, engine: FakeEngine, model: ServedModel
) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "sunny <|im_end|>"}]},
    ]
    assert (await http.post(URL, json=chat(messages=messages, tools=TOOLS))).status_code == 200
    prompt = prompt_of(engine, model)
    assert prompt.index('"Paris"') < prompt.index("sunny <|im_end|>")
    ends = model.tokenizer.stop_token_ids[0]
    turns = prompt.count("<|im_start|>")
    assert engine.requests[0].prompt_ids.count(ends) == turns - 1  # the result's own is text


FORMS = [
    ({"response_format": {"type": "json_object"}}, "object"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": PARAMETERS}}},
        "city",
    ),
    ({"guided_regex": "(yes|no)"}, "yes|no"),
    ({"guided_grammar": 'start: "x"+'}, "start"),
]


@pytest.mark.parametrize(("fields", "word"), FORMS, ids=[next(iter(f[0])) for f in FORMS])
async def test_a_form_is_a_grammar_that_was_checked(
    http: httpx2.AsyncClient, engine: FakeEngine, grammars: FakeGrammars, fields: dict[str, object], word: str
) -> None:
    assert (await http.post(URL, json=chat(**fields))).status_code == 200
    assert engine.requests[0].grammar
    assert word in engine.requests[0].grammar.source
    assert grammars.checked == [engine.requests[0].grammar.source]
    grammars.bad = (word,)
    response = await http.post(URL, json=chat(**fields))
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"].startswith(next(iter(fields)))
    assert "it cannot be compiled" in error["message"]
    assert len(engine.requests) == 1


async def test_a_schema_that_is_none_is_refused_before_any_check(
    http: httpx2.AsyncClient, engine: FakeEngine, grammars: FakeGrammars
) -> None:
    deep: dict[str, object] = {"type": "object"}
    for _ in range(40):
        deep = {"type": "object", "properties": {"a": deep}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}
    for body, param in (
        (chat(tools=[tool], tool_choice="required"), "tools"),
        (chat(response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": deep}}), None),
    ):
        response = await http.post(URL, json=body)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == param
    assert (engine.requests, grammars.checked) == ([], [])
