"""Token ids of texts and back, without an answer."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest

from fakes import FakeEngine, engine_info
from toptwo.text.model import ServedModel

USER = {"role": "user", "content": "hello"}
TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}


async def post(http: httpx2.AsyncClient, path: str, **body: object) -> dict[str, Any]:
    response = await http.post(f"/v1/{path}", json=body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


@pytest.mark.parametrize("text", ["hello", "", "im é 👍", "<|im_start|>user\nhello<|im_end|>"])
async def test_a_prompt_goes_there_and_back(
    http: httpx2.AsyncClient, engine: FakeEngine, model: ServedModel, text: str
) -> None:
    found = await post(http, "tokenize", model="org/tiny-moe", prompt=text)
    assert found["tokens"] == model.tokenizer.encode([text])
    assert found["count"] == len(found["tokens"])
    assert found["max_model_len"] == 2048
    assert "token_strs" not in found
    assert await post(http, "detokenize", tokens=found["tokens"]) == {"prompt": text}
    assert engine.requests == []


async def test_texts_of_tokens(http: httpx2.AsyncClient) -> None:
    found = await post(http, "tokenize", prompt="im é<|im_end|>", return_token_strs=True)
    assert found["token_strs"] == ["im", " ", "\ufffd", "\ufffd", "<|im_end|>"]


async def test_a_conversation_is_what_the_engine_would_get(
    http: httpx2.AsyncClient, engine: FakeEngine
) -> None:
    for tools in (None, [TOOL]):
        body = {"messages": [USER], "tools": tools}
        chat = {"model": "org/tiny-moe", **body}
        assert (await http.post("/v1/chat/completions", json=chat)).status_code == 200
        found = await post(http, "tokenize", **body, add_generation_prompt=True)
        assert found["tokens"] == engine.requests[-1].prompt_ids


async def test_a_conversation_may_be_longer_than_the_context(
    http: httpx2.AsyncClient, engine: FakeEngine
) -> None:
    engine.info = engine_info(max_model_len=4)
    found = await post(http, "tokenize", messages=[USER])
    assert found["count"] > found["max_model_len"] == 4


async def test_a_caller_is_told_that_templates_write_their_own_tokens(http: httpx2.AsyncClient) -> None:
    response = await http.post("/v1/tokenize", json={"messages": [USER], "add_special_tokens": True})
    assert response.headers["x-toptwo-ignored"] == "add_special_tokens"
    response = await http.post("/v1/tokenize", json={"prompt": "hello", "add_special_tokens": False})
    assert "x-toptwo-ignored" not in response.headers


@pytest.mark.parametrize(
    ("path", "body", "param", "code"),
    [
        ("tokenize", {}, "prompt", "invalid_value"),
        ("tokenize", {"prompt": "a", "messages": [USER]}, "prompt", "invalid_value"),
        ("tokenize", {"prompt": ["a"]}, "prompt", "invalid_type"),
        ("tokenize", {"prompt": "a", "tools": [TOOL]}, "tools", "invalid_value"),
        ("tokenize", {"messages": []}, "messages", "invalid_value"),
        ("tokenize", {"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
        ("tokenize", {"messages": [USER], "tools": [TOOL, TOOL]}, "tools", "invalid_value"),
        (
            "tokenize",
            {"messages": [USER], "add_generation_prompt": False},
            "add_generation_prompt",
            "unsupported_parameter",
        ),
        ("tokenize", {"prompt": "a", "odd": 1}, "odd", "unknown_parameter"),
        ("tokenize", {"prompt": "a", "add_special_tokens": 1}, "add_special_tokens", "invalid_type"),
        ("tokenize", {"prompt": "a", "model": "other"}, "model", "model_not_found"),
        ("detokenize", {}, "tokens", "missing_required_parameter"),
        ("detokenize", {"tokens": "a"}, "tokens", "invalid_type"),
        ("detokenize", {"tokens": ["a"]}, "tokens[0]", "invalid_type"),
        ("detokenize", {"tokens": [-1]}, "tokens[0]", "invalid_value"),
        ("detokenize", {"tokens": [1, 266]}, "tokens", "invalid_value"),
        ("detokenize", {"tokens": [], "model": "other"}, "model", "model_not_found"),
    ],
)
async def test_mistakes_are_explained(
    http: httpx2.AsyncClient, path: str, body: dict[str, object], param: str, code: str
) -> None:
    response = await http.post(f"/v1/{path}", json=body)
    assert response.status_code == (404 if code == "model_not_found" else 400)
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (param, code), error


async def test_the_context_is_not_known_before_the_model_is_ready(
    http: httpx2.AsyncClient, engine: FakeEngine
) -> None:
    engine.info = None
    assert (await http.post("/v1/tokenize", json={"prompt": "a"})).status_code == 503
    assert (await http.post("/v1/detokenize", json={"tokens": [65]})).status_code == 200
