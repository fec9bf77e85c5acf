"""Objects out of a model, by a forced tool call and by a JSON schema."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import instructor
import openai
import pytest
from pydantic import BaseModel, Field

MODES = [instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA]
QUESTION: list[Any] = [{"role": "user", "content": "a product"}]


class Product(BaseModel, extra="forbid"):
    """Nothing in it can be long, and nothing may be added: a random model would go on for ever."""

    kind: Literal["car", "boat"]
    wheels: int = Field(ge=0, le=20)


@pytest.mark.parametrize("mode", MODES)
def test_an_object(url: str, key: str, model: str, mode: instructor.Mode) -> None:
    with openai.OpenAI(base_url=url, api_key=key, max_retries=0) as inner:
        client = instructor.from_openai(inner, mode=mode)
        for seed in range(3):
            found, body = client.create_with_completion(
                model=model,
                messages=QUESTION,
                response_model=Product,
                max_retries=0,
                max_tokens=2000,
                seed=seed,
                parallel_tool_calls=False,
            )
            assert isinstance(found, Product)
            assert body.usage.completion_tokens > 0


@pytest.mark.parametrize("mode", MODES)
async def test_an_object_from_the_async_client(url: str, key: str, model: str, mode: instructor.Mode) -> None:
    async with openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0) as inner:
        client = instructor.from_openai(inner, mode=mode)
        found = await client.create(
            model=model,
            messages=QUESTION,
            response_model=Product,
            max_retries=0,
            max_tokens=2000,
            parallel_tool_calls=False,
        )
    assert isinstance(found, Product)


@pytest.mark.parametrize("mode", [instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA])
def test_a_growing_object(url: str, key: str, model: str, mode: instructor.Mode) -> None:
    with openai.OpenAI(base_url=url, api_key=key, max_retries=0) as inner:
        client = instructor.from_openai(inner, mode=mode)
        *_, last = client.create_partial(
            model=model,
            messages=QUESTION,
            response_model=Product,
            max_retries=0,
            max_tokens=2000,
            parallel_tool_calls=False,
        )
    assert last.kind in ("car", "boat")
    assert 0 <= last.wheels <= 20


def test_the_snippet(run_snippet: Callable[..., str]) -> None:
    assert run_snippet().strip() in ("on=True", "on=False")
