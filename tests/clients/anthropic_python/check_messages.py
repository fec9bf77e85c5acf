"""Anthropic's messages, from Anthropic's client."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import anthropic
import httpx2
import pytest
from anthropic import BaseModel
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter

CLOCK: dict[str, Any] = {
    "name": "clock",
    "description": "Time in a zone.",
    "input_schema": {
        "type": "object",
        "properties": {"zone": {"type": "string", "enum": ["UTC", "CET"]}},
        "required": ["zone"],
        "additionalProperties": False,
    },
}
GREEDY = {"temperature": 0}  # which the client has no name for
HELLO: list[Any] = [{"role": "user", "content": "hello"}]


@pytest.fixture
def client(key: str) -> Iterator[anthropic.Anthropic]:
    root = os.environ["ANTHROPIC_BASE_URL"]
    with anthropic.Anthropic(base_url=root, api_key=key, max_retries=0) as client:
        yield client


@pytest.fixture
async def async_client(key: str) -> AsyncIterator[anthropic.AsyncAnthropic]:
    root = os.environ["ANTHROPIC_BASE_URL"]
    async with anthropic.AsyncAnthropic(base_url=root, api_key=key, max_retries=0) as client:
        yield client


def post(key: str, **body: Any) -> httpx2.Response:
    """Bare HTTP, for what the client's types would hide."""
    address = os.environ["ANTHROPIC_BASE_URL"] + "/v1/messages"
    headers = {"x-api-key": key, "anthropic-version": "2023-06-01"}
    return httpx2.post(
        address, json={"messages": HELLO, "max_tokens": 12, **body}, headers=headers, timeout=60
    )


def unexpected_fields(value: object) -> Iterator[str]:
    """Names of fields that anthropic's types do not have, however deep."""
    if isinstance(value, BaseModel):
        yield from value.model_extra or ()
        for name in type(value).model_fields:
            yield from unexpected_fields(getattr(value, name, None))
    elif isinstance(value, list):
        for item in value:
            yield from unexpected_fields(item)


def test_a_body_is_what_anthropic_documents(key: str, model: str) -> None:
    answer = post(key, model=model, temperature=0)
    assert answer.status_code == 200, answer.text
    body = Message.model_validate_json(answer.content, strict=True)
    assert list(unexpected_fields(body)) == []
    assert (body.type, body.role, body.model, body.stop_reason) == (
        "message",
        "assistant",
        model,
        "max_tokens",
    )
    assert body.content[0].type == "text"
    assert body.content[0].text
    assert body.usage.output_tokens == 12
    assert body.usage.input_tokens > 0


def test_a_stream_is_what_anthropic_documents(key: str, model: str) -> None:
    answer = post(key, model=model, temperature=0, stream=True)
    assert answer.status_code == 200, answer.text
    adapter: TypeAdapter[RawMessageStreamEvent] = TypeAdapter(RawMessageStreamEvent)
    kinds = []
    for block in answer.text.strip().split("\n\n"):
        lines = [line for line in block.split("\n") if line and not line.startswith(":")]
        if not lines:
            continue
        name, data = (line.partition(": ")[2] for line in lines)
        kinds.append(name)
        if name != "ping":
            event = adapter.validate_json(data, strict=True)
            assert event.type == name
            assert list(unexpected_fields(event)) == []
    kinds = [kind for kind in kinds if kind != "ping"]
    deltas = kinds.count("content_block_delta")
    assert deltas > 0
    assert kinds == [
        "message_start",
        "content_block_start",
        *["content_block_delta"] * deltas,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]


def test_the_helper_rebuilds_the_answer(client: anthropic.Anthropic, model: str) -> None:
    whole = client.messages.create(model=model, messages=HELLO, max_tokens=12, extra_body=GREEDY)
    with client.messages.stream(model=model, messages=HELLO, max_tokens=12, extra_body=GREEDY) as stream:
        text = "".join(stream.text_stream)
        last = stream.get_final_message()
    assert whole.content[0].type == "text"
    assert text == whole.content[0].text
    assert last.stop_reason == "max_tokens"
    assert last.usage.output_tokens == 12


async def test_the_async_client(async_client: anthropic.AsyncAnthropic, model: str) -> None:
    message = await async_client.messages.create(
        model=model,
        system="Be brief.",
        messages=[{"role": "user", "content": [{"type": "text", "text": "hello"}]}],
        max_tokens=12,
    )
    assert message.content


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "clock"}])
def test_a_forced_tool_is_used(client: anthropic.Anthropic, model: str, choice: dict[str, Any]) -> None:
    choice = choice | {"disable_parallel_tool_use": True}
    message = client.messages.create(
        model=model, messages=HELLO, max_tokens=2000, tools=[CLOCK], tool_choice=choice
    )
    assert message.stop_reason == "tool_use"
    (use,) = [block for block in message.content if block.type == "tool_use"]
    assert use.name == "clock"
    assert use.input["zone"] in ("UTC", "CET")
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "noon"}
    given = [*HELLO, {"role": "assistant", "content": [use.model_dump(exclude_none=True)]}]
    given.append({"role": "user", "content": [result]})
    after = client.messages.create(
        model=model, messages=given, max_tokens=4, tools=[CLOCK], tool_choice={"type": "none"}
    )
    assert after.content


def test_a_streamed_tool_use(client: anthropic.Anthropic, model: str) -> None:
    choice: Any = {"type": "any", "disable_parallel_tool_use": True}
    with client.messages.stream(
        model=model, messages=HELLO, max_tokens=2000, tools=[CLOCK], tool_choice=choice
    ) as stream:
        message = stream.get_final_message()
    (use,) = [block for block in message.content if block.type == "tool_use"]
    assert use.input["zone"] in ("UTC", "CET")


def test_a_stop_sequence_is_named(client: anthropic.Anthropic, model: str) -> None:
    whole = client.messages.create(model=model, messages=HELLO, max_tokens=40, extra_body=GREEDY)
    assert whole.content[0].type == "text"
    text = whole.content[0].text
    letter = next(letter for letter in text if letter.isascii() and letter.isprintable())
    cut = client.messages.create(
        model=model, messages=HELLO, max_tokens=40, stop_sequences=[letter], extra_body=GREEDY
    )
    assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", letter)
    assert "".join(block.text for block in cut.content if block.type == "text") == text.partition(letter)[0]


def test_tokens_are_counted(client: anthropic.Anthropic, model: str) -> None:
    counted = client.messages.count_tokens(model=model, messages=HELLO).input_tokens
    usage = client.messages.create(model=model, messages=HELLO, max_tokens=1).usage
    assert counted == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_errors_become_exceptions(client: anthropic.Anthropic, model: str) -> None:
    with pytest.raises(anthropic.NotFoundError) as refusal:
        client.messages.create(model="nobody", messages=HELLO, max_tokens=1)
    assert refusal.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]
    with pytest.raises(anthropic.BadRequestError) as refusal_of_value:
        client.messages.create(model=model, messages=HELLO, max_tokens=0)
    assert refusal_of_value.value.body["type"] == "error"  # type: ignore[index]
    assert refusal_of_value.value.body["error"]["type"] == "invalid_request_error"  # type: ignore[index]


def test_a_wrong_key() -> None:
    root = os.environ["ANTHROPIC_BASE_URL"]
    with (
        anthropic.Anthropic(base_url=root, api_key="sk-wrong", max_retries=0) as client,
        pytest.raises(anthropic.AuthenticationError),
    ):
        client.messages.create(model="any", messages=HELLO, max_tokens=1)


def test_the_snippet(run_snippet: Callable[..., str]) -> None:
    assert run_snippet().strip()
