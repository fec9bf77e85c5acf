"""The responses endpoint: whole, streamed, with functions and with a form."""

from __future__ import annotations

import json
from typing import Any, Literal

import httpx2
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter
from strict import EXTENSIONS, extra_fields, validate

FUNCTION: dict[str, Any] = {
    "type": "function",
    "name": "clock",
    "description": "Time in a zone.",
    "parameters": {
        "type": "object",
        "properties": {"zone": {"type": "string", "enum": ["UTC", "CET"]}},
        "required": ["zone"],
        "additionalProperties": False,
    },
    "strict": True,
}


class Colour(BaseModel):
    colour: Literal["red", "green", "blue"]


FORM: dict[str, Any] = {
    "format": {
        "type": "json_schema",
        "name": "colour",
        "strict": True,
        "schema": {**Colour.model_json_schema(), "additionalProperties": False},
    }
}


def create(http: httpx2.Client, model: str, **options: Any) -> Response:
    answer = http.post("/responses", json={"model": model, "input": "hello", "store": False, **options})
    assert answer.status_code == 200, answer.text
    return validate(Response, answer.content)


def stream(http: httpx2.Client, model: str, **options: Any) -> list[ResponseStreamEvent]:
    """The events, each under its own name in the stream, numbered from 0."""
    given = {"model": model, "input": "hello", "store": False, "stream": True, **options}
    answer = http.post("/responses", json=given)
    assert answer.status_code == 200, answer.text
    adapter: TypeAdapter[ResponseStreamEvent] = TypeAdapter(ResponseStreamEvent)
    found = []
    for block in answer.text.split("\n\n"):
        lines = [line for line in block.split("\n") if line and not line.startswith(":")]
        if not lines or lines == ["data: [DONE]"]:
            continue
        name, data = (line.partition(": ")[2] for line in lines)
        event = adapter.validate_json(data, strict=True)
        assert event.type == name
        unexpected = {path.rpartition(".")[2] for path in extra_fields(event)} - EXTENSIONS
        if event.type == "response.function_call_arguments.done":
            unexpected -= {"name"}  # which earlier releases of the client ask for
        assert not unexpected, data
        found.append(event)
    assert [event.sequence_number for event in found] == list(range(len(found)))
    return found


def test_a_text(http: httpx2.Client, model: str) -> None:
    body = create(http, model, max_output_tokens=16, temperature=0)
    assert body.object == "response"
    assert body.status == "incomplete"
    assert body.incomplete_details is not None
    assert body.incomplete_details.reason == "max_output_tokens"
    assert body.output_text
    assert body.usage is not None
    assert body.usage.output_tokens == 16
    assert body.usage.total_tokens == body.usage.input_tokens + 16


def test_the_sync_client(client: openai.OpenAI, model: str) -> None:
    body = client.responses.create(
        model=model,
        instructions="Be brief.",
        input=[{"role": "user", "content": [{"type": "input_text", "text": "hello"}]}],
        max_output_tokens=16,
    )
    assert body.output[0].type == "message"
    assert body.output_text


def test_parse(client: openai.OpenAI, model: str) -> None:
    body = client.responses.parse(model=model, input="a colour", text_format=Colour, max_output_tokens=2000)
    assert body.status == "completed"
    assert isinstance(body.output_parsed, Colour)


async def test_the_async_client(async_client: openai.AsyncOpenAI, model: str) -> None:
    assert (await async_client.responses.create(model=model, input="hello", max_output_tokens=16)).output_text


def test_the_order_of_events(http: httpx2.Client, model: str) -> None:
    found = stream(http, model, text=FORM, max_output_tokens=2000)
    kinds = [event.type for event in found]
    deltas = kinds.count("response.output_text.delta")
    assert deltas > 0
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * deltas,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    text = "".join(event.delta for event in found if event.type == "response.output_text.delta")
    last = found[-1]
    assert last.type == "response.completed"
    assert last.response.output_text == text
    Colour.model_validate_json(text)
    assert last.response.usage is not None
    assert last.response.usage.output_tokens > 0
    assert (
        len(
            {event.response.id for event in found if event.type in ("response.created", "response.completed")}
        )
        == 1
    )


def test_a_stream_that_is_cut_says_so(http: httpx2.Client, model: str) -> None:
    last = stream(http, model, max_output_tokens=16)[-1]
    assert last.type == "response.incomplete"
    assert last.response.status == "incomplete"


def test_the_stream_helper(client: openai.OpenAI, model: str) -> None:
    with client.responses.stream(
        model=model, input="a colour", text_format=Colour, max_output_tokens=2000
    ) as helper:
        body = helper.get_final_response()
    assert isinstance(body.output_parsed, Colour)


def test_a_function_call(http: httpx2.Client, model: str) -> None:
    options = {"tools": [FUNCTION], "tool_choice": "required", "parallel_tool_calls": False}
    body = create(http, model, **options, max_output_tokens=2000)
    (call,) = [item for item in body.output if item.type == "function_call"]
    assert call.name == "clock"
    assert call.call_id
    assert json.loads(call.arguments)["zone"] in ("UTC", "CET")
    given = [
        {"role": "user", "content": "what time is it?"},
        json.loads(call.model_dump_json(exclude_none=True)),
        {"type": "function_call_output", "call_id": call.call_id, "output": "noon"},
    ]
    assert create(
        http, model, input=given, tools=[FUNCTION], max_output_tokens=16, tool_choice="none"
    ).output_text


def test_a_streamed_function_call(http: httpx2.Client, model: str) -> None:
    options = {"tools": [FUNCTION], "tool_choice": {"type": "function", "name": "clock"}}
    found = stream(http, model, **options, parallel_tool_calls=False, max_output_tokens=2000)
    kinds = [event.type for event in found]
    assert kinds[-1] == "response.completed"
    deltas = [event.delta for event in found if event.type == "response.function_call_arguments.delta"]
    (done,) = [event for event in found if event.type == "response.function_call_arguments.done"]
    assert "".join(deltas) == done.arguments
    assert json.loads(done.arguments)["zone"] in ("UTC", "CET")
    added = kinds.index("response.output_item.added")
    assert added < kinds.index("response.function_call_arguments.delta")
    assert kinds.index("response.function_call_arguments.done") < kinds.index("response.output_item.done")


@pytest.mark.parametrize("change", [{"previous_response_id": "resp_1"}, {"background": True}])
def test_what_needs_a_memory_is_refused(client: openai.OpenAI, model: str, change: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        client.responses.create(model=model, input="hello", **change)
    assert refusal.value.param in change
