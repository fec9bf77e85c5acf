"""The legacy completions endpoint, which evaluation harnesses live on."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx2
import openai
import pytest
from openai.types import Completion
from strict import events, validate

Tokenize = Callable[[str], list[int]]


def validate_text(text: str | bytes) -> Completion:
    """The JSON as openai's type, which knows nothing of the nulls that OpenAI's own server sends."""
    body = json.loads(text)
    for choice in body["choices"]:
        choice["finish_reason"] = choice["finish_reason"] or "stop"  # null until a stream ends
        told = choice["logprobs"] or {}
        for name, nothing in (("token_logprobs", 0.0), ("top_logprobs", {})):
            if told.get(name) and told[name][0] is None:  # nothing stands before a prompt's first token
                told[name][0] = nothing
    validate(Completion, json.dumps(body))
    return Completion.construct(**json.loads(text))


def complete(http: httpx2.Client, model: str, **options: Any) -> Completion:
    given = {"model": model, "prompt": "hello world", "max_tokens": 6, "temperature": 0, **options}
    answer = http.post("/completions", json=given)
    assert answer.status_code == 200, answer.text
    return validate_text(answer.content)


def test_a_text(http: httpx2.Client, model: str) -> None:
    body = complete(http, model)
    assert body.object == "text_completion"
    assert body.choices[0].text
    assert body.choices[0].finish_reason == "length"
    assert body.usage is not None
    assert body.usage.completion_tokens == 6


def test_several_prompts(http: httpx2.Client, model: str) -> None:
    prompts = ["hello world", "another one"]
    body = complete(http, model, prompt=prompts)
    assert [choice.index for choice in body.choices] == [0, 1]
    alone = [complete(http, model, prompt=prompt).choices[0].text for prompt in prompts]
    assert [choice.text for choice in body.choices] == alone


def test_token_ids(http: httpx2.Client, model: str, token_ids: Tokenize) -> None:
    ids = token_ids("hello world")
    wanted = complete(http, model).choices[0].text
    assert complete(http, model, prompt=ids).choices[0].text == wanted
    body = complete(http, model, prompt=[ids, ids])
    assert [choice.text for choice in body.choices] == [wanted, wanted]


def test_several_choices(http: httpx2.Client, model: str) -> None:
    body = complete(http, model, prompt=["a", "b"], n=2, temperature=1, seed=2)
    assert [choice.index for choice in body.choices] == [0, 1, 2, 3]


def test_the_best_of_several(http: httpx2.Client, model: str) -> None:
    body = complete(http, model, n=2, best_of=3, temperature=1, seed=2)
    assert [choice.index for choice in body.choices] == [0, 1]
    assert body.usage is not None
    assert body.usage.completion_tokens == 18  # all three were generated


def test_echo_with_logprobs(http: httpx2.Client, model: str, token_ids: Tokenize) -> None:
    """What a harness reads likelihoods of given texts from."""
    body = complete(http, model, echo=True, logprobs=2, max_tokens=1)
    choice = body.choices[0]
    assert choice.text.startswith("hello world")
    told = choice.logprobs
    assert told is not None
    count = len(token_ids("hello world")) + 1
    assert told.tokens is not None
    assert len(told.tokens) == count
    assert told.text_offset is not None
    assert told.text_offset[0] == 0
    assert told.text_offset == sorted(told.text_offset)
    assert told.token_logprobs is not None
    assert told.token_logprobs[0] is None
    assert all(logprob is not None and logprob <= 0 for logprob in told.token_logprobs[1:])
    assert told.top_logprobs is not None
    assert len(told.top_logprobs) == count
    assert len(told.top_logprobs[-1]) in (2, 3)


def test_likelihoods_do_not_depend_on_who_wrote_the_text(
    http: httpx2.Client, model: str, token_ids: Tokenize
) -> None:
    ids = token_ids("hello world")
    (x,) = token_ids("x")
    bias = {str(x): 100}  # so that the answer is text that reads back as the same tokens
    plain = complete(http, model, prompt=[*ids, x], echo=True, logprobs=1, max_tokens=1).choices[0].logprobs
    ahead = complete(http, model, prompt=ids, logprobs=1, max_tokens=1, logit_bias=bias).choices[0]
    assert ahead.text == "x"
    again = complete(http, model, prompt=[*ids, x], echo=True, logprobs=1, max_tokens=1).choices[0].logprobs
    assert plain is not None
    assert again is not None
    assert plain.token_logprobs == pytest.approx(again.token_logprobs)


def test_echo_without_an_answer(http: httpx2.Client, model: str) -> None:
    body = complete(http, model, echo=True, max_tokens=0)
    assert body.choices[0].text == "hello world"


def test_a_stream(http: httpx2.Client, model: str) -> None:
    wanted = {"model": model, "prompt": "hello world", "max_tokens": 6, "temperature": 0, "n": 2}
    told = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = [validate_text(event) for event in events(http.post("/completions", json=wanted | told))]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12
    whole = complete(http, model, n=2)
    for index in (0, 1):
        parts = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert "".join(part.text for part in parts) == whole.choices[index].text
        assert parts[-1].finish_reason == "length"


def test_the_sync_client(client: openai.OpenAI, model: str) -> None:
    stream = client.completions.create(model=model, prompt="a", max_tokens=4, temperature=0, stream=True)
    text = "".join(chunk.choices[0].text for chunk in stream if chunk.choices)
    assert (
        text
        == client.completions.create(model=model, prompt="a", max_tokens=4, temperature=0).choices[0].text
    )


async def test_the_async_client(async_client: openai.AsyncOpenAI, model: str) -> None:
    assert (await async_client.completions.create(model=model, prompt="a", max_tokens=4)).choices


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"logprobs": 1000}, "logprobs"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [10**9]}, "prompt"),
    ],
)
def test_what_cannot_be_done_is_refused(
    client: openai.OpenAI, model: str, change: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        client.completions.create(**{"model": model, "prompt": "a", **change})
    assert str(refusal.value.param).startswith(param), json.dumps(refusal.value.body)
