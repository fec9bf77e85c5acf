"""One chat completion from a checked request to pieces of text: the only path, streamed or not.

Knows the model's words, the engine's events and stop strings; must not know HTTP or how an answer is
written. Whoever closes or cancels `generate` aborts the request in the engine.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal

import anyio
import structlog

from toptwo.api.schemas import ChatCompletionRequest
from toptwo.engine.client import Engine
from toptwo.errors import ApiError, EngineDeadError
from toptwo.messages import GenerateRequest, SamplingParams, TokenEvent
from toptwo.text.detokenizer import Detokenizer
from toptwo.text.model import ServedModel
from toptwo.text.stops import StopMatcher
from toptwo.text.template import Message

log = structlog.get_logger()

RETRY_AFTER_SECONDS = 5  # about what an engine needs to be restarted
_CLOSE_SECONDS = 5.0


@dataclass(frozen=True)
class Usage:
    """Token counts of one completion; the token that ended it is counted."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class Delta:
    """The next piece of an answer. The last one, and no other, has finish_reason and usage."""

    text: str
    finish_reason: Literal["stop", "length"] | None = None
    usage: Usage | None = None


@dataclass(frozen=True)
class GenerationJob:
    """What one answer needs: the engine's request, and the stop strings it does not know."""

    request: GenerateRequest
    stops: tuple[str, ...] = ()


@dataclass(frozen=True)
class JobTicket:
    """Whose job it is: a request id unique in the engine, and the scope of its cached prompts."""

    request_id: str
    cache_scope: str


async def prepare(
    chat: ChatCompletionRequest,
    model: ServedModel,
    ticket: JobTicket,
    *,
    max_model_len: int,
    limiter: anyio.CapacityLimiter,
) -> GenerationJob:
    """Render and tokenise the messages, in a thread, and fit the job into the context.

    Raises ApiError (400) when the template refuses the messages or they do not fit.
    """
    prompt_ids = await anyio.to_thread.run_sync(
        model.encode_chat, _messages(chat), limiter=limiter, abandon_on_cancel=True
    )
    request = GenerateRequest(
        request_id=ticket.request_id,
        prompt_ids=prompt_ids,
        sampling=_sampling(chat),
        max_tokens=_fit(len(prompt_ids), chat.most_tokens, max_model_len),
        stop_token_ids=[] if chat.ignore_eos else list(model.stop_token_ids),
        cache_scope=ticket.cache_scope,
    )
    return GenerationJob(request, chat.stops)


async def generate(engine: Engine, model: ServedModel, job: GenerationJob) -> AsyncGenerator[Delta, None]:
    """The answer in pieces; tokens that are waiting together come as one piece.

    Raises ApiError: 503 when no engine is ready, 500 when it fails.
    """
    detokenizer, stops = Detokenizer(model.tokenizer), StopMatcher(job.stops)
    stop_token_ids = frozenset(job.request.stop_token_ids)
    num_tokens = num_cached = 0
    feed = _EventFeed(engine, job.request)
    try:
        while True:
            event = await feed.next()
            num_tokens += len(event.token_ids)
            num_cached = max(num_cached, event.num_cached_tokens)
            shown = event.token_ids
            if event.finish_reason == "stop" and shown and shown[-1] in stop_token_ids:
                shown = shown[:-1]  # it may be an ordinary token with a text
            text = stops.push(detokenizer.push(shown))
            if event.finish_reason is not None:
                text += stops.push(detokenizer.flush()) + stops.flush()
            ended = "stop" if stops.matched else event.finish_reason
            if ended == "stop" or ended == "length":
                yield Delta(text, ended, Usage(len(job.request.prompt_ids), num_tokens, num_cached))
                return
            if text:
                yield Delta(text)
            if ended is not None:
                raise _engine_failed(event.error)
    except (asyncio.CancelledError, GeneratorExit):
        log.info("client left", request_id=job.request.request_id, generated_tokens=num_tokens)
        raise
    finally:
        await feed.close()


def engine_unavailable() -> ApiError:
    """The answer while the engine loads or restarts."""
    return ApiError(
        "The model is not ready. Try again shortly.",
        status=503,
        kind="server_error",
        code="engine_unavailable",
        headers={"Retry-After": str(RETRY_AFTER_SECONDS)},
    )


