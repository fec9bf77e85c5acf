"""One streamed chat completion, timed: what is asked, what came back and when.

Knows OpenAI's stream as servers really write it, and how a request can fail; must not know how many
requests there are or what is made of the figures. A server's failure is a result here, never an exception.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx2
import orjson

LONGEST_DETAIL = 300  # characters of a server's error message that are kept


@dataclass(frozen=True)
class Target:
    """A server and a model of it. base_url: as OpenAI clients take it, ending in /v1 or /v3/openai."""

    base_url: str
    api_key: str | None
    model: str


@dataclass(frozen=True)
class Call:
    """One request. extra: further fields of its JSON body. timeout: seconds for all of it."""

    prompt: str
    max_tokens: int
    temperature: float = 0.0
    extra: dict[str, object] = field(default_factory=dict)
    timeout: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a call; times are those of time.perf_counter.

    token_times: the arrival of each chunk that carried text. A server may put several tokens into one.
    prompt_tokens, completion_tokens: as the server counted them; None when it did not say.
    error: the kind of failure ("http 429", "timeout", "cut short", ...). detail: the server's own words.
    """

    started: float
    token_times: list[float]
    ended: float
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    error: str | None = None
    detail: str | None = None

    @property
    def ttft(self) -> float | None:
        """Seconds to the first text; None when there was none."""
        return self.token_times[0] - self.started if self.token_times else None

    @property
    def inter_token(self) -> list[float]:
        """Seconds between chunks that follow each other."""
        return [later - earlier for earlier, later in itertools.pairwise(self.token_times)]

    @property
    def end_to_end(self) -> float:
        """Seconds from the request to the end of its answer."""
        return self.ended - self.started


@dataclass
class _Tape:
    """What has been seen of an answer so far."""

    on_token: Callable[[], None] | None = None
    token_times: list[float] = field(default_factory=list)
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    answered: bool = False
    finished: bool = False
    ended: float | None = None
    error: str | None = None
    detail: str | None = None

    def take(self, data: bytes, now: float) -> None:
        """Note the data of one event, which arrived at `now`."""
        if data == b"[DONE]":
            self.finished, self.ended = True, now
            return
        try:
            self._read(orjson.loads(data), now)
        except (orjson.JSONDecodeError, AttributeError, TypeError):
            self.fail("stream error", "an event that is no chat completion chunk")

    def _read(self, chunk: Any, now: float) -> None:
        if chunk.get("error"):
            self.fail("stream error", _message_of(chunk))
            return
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta") or {}
            # Models that think aloud do so under one of two other names.
            if delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning"):
                self.token_times.append(now)
                if self.on_token:
                    self.on_token()
            self.finished = self.finished or bool(choice.get("finish_reason"))
        if usage := chunk.get("usage"):
            self.prompt_tokens = usage.get("prompt_tokens")
            self.completion_tokens = usage.get("completion_tokens")

    def fail(self, kind: str, detail: str | None = None) -> None:
        """Note the first failure; what follows from it is no news."""
        if self.error is None:
            self.error, self.detail = kind, detail


def open_client(target_url: str) -> httpx2.AsyncClient:
    """A client that never makes a request wait for a connection; timeouts are the calls' own."""
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=60)
    return httpx2.AsyncClient(
        limits=limits,
        timeout=None,
        # No proxy can reach a server on this machine, whatever the environment says about proxies.
        trust_env=not is_local(target_url),
        # Without TLS there is nothing to verify, and loading the trust store takes longer than a request.
        verify=httpx2.URL(target_url).scheme == "https",
    )


def is_local(url: str) -> bool:
    """Whether a URL leads to this machine."""
    return httpx2.URL(url).host in ("localhost", "127.0.0.1", "::1", "0.0.0.0")  # noqa: S104


def headers_of(api_key: str | None) -> dict[str, str]:
    """The headers that identify the caller."""
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def kind_of(error: BaseException, *, answered: bool = False) -> str:
    """The kind of failure behind a transport's exception, in the words that are counted."""
    if isinstance(error, TimeoutError | httpx2.TimeoutException):
        return "timeout"
    if isinstance(error, httpx2.ConnectError):
        refused = any(isinstance(cause, ConnectionRefusedError) for cause in _causes(error))
        return "connection refused" if refused else "connection failed"
    return "cut short" if answered else "disconnected"


async def run_call(
    http: httpx2.AsyncClient, target: Target, call: Call, on_token: Callable[[], None] | None = None
) -> Outcome:
    """Make the call and wait for the end of its answer. Raises nothing for a server's failure.

    on_token: called at every chunk of text, for those who watch.
    """
    tape = _Tape(on_token)
    started = time.perf_counter()
    try:
        async with asyncio.timeout(call.timeout):
            await _stream(http, target, call, tape)
    except (TimeoutError, httpx2.HTTPError) as error:
        if tape.ended is None:  # behind the end of the answer, nothing can go wrong with it
            tape.fail(kind_of(error, answered=tape.answered))
    if not tape.finished:
        tape.fail("cut short")
    return Outcome(
        started=started,
        token_times=tape.token_times,
        ended=time.perf_counter() if tape.ended is None else tape.ended,
        prompt_tokens=tape.prompt_tokens,
        completion_tokens=tape.completion_tokens,
        error=tape.error,
        detail=tape.detail,
    )


async def _stream(http: httpx2.AsyncClient, target: Target, call: Call, tape: _Tape) -> None:
    body: dict[str, object] = {
        "model": target.model,
        "messages": [{"role": "user", "content": call.prompt}],
        "max_tokens": call.max_tokens,
        "temperature": call.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
        **call.extra,
    }
    headers = {"Content-Type": "application/json", **headers_of(target.api_key)}
    url = f"{target.base_url.rstrip('/')}/chat/completions"
    async with http.stream("POST", url, content=orjson.dumps(body), headers=headers) as response:
        if response.status_code != 200:
            tape.fail(f"http {response.status_code}")
            tape.detail = error_message(await response.aread())
            return
        tape.answered = True
        async for data, now in _events(response):
            tape.take(data, now)


async def _events(response: httpx2.Response) -> AsyncIterator[tuple[bytes, float]]:
    """The data of each event and its time of arrival.

    Lines end at newlines only. Text libraries also break lines at U+2028 and its like, which are
    ordinary characters in the middle of a JSON string.
    """
    rest = b""
    async for received in response.aiter_bytes():
        now = time.perf_counter()
        *lines, rest = (rest + received).split(b"\n")
        for line in lines:
            if line.startswith(b"data:") and (data := line[5:].strip()):
                yield data, now


def error_message(body: bytes) -> str | None:
    """What a server says in an error body, on one line; OpenAI's envelope or any other."""
    try:
        return _message_of(orjson.loads(body))
    except orjson.JSONDecodeError:
        return _on_one_line(body.decode(errors="replace"))


def _message_of(body: object) -> str | None:
    inner = body
    while isinstance(inner, dict):
        inner = inner.get("error") or inner.get("message") or inner.get("detail")
    return None if inner is None else _on_one_line(str(inner))


def _on_one_line(text: str) -> str | None:
    return " ".join(text.split())[:LONGEST_DETAIL] or None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An exception and all that led to it; happy eyeballs wrap theirs in a group."""
    yield error
    for inner in getattr(error, "exceptions", ()):
        yield from _causes(inner)
    cause = error.__cause__ or error.__context__
    if cause is not None:
        yield from _causes(cause)
