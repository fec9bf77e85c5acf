"""Tool calls. The model is random: a call under "required" or of a named tool is the grammar's doing."""

from __future__ import annotations

import json
from typing import Any, Literal

import httpx2
import openai
import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel, ConfigDict, Field
from strict import ask, events, validate


class Weather(BaseModel):
    """Weather of a city."""

    model_config = ConfigDict(extra="forbid", strict=True)

    city: Literal["Oslo", "Lima"]
    days: int = Field(ge=1, le=5)


class Clock(BaseModel):
    """Time in a zone."""

    model_config = ConfigDict(extra="forbid", strict=True)

    zone: Literal["UTC", "CET"]


MODELS: dict[str, type[BaseModel]] = {"weather": Weather, "clock": Clock}


def functions() -> list[dict[str, Any]]:
    """The two tools, as a request names them."""
    return [
        {
            "type": "function",
            "function": {"name": name, "description": kind.__doc__, "parameters": kind.model_json_schema()},
        }
        for name, kind in MODELS.items()
    ]


def request(model: str, **options: Any) -> dict[str, Any]:
    return {
        "model": model,
        "messages": ask("weather?"),
        "tools": functions(),
        "max_tokens": 3000,
        "parallel_tool_calls": False,
        **options,
    }


def check_calls(body: ChatCompletion) -> list[str]:
    """Names of the calls, whose arguments all obey their schemas."""
    calls = body.choices[0].message.tool_calls or []
    assert calls
    assert len({call.id for call in calls}) == len(calls)
    names = []
    for call in calls:
        assert call.type == "function"
        MODELS[call.function.name].model_validate_json(call.function.arguments)
        names.append(call.function.name)
    return names


def post(http: httpx2.Client, body: dict[str, Any]) -> ChatCompletion:
    answer = http.post("/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return validate(ChatCompletion, answer.content)


def test_required_is_a_call(http: httpx2.Client, model: str) -> None:
    for seed in range(3):
        body = post(http, request(model, tool_choice="required", seed=seed))
        assert len(check_calls(body)) == 1
        assert body.choices[0].finish_reason == "tool_calls"
        assert not body.choices[0].message.content


def test_several_calls_at_once(http: httpx2.Client, model: str) -> None:
    """A random model need not end; whatever it calls must be valid, or cut at max_tokens."""
    wanted = request(model, tool_choice="required", parallel_tool_calls=True, max_tokens=400, seed=1)
    body = post(http, wanted)
    if body.choices[0].finish_reason == "length":
        calls = body.choices[0].message.tool_calls or []
        del calls[-1:]
    if body.choices[0].message.tool_calls:
        check_calls(body)


@pytest.mark.parametrize("name", MODELS)
def test_a_named_tool_is_called(http: httpx2.Client, model: str, name: str) -> None:
    body = post(http, request(model, tool_choice={"type": "function", "function": {"name": name}}))
    assert check_calls(body) == [name]
    assert body.choices[0].finish_reason in ("tool_calls", "stop")  # OpenAI's own answer here is "stop"


def test_allowed_tools_are_called(http: httpx2.Client, model: str) -> None:
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "clock"}}]}
    body = post(http, request(model, tool_choice={"type": "allowed_tools", "allowed_tools": allowed}))
    assert check_calls(body) == ["clock"]


@pytest.mark.parametrize("choice", ["none", "auto"])
def test_without_force_a_random_model_talks(http: httpx2.Client, model: str, choice: str) -> None:
    body = post(http, request(model, tool_choice=choice, max_tokens=30))
    assert body.choices[0].message.content
    assert not body.choices[0].message.tool_calls


def test_streamed_fragments_make_a_call(http: httpx2.Client, model: str) -> None:
    wanted = request(model, tool_choice="required", seed=5)
    state: ChatCompletionStreamState[None] = ChatCompletionStreamState()
    fragments = []
    for event in events(http.post("/chat/completions", json=wanted | {"stream": True})):
        chunk = validate(ChatCompletionChunk, event)
        fragments += [call for choice in chunk.choices for call in choice.delta.tool_calls or ()]
        state.handle_chunk(chunk)
    first, *rest = fragments
    assert first.id
    assert first.type == "function"
    assert first.function is not None
    assert first.function.name in MODELS
    assert rest
    assert all(call.index == 0 and call.id is None and call.type is None for call in rest)
    assert all(call.function and call.function.name is None for call in rest)
    rebuilt = state.current_completion_snapshot.choices[0]
    whole = post(http, wanted).choices[0]
    assert rebuilt.finish_reason == whole.finish_reason == "tool_calls"
    assert rebuilt.message.tool_calls and whole.message.tool_calls  # noqa: PT018
    assert rebuilt.message.tool_calls[0].function.arguments == whole.message.tool_calls[0].function.arguments  # type: ignore[union-attr]


def test_parse_reads_the_arguments(client: openai.OpenAI, model: str) -> None:
    body = client.chat.completions.parse(
        model=model,
        messages=ask("weather?"),
        tools=[openai.pydantic_function_tool(Weather)],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=3000,
    )
    (call,) = body.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Weather)


def test_a_result_can_be_sent_back(http: httpx2.Client, model: str) -> None:
    body = json.loads(http.post("/chat/completions", json=request(model, tool_choice="required")).text)
    said = body["choices"][0]["message"]
    result = {"role": "tool", "tool_call_id": said["tool_calls"][0]["id"], "content": '{"sky": "clear"}'}
    wanted = request(model, tool_choice="none", max_tokens=5)
    assert post(http, wanted | {"messages": [*ask("weather?"), said, result]}).choices[0].message.content


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "nobody"}}}, "tool_choice"),
        ({"tool_choice": "required", "tools": []}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "no good name"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
    ],
)
def test_tools_that_make_no_sense_are_refused(
    client: openai.OpenAI, model: str, change: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        client.chat.completions.create(**request(model) | change)
    assert refusal.value.param == param
