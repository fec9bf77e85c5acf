"""A model that was not made for chats: completions work, and everything else says what to do."""

from __future__ import annotations

import httpx2
import pytest

from fakes import FakeEngine, chat, chat_tokenizer
from toptwo.text.model import ServedModel

MODEL = "org/tiny-moe"
MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def model() -> ServedModel:
    return ServedModel(MODEL, 1_700_000_000, chat_tokenizer(), None)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", chat()),
        ("chat/completions", chat(stream=True)),
        (
            "chat/completions",
            chat(tools=[{"type": "function", "function": {"name": "f"}}], tool_choice="required"),
        ),
        ("responses", {"model": MODEL, "input": "hello"}),
        ("messages", {"model": MODEL, "max_tokens": 9, "messages": MESSAGES}),
        ("messages/count_tokens", {"model": MODEL, "messages": MESSAGES}),
        ("tokenize", {"model": MODEL, "messages": MESSAGES}),
    ],
)
async def test_chats_are_refused(
    http: httpx2.AsyncClient, engine: FakeEngine, path: str, body: dict[str, object]
) -> None:
    response = await http.post(f"/v3/openai/{path}", json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["message"] == (
        "The model has no chat template; use /v3/openai/completions, "
        "or start the server with --chat-template FILE."
    )
    if not path.startswith("messages"):  # the other format has neither
        assert (error["param"], error["code"]) == ("model", "no_chat_template")
    assert engine.requests == []


async def test_completions_work(http: httpx2.AsyncClient, engine: FakeEngine, model: ServedModel) -> None:
    body = {"model": MODEL, "prompt": "hello", "max_tokens": 9}
    (choice,) = (await http.post("/v3/openai/completions", json=body)).json()["choices"]
    assert choice["text"] == "hello wo"
    assert engine.requests[0].prompt_ids == model.tokenizer.encode(["hello"])
    tokens = await http.post("/v3/openai/tokenize", json={"model": MODEL, "prompt": "hello"})
    assert tokens.json()["tokens"] == model.tokenizer.encode(["hello"])
    assert (await http.get("/v3/openai/models")).json()["data"][0]["id"] == MODEL
