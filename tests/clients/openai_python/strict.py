"""Bodies and streams held against openai's own types, strictly: right types, and nothing that they lack."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TypeVar

import httpx2
from openai import BaseModel
from openai.types.chat import ChatCompletionMessageParam

Body = TypeVar("Body", bound=BaseModel)

# What this server says beyond OpenAI's fields, and `store`, which is one of them but not in openai's types.
EXTENSIONS = {"moe", "reasoning_content", "store"}


def ask(text: str) -> list[ChatCompletionMessageParam]:
    """A conversation of one question."""
    return [{"role": "user", "content": text}]


def validate(kind: type[Body], text: str | bytes) -> Body:
    """The JSON as an object of openai's type. Fails on a wrong type and on an unexpected field."""
    parsed = kind.model_validate_json(text, strict=True)
    unexpected = sorted(path for path in extra_fields(parsed) if path.rpartition(".")[2] not in EXTENSIONS)
    assert not unexpected, unexpected
    return parsed


def extra_fields(value: object, path: str = "") -> Iterator[str]:
    """Paths of fields that openai's types do not have, however deep."""
    if isinstance(value, BaseModel):
        yield from (f"{path}.{name}" for name in value.model_extra or ())
        for name in type(value).model_fields:
            yield from extra_fields(getattr(value, name, None), f"{path}.{name}")
    elif isinstance(value, list):
        for item in value:
            yield from extra_fields(item, f"{path}[]")


def events(answer: httpx2.Response) -> list[str]:
    """The data of a stream's events, without the closing [DONE], which must be there."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in answer.text.split("\n") if line and not line.startswith((":", "event:"))]
    assert all(line.startswith("data: ") for line in lines), lines
    assert lines[-1] == "data: [DONE]"
    return [line.removeprefix("data: ") for line in lines[:-1]]


def error_of(answer: httpx2.Response) -> dict[str, str | None]:
    """The error of OpenAI's envelope, which has exactly four fields."""
    body = json.loads(answer.text)
    assert set(body) == {"error"}, body
    assert set(body["error"]) == {"message", "type", "param", "code"}, body
    assert isinstance(body["error"]["message"], str)
    assert body["error"]["code"] is None or isinstance(body["error"]["code"], str)
    return dict(body["error"])
