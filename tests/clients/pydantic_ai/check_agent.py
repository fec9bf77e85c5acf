"""Agents whose answers are objects, with and without a tool."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings


class Product(BaseModel):
    """Nothing in it can be long: a random model would go on for ever."""

    kind: Literal["car", "boat"]
    wheels: int = Field(ge=0, le=20)


def settings(seed: int = 0, max_tokens: int = 2000) -> ModelSettings:
    return ModelSettings(max_tokens=max_tokens, seed=seed, parallel_tool_calls=False)


@pytest.fixture
def chat(url: str, key: str, model: str) -> OpenAIChatModel:
    return OpenAIChatModel(model, provider=OpenAIProvider(base_url=url, api_key=key))


@pytest.mark.parametrize("form", [ToolOutput(Product), NativeOutput(Product)], ids=["tool", "native"])
async def test_an_object(chat: OpenAIChatModel, form: Any) -> None:
    result = await Agent(chat, output_type=form, retries=0).run("a product", model_settings=settings())
    assert isinstance(result.output, Product)
    assert result.usage.output_tokens > 0


@pytest.mark.parametrize("form", [ToolOutput(Product), NativeOutput(Product)], ids=["tool", "native"])
async def test_a_streamed_object(chat: OpenAIChatModel, form: Any) -> None:
    agent = Agent(chat, output_type=form, retries=0)
    async with agent.run_stream("a product", model_settings=settings()) as run:
        assert isinstance(await run.get_output(), Product)


async def test_a_text(chat: OpenAIChatModel) -> None:
    async with Agent(chat).run_stream("hello", model_settings=settings(max_tokens=12)) as run:
        text = "".join([piece async for piece in run.stream_text(delta=True)])
    whole = await Agent(chat).run("hello", model_settings=settings(max_tokens=12))
    assert text == whole.output


async def test_a_tool_on_the_way_to_the_object(chat: OpenAIChatModel) -> None:
    """The model must call the tool or give the object, and it is chance which: so several are tried."""
    called = []
    agent = Agent(chat, output_type=Product, retries=0)

    @agent.tool_plain
    def stock(kind: Literal["car", "boat"]) -> int:
        """How many there are."""
        called.append(kind)
        return 3

    for seed in range(20):
        result = await agent.run("a product", model_settings=settings(seed))
        assert isinstance(result.output, Product)
        if called:
            break
    assert called


async def test_the_responses_endpoint(url: str, key: str, model: str) -> None:
    responses = OpenAIResponsesModel(model, provider=OpenAIProvider(base_url=url, api_key=key))
    result = await Agent(responses, output_type=Product, retries=0).run(
        "a product", model_settings=settings()
    )
    assert isinstance(result.output, Product)


async def test_errors_are_shown(url: str, key: str) -> None:
    nobody = OpenAIChatModel("nobody", provider=OpenAIProvider(base_url=url, api_key=key))
    with pytest.raises(ModelHTTPError, match="does not exist") as refusal:
        await Agent(nobody).run("hello")
    assert refusal.value.status_code == 404


def test_the_snippet(run_snippet: Callable[..., str]) -> None:
    assert run_snippet().strip() in ("True", "False")
