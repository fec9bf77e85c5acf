"""Errors become the client's own exceptions, with every field; headers can be read."""

from __future__ import annotations

from typing import Any

import httpx2
import openai
import pytest
from openai.types import Model
from strict import ask, error_of, validate


def test_models(http: httpx2.Client, client: openai.OpenAI, model: str) -> None:
    assert [entry.id for entry in client.models.list()] == [model]
    assert client.models.retrieve(model).owned_by
    validate(Model, http.get(f"/models/{model}").content)


def test_a_wrong_key(url: str) -> None:
    with (
        openai.OpenAI(base_url=url, api_key="sk-wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError) as refusal,
    ):
        client.models.list()
    assert refusal.value.status_code == 401
    assert refusal.value.code == "invalid_api_key"
    assert "sk-wrong" not in str(refusal.value)


async def test_a_wrong_key_in_the_async_client(url: str, model: str) -> None:
    async with openai.AsyncOpenAI(base_url=url, api_key="sk-wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            await client.chat.completions.create(model=model, messages=ask("hi"), stream=True)


def test_an_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="gpt-5") as refusal:
        client.chat.completions.create(model="gpt-5", messages=ask("hi"))
    assert (refusal.value.code, refusal.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_type"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "pirate", "content": "arr"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
        ({"n": 0}, "n", "invalid_value"),
        ({"stop": ["1", "2", "3", "4", "5"]}, "stop", "invalid_value"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias", "invalid_value"),
        ({"top_logprobs": 3}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"audio": {"voice": "x", "format": "wav"}}, "audio", "unsupported_parameter"),
        ({"extra_body": {"temperatur": 1}}, "temperatur", "unknown_parameter"),
    ],
)
def test_a_bad_request_names_the_parameter(
    client: openai.OpenAI, model: str, change: dict[str, Any], param: str, code: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        client.chat.completions.create(**{"model": model, "messages": ask("hi"), "max_tokens": 1, **change})
    error = refusal.value
    assert str(error.param).startswith(param)
    assert (error.code, error.type) == (code, "invalid_request_error")


def test_a_prompt_over_the_context(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(
        openai.BadRequestError, match=r"maximum context length is \d+ tokens.*\d{5}"
    ) as refusal:
        client.chat.completions.create(model=model, messages=ask("x" * 20_000))
    assert (refusal.value.code, refusal.value.param) == ("context_length_exceeded", "messages")


def test_bodies_that_are_none(http: httpx2.Client) -> None:
    for content in (b"", b"{", b"[]", b"\xff", b'"text"'):
        answer = http.post("/chat/completions", content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400, answer.text
        error_of(answer)


def test_paths_that_are_none(http: httpx2.Client) -> None:
    answer = http.get("/no/such/path")
    assert answer.status_code == 404
    error_of(answer)
    answer = http.get("/chat/completions")
    assert answer.status_code == 405
    error_of(answer)


def test_embeddings_are_said_not_to_be_there(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.APIStatusError) as refusal:
        client.embeddings.create(model=model, input="hello")
    assert refusal.value.status_code == 501
    assert "embedding" in refusal.value.message.lower()
    assert refusal.value.response.headers["x-should-retry"] == "false"  # or clients try a 5xx again


def test_headers(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.with_raw_response.create(
        model=model,
        messages=ask("hi"),
        max_tokens=1,
        user="someone",
        metadata={"a": "b"},
        store=False,
        extra_headers={"x-request-id": "mine-1"},
    )
    assert answer.request_id == "mine-1"
    assert int(answer.headers["openai-processing-ms"]) >= 0
    assert set(answer.headers["x-toptwo-ignored"].split(", ")) == {"user", "metadata", "store"}
    assert answer.parse().choices
    unnamed = client.chat.completions.create(model=model, messages=ask("hi"), max_tokens=1)
    assert unnamed._request_id


def test_tokenize_and_back(http: httpx2.Client, model: str) -> None:
    answer = http.post("/tokenize", json={"model": model, "prompt": "hello wörld"})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["count"] == len(body["tokens"]) > 0
    back = http.post("/detokenize", json={"model": model, "tokens": body["tokens"]})
    assert back.status_code == 200, back.text
    assert back.json()["prompt"] == "hello wörld"
    messages = http.post("/tokenize", json={"model": model, "messages": ask("hello")})
    used = http.post("/chat/completions", json={"model": model, "messages": ask("hello"), "max_tokens": 1})
    assert messages.json()["count"] == used.json()["usage"]["prompt_tokens"]
