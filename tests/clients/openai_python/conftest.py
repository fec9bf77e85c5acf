"""Clients that do not try again, so that a check sees the first answer; and the bare HTTP beneath them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator

import httpx2
import openai
import pytest


@pytest.fixture
def client(url: str, key: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key=key, max_retries=0) as client:
        yield client


@pytest.fixture
async def async_client(url: str, key: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0) as client:
        yield client


@pytest.fixture
def http(url: str, key: str) -> Iterator[httpx2.Client]:
    """Bare HTTP with the key, for what the client's types would hide."""
    headers = {"Authorization": f"Bearer {key}"}
    with httpx2.Client(base_url=url, headers=headers, timeout=60) as client:
        yield client


@pytest.fixture
def token_ids(http: httpx2.Client, model: str) -> Callable[[str], list[int]]:
    """Ids of the tokens of a text."""

    def tokenize(text: str) -> list[int]:
        answer = http.post("/tokenize", json={"model": model, "prompt": text})
        assert answer.status_code == 200, answer.text
        return list(answer.json()["tokens"])

    return tokenize
