"""The clients that people use, against a real server."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator, Callable

import openai
import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletionMessageParam

from server_process import ServerProcess

MODEL = "tiny-moe"


def ask(text: str) -> list[ChatCompletionMessageParam]:
    return [{"role": "user", "content": text}]


@pytest.fixture
async def client(server: ServerProcess) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=server.url, api_key=server.key, max_retries=0) as client:
        yield client


def test_the_sync_client(server: ServerProcess) -> None:
    with openai.OpenAI(base_url=server.url, api_key=server.key) as client:
        assert [model.id for model in client.models.list()] == [MODEL]
        answer = client.chat.completions.create(
            model=MODEL, messages=ask("hello"), max_tokens=12, temperature=0
        )
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 12
        stream = client.chat.completions.create(
            model=MODEL, messages=ask("hello"), max_tokens=12, temperature=0, stream=True
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert text == answer.choices[0].message.content


async def test_the_accumulator_rebuilds_the_answer(client: openai.AsyncOpenAI) -> None:
    state: ChatCompletionStreamState[None] = ChatCompletionStreamState()
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=ask("tell me"),
        max_tokens=20,
        seed=5,
        stream=True,
        stream_options={"include_usage": True},
    )
    async for chunk in stream:
        state.handle_chunk(chunk)
    whole = await client.chat.completions.create(model=MODEL, messages=ask("tell me"), max_tokens=20, seed=5)
    rebuilt = state.current_completion_snapshot
    assert rebuilt.choices[0].message.content == whole.choices[0].message.content
    assert rebuilt.choices[0].message.role == "assistant"
    assert rebuilt.choices[0].finish_reason == "length"
    assert rebuilt.usage is not None
    assert whole.usage is not None
    assert rebuilt.usage.total_tokens == whole.usage.total_tokens


async def test_32_streams_get_what_each_gets_alone(
    client: openai.AsyncOpenAI, start: Callable[..., ServerProcess]
) -> None:
    """Half of them greedy, half sampled with a seed; prompts of many lengths.

    Alone means on another server, without a prefix cache: nothing of the crowd can be reused there.
    """

    async def stream(client: openai.AsyncOpenAI, index: int) -> tuple[str, list[str]]:
        text, ends = "", []
        async for chunk in await client.chat.completions.create(
            model=MODEL,
            messages=ask(f"{index} hello world " * (1 + 3 * index)),
            max_tokens=64,
            temperature=0 if index % 2 else 0.8,
            top_p=0.9,
            seed=index,
            stream=True,
        ):
            text += chunk.choices[0].delta.content or ""
            ends += [chunk.choices[0].finish_reason] if chunk.choices[0].finish_reason else []
        return text, ends

    together = await asyncio.gather(*(stream(client, index) for index in range(32)))
    lonely = start("--no-prefix-caching", "--max-num-seqs", "1").wait_until_ready()
    async with openai.AsyncOpenAI(base_url=lonely.url, api_key=lonely.key) as alone:
        assert together == [await stream(alone, index) for index in range(32)]
    assert all(ends in (["length"], ["stop"]) for _, ends in together)
    assert len({text for text, _ in together[::2]}) == 16  # greedy answers may fall into the same loop


def curl(server: ServerProcess, path: str, *arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        ["curl", "-sN", "-w", "\n%{http_code}", *arguments, server.root + path],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    body, _, status = done.stdout.rpartition("\n")
    return int(status), body


def test_curl_streams_to_done(server: ServerProcess) -> None:
    body = {"model": MODEL, "messages": ask("hello"), "max_tokens": 4, "stream": True}
    status, text = curl(
        server,
        "/v1/chat/completions",
        "-H",
        f"Authorization: Bearer {server.key}",
        "-H",
        "Content-Type: application/json",
        "-d",
        json.dumps(body),
    )
    assert status == 200
    lines = [line for line in text.split("\n") if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[0][6:])["choices"][0]["delta"]["role"] == "assistant"


def test_curl_without_a_key_is_told_so(server: ServerProcess) -> None:
    status, text = curl(server, "/v3/openai/models")
    assert status == 401
    assert set(json.loads(text)["error"]) == {"message", "type", "param", "code"}


def test_the_line_to_copy_from_the_banner_works(server: ServerProcess) -> None:
    line = next(line for line in server.out.splitlines() if line.strip().startswith("curl "))
    done = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.rstrip().endswith("data: [DONE]")


async def test_a_prompt_over_the_context_names_both_numbers(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"maximum context length is 8192 tokens.*\d{5}") as e:
        await client.chat.completions.create(model=MODEL, messages=ask("x" * 20_000))
    assert (e.value.code, e.value.param) == ("context_length_exceeded", "messages")


async def test_a_repeated_prompt_is_cached(client: openai.AsyncOpenAI) -> None:
    cached = []
    for _ in range(2):
        answer = await client.chat.completions.create(
            model=MODEL, messages=ask("a prompt of its own " * 20), max_tokens=1
        )
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        cached.append(answer.usage.prompt_tokens_details.cached_tokens or 0)
    assert cached[0] < 32 <= cached[1]
