"""An app over a fake engine, with one key, and clients that need no socket."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx2
import openai
import pytest
from fastapi import FastAPI

from fakes import KEY, FakeEngine, FakeGrammars, Script, served_model
from toptwo.api.health import Lifecycle
from toptwo.api.security import KeyRing
from toptwo.app import create_app
from toptwo.text.model import ServedModel


@pytest.fixture(scope="session")
def model() -> ServedModel:
    return served_model()


@pytest.fixture
def engine(model: ServedModel) -> FakeEngine:
    """Answers "hello wo" and the token that ends a turn."""
    return FakeEngine(Script(token_ids=model.tokenizer.encode(["hello wo<|im_end|>"])))


@pytest.fixture
def lifecycle() -> Lifecycle:
    return Lifecycle()


@pytest.fixture
def grammars() -> FakeGrammars:
    return FakeGrammars()


@pytest.fixture
def app(engine: FakeEngine, model: ServedModel, grammars: FakeGrammars, lifecycle: Lifecycle) -> FastAPI:
    return create_app(engine, model, grammars, KeyRing.from_keys([KEY]), lifecycle)


@pytest.fixture
async def stranger(app: FastAPI) -> AsyncIterator[httpx2.AsyncClient]:
    """A client without a key."""
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://test") as client:
        yield client


@pytest.fixture
async def http(app: FastAPI) -> AsyncIterator[httpx2.AsyncClient]:
    """A client with the key."""
    async with httpx2.AsyncClient(
        transport=httpx2.ASGITransport(app=app),
        base_url="http://test",
        headers={"Authorization": f"Bearer {KEY}"},
    ) as client:
        yield client


@pytest.fixture
async def sdk(app: FastAPI) -> AsyncIterator[openai.AsyncOpenAI]:
    """OpenAI's own client, which does not retry."""
    transport = httpx2.ASGITransport(app=app)
    async with openai.AsyncOpenAI(
        base_url="http://test/v3/openai",
        api_key=KEY,
        max_retries=0,
        http_client=httpx2.AsyncClient(transport=transport),
    ) as client:
        yield client
