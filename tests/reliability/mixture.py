"""Requests of every kind that the API takes, good ones, drawn at random.

Knows the endpoints' formats; must not know what a test does with the answers.
"""

from __future__ import annotations

import random
from typing import Any

from reliability.wire import Json, Target

WORDS = ("the", "moon", "is", "made", "of", "green", "cheese", "and", "nobody", "knows", "who", "ate", "it")
MOST_TOKENS = 4


def draw(target: Target, source: random.Random) -> tuple[str, Json]:
    """Path and body of a request. Some ask for what costs: choices, grammars, log-probabilities."""
    text = " ".join(source.choices(WORDS, k=source.randrange(1, 40)))
    kind = source.choices(list(_KINDS), weights=[weight for weight, _ in _KINDS.values()])[0]
    body: Json = {"model": target.model, **_KINDS[kind][1](text, source)}
    return kind.partition(" ")[0], body


def _messages(text: str) -> list[Json]:
    return [{"role": "user", "content": text}]


def _chat(text: str, source: random.Random) -> Json:
    options: list[Json] = [
        {},
        {"n": 2},
        {"logprobs": True, "top_logprobs": 3},
        {"stop": ["\u0000"]},
        {"seed": 7},
    ]
    streamed: list[Json] = [{}, {"stream": True}, {"stream": True, "stream_options": {"include_usage": True}}]
    limits: Json = {"max_tokens": source.randint(1, MOST_TOKENS)}
    return {"messages": _messages(text), **limits, **source.choice(options), **source.choice(streamed)}


def _with_schema(text: str, source: random.Random) -> Json:
    """A schema that nobody has sent before."""
    names = [f"field_{source.randrange(10**9)}" for _ in range(source.randint(1, 4))]
    schema = {
        "type": "object",
        "properties": {name: {"type": "integer"} for name in names},
        "required": names,
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    return {"messages": _messages(text), "max_tokens": MOST_TOKENS, "response_format": wanted}


def _with_tool(text: str, source: random.Random) -> Json:
    tool = {"name": f"tool_{source.randrange(100)}", "parameters": {"type": "object", "properties": {}}}
    return {"messages": _messages(text), "max_tokens": 2, "tools": [{"type": "function", "function": tool}]}


def _completion(text: str, source: random.Random) -> Json:
    more: list[Json] = [{}, {"stream": True}, {"echo": True}, {"logprobs": 2}, {"n": 2}]
    return {"prompt": text, "max_tokens": source.randint(1, MOST_TOKENS), **source.choice(more)}


def _response(text: str, source: random.Random) -> Json:
    return {"input": text, "max_output_tokens": MOST_TOKENS, "store": False, "stream": source.random() < 0.5}


def _message(text: str, source: random.Random) -> Json:
    return {"messages": _messages(text), "max_tokens": MOST_TOKENS, "stream": source.random() < 0.5}


def _count(text: str, source: random.Random) -> Json:
    return {"messages": _messages(text)}


def _tokenize(text: str, source: random.Random) -> Json:
    return {"prompt": text}


def _detokenize(text: str, source: random.Random) -> Json:
    return {"tokens": [source.randrange(256) for _ in text]}


_KINDS: dict[str, tuple[int, Any]] = {
    "/chat/completions": (40, _chat),
    "/chat/completions with a schema": (3, _with_schema),
    "/chat/completions with a tool": (3, _with_tool),
    "/completions": (20, _completion),
    "/responses": (10, _response),
    "/messages": (10, _message),
    "/messages/count_tokens": (4, _count),
    "/tokenize": (6, _tokenize),
    "/detokenize": (4, _detokenize),
}
"""By path and what it asks for: how often it is drawn, and what its body has beside the model."""

PATHS = tuple(dict.fromkeys(kind.partition(" ")[0] for kind in _KINDS))