class _EventFeed:
    """The engine's events of one request, read by a task of its own.

    The task keeps cancellation apart: a response is cancelled through a scope that strikes at every
    await, even in the engine generator's own clean-up, which has an abort to send. The task's
    generator is cancelled once and then cleans up in peace. It also lets events that come together
    be joined.
    """

    def __init__(self, engine: Engine, request: GenerateRequest) -> None:
        self._request = request
        self._waiting: list[TokenEvent] = []
        self._failure: ApiError | None = None
        self._arrival = asyncio.Event()
        self._task = asyncio.create_task(self._read(engine), name=f"events of {request.request_id}")

    async def next(self) -> TokenEvent:
        """All events that are waiting, as one; at least one. Raises ApiError when the engine fails."""
        await self._arrival.wait()
        events, self._waiting = self._waiting, []
        if not events and self._failure is not None:
            raise self._failure
        if self._failure is None:
            self._arrival.clear()
        return _join(events)

    async def close(self) -> None:
        """End the request; the engine is told unless it has ended by itself."""
        self._task.cancel()
        with anyio.move_on_after(_CLOSE_SECONDS, shield=True) as scope:
            await asyncio.wait({self._task})
        if scope.cancelled_caught:
            log.error("request could not be closed in the engine", request_id=self._request.request_id)

    async def _read(self, engine: Engine) -> None:
        failure = _engine_failed(None)
        try:
            async with aclosing(engine.generate(self._request)) as events:
                async for event in events:
                    self._waiting.append(event)
                    self._arrival.set()
        except EngineDeadError:
            failure = engine_unavailable()
        except Exception:
            log.exception("request failed in the engine", request_id=self._request.request_id)
        self._failure = failure  # or the end of the events; nobody asks behind the terminal one
        self._arrival.set()


def _join(events: list[TokenEvent]) -> TokenEvent:
    if len(events) == 1:
        return events[0]
    last = events[-1]
    return TokenEvent(
        last.request_id,
        [token_id for event in events for token_id in event.token_ids],
        last.finish_reason,
        max(event.num_cached_tokens for event in events),
        last.error,
    )


def _engine_failed(sentence: str | None) -> ApiError:
    return ApiError(sentence or "The model failed to answer.", status=500, kind="server_error")


def _messages(chat: ChatCompletionRequest) -> list[Message]:
    """The conversation as templates know it, which have no developer."""
    return [
        {
            "role": "system" if message.role == "developer" else message.role,
            "content": message.text,
            **({"name": message.name} if message.name else {}),
        }
        for message in chat.messages
    ]


def _sampling(chat: ChatCompletionRequest) -> SamplingParams:
    """The caller's choices; msgspec's defaults are OpenAI's."""
    chosen: dict[str, Any] = {
        "temperature": chat.temperature,
        "top_p": chat.top_p,
        "top_k": None if chat.top_k is None else max(chat.top_k, 0),
        "min_p": chat.min_p,
        "presence_penalty": chat.presence_penalty,
        "frequency_penalty": chat.frequency_penalty,
        "repetition_penalty": chat.repetition_penalty,
    }
    seed = secrets.randbits(64) - 2**63 if chat.seed is None else chat.seed
    return SamplingParams(seed=seed, **{name: value for name, value in chosen.items() if value is not None})


def _fit(num_prompt: int, most_tokens: int | None, max_model_len: int) -> int:
    """How many tokens may be generated: what the caller allows, by default all that fit.

    Raises ApiError (400, context_length_exceeded) in OpenAI's words, which agents search for.
    """
    wanted = most_tokens or 1
    if num_prompt + wanted <= max_model_len:
        return most_tokens or max_model_len - num_prompt
    message = f"This model's maximum context length is {max_model_len} tokens. However, "
    if num_prompt > max_model_len:
        message += f"your messages resulted in {num_prompt} tokens. Please reduce the length of the messages."
    else:
        message += (
            f"you requested {num_prompt + wanted} tokens ({num_prompt} in the messages, {wanted} in the"
            " completion). Please reduce the length of the messages or completion."
        )
    raise ApiError(message, param="messages", code="context_length_exceeded")
