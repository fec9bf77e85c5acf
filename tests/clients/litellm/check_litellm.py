"""The library that proxies are built of: answers, streams, tools, and whose errors are whose."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import pytest

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or its import fetches a price list

import litellm

HELLO = [{"role": "user", "content": "hello"}]
SCHEMA = {
    "type": "object",
    "properties": {"zone": {"type": "string", "enum": ["UTC", "CET"]}},
    "required": ["zone"],
    "additionalProperties": False,
}


@pytest.fixture
def target(url: str, key: str, model: str) -> dict[str, Any]:
    return {"model": f"openai/{model}", "api_base": url, "api_key": key, "max_retries": 0}


def test_an_answer(target: dict[str, Any]) -> None:
    body = litellm.completion(**target, messages=HELLO, max_tokens=8, temperature=0)
    assert body.choices[0].message.content
    assert body.choices[0].finish_reason == "length"
    assert body.usage.completion_tokens == 8


async def test_the_async_client(target: dict[str, Any]) -> None:
    body = await litellm.acompletion(**target, messages=HELLO, max_tokens=8)
    assert body.usage.completion_tokens <= 8


def test_a_stream(target: dict[str, Any]) -> None:
    options = {"max_tokens": 8, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    chunks = list(litellm.completion(**target, messages=HELLO, **options))
    rebuilt = litellm.stream_chunk_builder(chunks)
    whole = litellm.completion(**target, messages=HELLO, max_tokens=8, temperature=0)
    assert rebuilt.choices[0].message.content == whole.choices[0].message.content
    assert rebuilt.usage.completion_tokens == 8
    assert rebuilt.choices[0].finish_reason == "length"


def test_a_forced_tool(target: dict[str, Any]) -> None:
    tool = {"type": "function", "function": {"name": "clock", "parameters": SCHEMA}}
    body = litellm.completion(
        **target,
        messages=HELLO,
        tools=[tool],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=2000,
    )
    (call,) = body.choices[0].message.tool_calls
    assert call.function.name == "clock"
    assert json.loads(call.function.arguments)["zone"] in ("UTC", "CET")


def test_a_schema(target: dict[str, Any]) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "zone", "schema": SCHEMA, "strict": True}}
    body = litellm.completion(**target, messages=HELLO, response_format=form, max_tokens=2000)
    assert json.loads(body.choices[0].message.content)["zone"] in ("UTC", "CET")


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"api_key": "sk-wrong"}, litellm.AuthenticationError),
        ({"model": "openai/nobody"}, litellm.NotFoundError),
        ({"temperature": 3}, litellm.BadRequestError),
        ({"messages": [{"role": "user", "content": "x" * 20_000}]}, litellm.ContextWindowExceededError),
    ],
)
def test_errors_become_exceptions(
    target: dict[str, Any], change: dict[str, Any], kind: type[Exception]
) -> None:
    with pytest.raises(kind):
        litellm.completion(**{**target, "messages": HELLO, **change})


def test_the_snippet(run_snippet: Callable[..., str]) -> None:
    assert run_snippet(LITELLM_LOCAL_MODEL_COST_MAP="True").strip()
