"""Chat completions, whole and streamed, as both clients see them."""

from __future__ import annotations

import httpx2
import openai
import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from strict import ask, events, validate

SHORT = {"max_tokens": 12, "temperature": 0}


def test_a_body_is_what_openai_documents(http: httpx2.Client, model: str) -> None:
    answer = http.post("/chat/completions", json={"model": model, "messages": ask("hello"), **SHORT})
    assert answer.status_code == 200
    body = validate(ChatCompletion, answer.content)
    assert body.model == model
    assert body.choices[0].message.content
    assert body.choices[0].finish_reason == "length"
    assert body.usage is not None
    assert body.usage.completion_tokens == 12
    assert body.usage.total_tokens == body.usage.prompt_tokens + 12


def test_a_stream_is_what_openai_documents(http: httpx2.Client, model: str) -> None:
    wanted = {"model": model, "messages": ask("hello"), **SHORT}
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    answer = http.post("/chat/completions", json=wanted | streamed)
    chunks = [validate(ChatCompletionChunk, event) for event in events(answer)]
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    *chunks, last = chunks
    assert last.choices == []
    assert last.usage is not None
    assert all(chunk.usage is None for chunk in chunks)
    roles = [chunk.choices[0].delta.role for chunk in chunks]
    assert roles == ["assistant", *[None] * (len(chunks) - 1)]
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [*[None] * (len(chunks) - 1), "length"]
    whole = ChatCompletion.model_validate_json(http.post("/chat/completions", json=wanted).content)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert whole.usage is not None
    assert last.usage.total_tokens == whole.usage.total_tokens


def test_a_stream_without_usage_has_none(client: openai.OpenAI, model: str) -> None:
    stream = client.chat.completions.create(
        model=model, messages=ask("hi"), max_tokens=4, temperature=0, stream=True
    )
    for chunk in stream:
        assert chunk.choices
        assert chunk.usage is None


async def test_the_async_client(async_client: openai.AsyncOpenAI, model: str) -> None:
    whole = await async_client.chat.completions.create(
        model=model, messages=ask("hi"), max_tokens=9, temperature=0
    )
    stream = await async_client.chat.completions.create(
        model=model, messages=ask("hi"), max_tokens=9, temperature=0, stream=True
    )
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == whole.choices[0].message.content


def test_all_roles_and_parts(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model,
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": "c"},
            {"role": "user", "content": "d", "name": "someone"},
        ],
        max_completion_tokens=3,
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 3


def test_the_stream_helper_rebuilds_the_answer(client: openai.OpenAI, model: str) -> None:
    """The helper refuses answers cut at max_tokens, so this one must end by itself."""
    with client.chat.completions.stream(
        model=model,
        messages=ask("a word?"),
        max_tokens=50,
        stream_options={"include_usage": True},
        extra_body={"guided_regex": "(yes|no), that is it"},
    ) as stream:
        kinds = {event.type for event in stream}
        rebuilt = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    message = rebuilt.choices[0].message
    assert message.content in ("yes, that is it", "no, that is it")
    assert message.role == "assistant"
    assert rebuilt.usage is not None


async def test_the_async_stream_helper(async_client: openai.AsyncOpenAI, model: str) -> None:
    async with async_client.chat.completions.stream(
        model=model, messages=ask("a word?"), max_tokens=50, extra_body={"guided_regex": "yes|no"}
    ) as stream:
        text = "".join([event.delta async for event in stream if event.type == "content.delta"])
    assert text in ("yes", "no")


def test_three_choices(http: httpx2.Client, model: str) -> None:
    wanted = {"model": model, "messages": ask("hello"), "n": 3, "max_tokens": 12, "ignore_eos": True}
    answer = http.post("/chat/completions", json=wanted | {"seed": 3})
    assert answer.status_code == 200, answer.text
    body = validate(ChatCompletion, answer.content)
    assert [choice.index for choice in body.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in body.choices}) == 3
    assert body.usage is not None
    assert body.usage.completion_tokens == 36
    one = http.post("/chat/completions", json=wanted | {"seed": 3, "n": 1})
    assert validate(ChatCompletion, one.content).usage.prompt_tokens == body.usage.prompt_tokens  # type: ignore[union-attr]


def test_three_choices_streamed(http: httpx2.Client, model: str) -> None:
    wanted = {"model": model, "messages": ask("hello"), "n": 3, "max_tokens": 12, "seed": 4}
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    state: ChatCompletionStreamState[None] = ChatCompletionStreamState()
    opened: list[int] = []
    for event in events(http.post("/chat/completions", json=wanted | streamed)):
        chunk = validate(ChatCompletionChunk, event)
        opened += [choice.index for choice in chunk.choices if choice.delta.role]
        state.handle_chunk(chunk)
    assert opened == [0, 1, 2]
    rebuilt = state.current_completion_snapshot
    whole = validate(ChatCompletion, http.post("/chat/completions", json=wanted).content)
    assert [choice.message.content for choice in rebuilt.choices] == [
        choice.message.content for choice in whole.choices
    ]
    assert all(choice.finish_reason for choice in rebuilt.choices)


def test_leaving_a_stream_early_is_no_error(client: openai.OpenAI, model: str) -> None:
    with client.chat.completions.create(
        model=model, messages=ask("hello"), max_tokens=4000, stream=True
    ) as stream:
        for _, _ in zip(range(3), stream, strict=False):
            pass
    assert client.chat.completions.create(model=model, messages=ask("hello"), max_tokens=1).id


@pytest.mark.parametrize("prefix", ["/v3/openai", "/openai/v1", "/v1"])
def test_every_base_url(url: str, key: str, model: str, prefix: str) -> None:
    base = url.removesuffix("/v3/openai") + prefix
    with openai.OpenAI(base_url=base, api_key=key, max_retries=0) as client:
        assert client.chat.completions.create(model=model, messages=ask("hello"), max_tokens=1).choices
