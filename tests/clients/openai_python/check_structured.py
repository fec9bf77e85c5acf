"""Answers of a given form. The model is random: only the grammar can make its answers fit."""

from __future__ import annotations

import json
from typing import Literal

import httpx2
import openai
import pytest
from pydantic import BaseModel, Field
from strict import ask, error_of


class Part(BaseModel):
    colour: Literal["red", "green"]
    large: bool


class Product(BaseModel):
    """Nothing in it can be long: a random model would go on for ever."""

    kind: Literal["car", "boat"]
    wheels: int = Field(ge=0, le=20)
    parts: list[Part] = Field(max_length=2)


def test_parse_gives_an_object(client: openai.OpenAI, model: str) -> None:
    for seed in range(3):
        body = client.chat.completions.parse(
            model=model, messages=ask("a product"), response_format=Product, seed=seed, max_tokens=2000
        )
        assert isinstance(body.choices[0].message.parsed, Product)
        assert body.choices[0].finish_reason == "stop"


async def test_the_async_client_parses_too(async_client: openai.AsyncOpenAI, model: str) -> None:
    body = await async_client.chat.completions.parse(
        model=model, messages=ask("a product"), response_format=Product, max_tokens=2000
    )
    assert isinstance(body.choices[0].message.parsed, Product)


def test_a_streamed_object(client: openai.OpenAI, model: str) -> None:
    with client.chat.completions.stream(
        model=model, messages=ask("a product"), response_format=Product, max_tokens=2000
    ) as stream:
        rebuilt = stream.get_final_completion()
    assert isinstance(rebuilt.choices[0].message.parsed, Product)


def test_json_object_is_an_object(client: openai.OpenAI, model: str) -> None:
    body = client.chat.completions.create(
        model=model,
        messages=ask("JSON, please"),
        response_format={"type": "json_object"},
        max_tokens=2000,
        # Without these pushes a random model might open strings and lists that it never closes.
        logit_bias={str(token): 100 for token in range(266) if chr_of(token) in '}"'},
    )
    assert body.choices[0].finish_reason == "stop"
    assert isinstance(json.loads(body.choices[0].message.content or ""), dict)


def chr_of(token: int) -> str:
    """Text of a token of the tiny model's vocabulary, whose first ids are printable ASCII from "!" on."""
    return chr(token + ord("!")) if token < 94 else ""


@pytest.mark.parametrize(
    ("schema", "param"),
    [
        ({"type": "no such type"}, "response_format"),
        ({"$ref": "#/nowhere"}, "response_format"),
        ({"$ref": "http://127.0.0.1:9/schema.json"}, "response_format"),
    ],
)
def test_a_schema_that_cannot_be_obeyed_is_refused(
    http: httpx2.Client, model: str, schema: dict[str, str], param: str
) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    answer = http.post(
        "/chat/completions", json={"model": model, "messages": ask("x"), "response_format": form}
    )
    assert answer.status_code == 400, answer.text
    assert str(error_of(answer)["param"]).startswith(param)


def test_a_regex_that_is_none_is_refused(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        client.chat.completions.create(
            model=model, messages=ask("x"), max_tokens=2, extra_body={"guided_regex": "(unclosed"}
        )
    assert refusal.value.param == "guided_regex"
