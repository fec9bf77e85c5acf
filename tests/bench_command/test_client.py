"""One call: what is sent, what is read from odd streams, and how every failure is called."""

from __future__ import annotations

import socket

import pytest

from bench_command.servers import BadServer
from toptwo.bench.client import Call, Outcome, Target, error_message, open_client, run_call


async def call(url: str, timeout: float = 5.0) -> Outcome:
    async with open_client(url) as http:
        return await run_call(http, Target(url, "k", "bad"), Call("hi", 2, timeout=timeout))


async def test_a_good_answer_is_timed_and_counted(bad: BadServer) -> None:
    seen = []
    target = Target(bad.at("good"), "secret", "bad")
    async with open_client(bad.url) as http:
        ask = Call("hi", 2, 0.5, {"ignore_eos": True})
        outcome = await run_call(http, target, ask, lambda: seen.append(1))
    assert (outcome.error, outcome.detail) == (None, None)
    assert (outcome.prompt_tokens, outcome.completion_tokens) == (30, 2)
    assert len(outcome.token_times) == len(seen) == 2
    assert outcome.started < outcome.token_times[0] < outcome.token_times[1] <= outcome.ended
    assert outcome.ttft == outcome.token_times[0] - outcome.started
    assert outcome.inter_token == [outcome.token_times[1] - outcome.token_times[0]]
    assert outcome.end_to_end == outcome.ended - outcome.started
    assert bad.bodies == [
        {
            "model": "bad",
            "messages": [{"role": "user", "content": "hi"}],
            "max_tokens": 2,
            "temperature": 0.5,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
        }
    ]
    assert bad.headers[0]["authorization"] == "Bearer secret"


async def test_a_stream_as_others_write_it(bad: BadServer) -> None:
    """Comments, CRLF, line separators inside of a text, torn events, thoughts, null usage, no blank."""
    outcome = await call(bad.at("odd"))
    assert outcome.error is None
    assert len(outcome.token_times) == 3
    assert outcome.prompt_tokens is None


@pytest.mark.parametrize(
    ("behaviour", "error", "detail", "num_chunks"),
    [
        ("http-401", "http 401", "ignore_eos is not known", 0),
        ("http-429", "http 429", "ignore_eos is not known", 0),
        ("cut", "cut short", None, 1),
        ("short", "cut short", None, 1),
        ("hang-up", "disconnected", None, 0),
        ("error-event", "stream error", "out of luck", 1),
        ("noise", "stream error", "an event that is no chat completion chunk", 0),
        ("not-a-chunk", "stream error", "an event that is no chat completion chunk", 0),
    ],
)
async def test_failures_by_kind(
    bad: BadServer, behaviour: str, error: str, detail: str | None, num_chunks: int
) -> None:
    outcome = await call(bad.at(behaviour))
    assert (outcome.error, outcome.detail) == (error, detail)
    assert len(outcome.token_times) == num_chunks
    assert outcome.ended > outcome.started


@pytest.mark.parametrize(("behaviour", "num_chunks"), [("silent", 0), ("stuck", 1)])
async def test_a_server_that_does_not_go_on(bad: BadServer, behaviour: str, num_chunks: int) -> None:
    outcome = await call(bad.at(behaviour), timeout=0.2)
    assert outcome.error == "timeout"
    assert len(outcome.token_times) == num_chunks
    assert 0.19 <= outcome.end_to_end < 4
    assert (outcome.ttft is None) == (num_chunks == 0)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_nobody_there(host: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        outcome = await call(f"http://{host}:{taken.getsockname()[1]}/v1")
    assert outcome.error == "connection refused"


async def test_no_such_host() -> None:
    assert (await call("http://no-such-host.invalid/v1")).error == "connection failed"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "a\\n b"}}', "a b"),
        (b'{"error": "a"}', "a"),
        (b'{"object": "error", "message": "a"}', "a"),
        (b'{"detail": [{"loc": 1}]}', "[{'loc': 1}]"),
        (b"<h1>Bad</h1>\n", "<h1>Bad</h1>"),
        (b"\xff", "\ufffd"),
        (b"", None),
        (b"{}", None),
        (b"x" * 1000, "x" * 300),
    ],
)
def test_what_servers_say(body: bytes, message: str | None) -> None:
    assert error_message(body) == message
