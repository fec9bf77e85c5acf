"""One job from the engine's tokens to the pieces of an answer: the only path, streamed or not.

Knows the model's words, the engine's events and the readers of answers; must not know HTTP or how an
answer is written. Whoever closes or cancels `generate` aborts its requests in the engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal

import structlog

from toptwo.api.events import EventFeed, engine_failed
from toptwo.api.job import GenerationJob, OutputForm, num_together
from toptwo.api.merging import merge
from toptwo.api.token_text import TokenReport, report_tokens
from toptwo.engine.client import Engine
from toptwo.errors import ApiError
from toptwo.messages import GenerateRequest, TokenEvent
from toptwo.telemetry.metrics import Metrics
from toptwo.telemetry.record import RequestRecord, SequenceRecord, sequence_records
from toptwo.text.detokenizer import Detokenizer
from toptwo.text.harmony_reader import HarmonyReader
from toptwo.text.model import ServedModel
from toptwo.text.parsers import Piece, ToolCallStart, make_parser
from toptwo.text.readers import AnswerReader, TextReader
from toptwo.text.stops import StopMatcher

log = structlog.get_logger()

_LOOK_BACK = 8  # tokens of a prompt that decide how the first one after it is written
FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class Usage:
    """Token counts of one answer; the token that ended it is counted.

    reasoning_tokens: those of `completion_tokens` that were thoughts; None for models without.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int | None = None


@dataclass(frozen=True)
class Delta:
    """The next pieces of one choice. Its last one, and no other, has a finish_reason and the counts.

    reports: on the tokens that came, where log-probabilities were asked for.
    prompt_reports: on the prompt's tokens from the second on, in the choice's first delta.
    stop: the stop string that ended the choice, if one did.
    """

    index: int
    pieces: tuple[Piece, ...] = ()
    reports: tuple[TokenReport, ...] = ()
    prompt_reports: tuple[TokenReport, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    stop: str | None = None


def generate(
    engine: Engine, model: ServedModel, job: GenerationJob, overloaded: Callable[[], ApiError]
) -> AsyncGenerator[Delta, None]:
    """The answer in pieces, all choices mixed; tokens that are waiting together come as one delta.

    overloaded: the error for a request that has waited too long for its turn in the engine.
    Raises ApiError at an iteration: 503 when no engine is ready, or none in time, 500 when it fails.
    """
    record = job.record or RequestRecord("", Metrics(""))
    records = sequence_records(record, len(job.requests[0].prompt_ids), len(job.requests))
    choices = [_choice(engine, model, job, at, overloaded, one) for at, one in enumerate(records)]
    if len(choices) == 1:
        return choices[0]
    most = len(choices) if engine.info is None else num_together(job, engine.info)
    order = _Order(asyncio.Event(), asyncio.Semaphore(most))
    return merge([_in_order(choice, order, is_first=at == 0) for at, choice in enumerate(choices)])


def add_up(usages: list[Usage]) -> Usage:
    """The counts of an answer of several choices: the prompt was computed once."""
    thoughts = [u.reasoning_tokens for u in usages if u.reasoning_tokens is not None]
    return Usage(
        usages[0].prompt_tokens,
        sum(u.completion_tokens for u in usages),
        usages[0].cached_tokens,
        sum(thoughts) if thoughts else None,
    )


class _Choice:
    """The state of one choice: from token events to deltas."""

    def __init__(self, model: ServedModel, request: GenerateRequest, form: OutputForm, index: int) -> None:
        self._index = index
        self._model = model
        self._request = request
        self._form = form
        self._stop_token_ids = frozenset(request.stop_token_ids)
        self._reader = _reader(model, request, form)
        self.failure: ApiError | None = None
        self.num_tokens = 0
        self._num_thoughts = 0
        self._num_cached = 0

    def take(self, event: TokenEvent) -> Delta:
        """The delta of an event. `failure` is set when the engine gave the request up."""
        thinking = self._reader.in_reasoning
        self.num_tokens += len(event.token_ids)
        self._num_cached = max(self._num_cached, event.num_cached_tokens)
        shown = event.token_ids
        if event.finish_reason == "stop" and shown and shown[-1] in self._stop_token_ids:
            shown = shown[:-1]  # it may be an ordinary token with a text
        pieces = self._reader.read(shown, last=event.finish_reason is not None)
        ended = event.finish_reason if self._reader.stop is None else "stop"
        if thinking:
            self._num_thoughts += len(event.token_ids)
        if not self._form.parallel_calls and any(isinstance(p, ToolCallStart) and p.index for p in pieces):
            at = next(i for i, p in enumerate(pieces) if isinstance(p, ToolCallStart) and p.index)
            pieces, ended = pieces[:at], "stop"
        if ended in ("abort", "error"):
            self.failure = engine_failed(event.error)
        return Delta(
            self._index,
            tuple(pieces),
            report_tokens(self._model.tokenizer, shown, event.logprobs),
            report_tokens(self._model.tokenizer, self._request.prompt_ids[1:], event.prompt_logprobs),
            self._reason(ended),
            self._usage() if ended in ("stop", "length") else None,
            self._reader.stop,
        )

    def _reason(self, ended: str | None) -> FinishReason | None:
        match ended:
            case "stop":
                return "tool_calls" if self._reader.num_tool_calls else "stop"
            case "length":
                return "length"
            case _:
                return None

    def _usage(self) -> Usage:
        thoughts = None if self._form.reasoning is None else self._num_thoughts
        return Usage(len(self._request.prompt_ids), self.num_tokens, self._num_cached, thoughts)


@dataclass(frozen=True)
class _Order:
    """How the choices of one answer wait for one another.

    begun: the first one has computed the prompt, whose blocks the others share.
    turns: as many as find room in the engine together.
    """

    begun: asyncio.Event
    turns: asyncio.Semaphore


async def _choice(
    engine: Engine,
    model: ServedModel,
    job: GenerationJob,
    index: int,
    overloaded: Callable[[], ApiError],
    record: SequenceRecord,
) -> AsyncGenerator[Delta, None]:
    request = job.requests[index]
    choice = _Choice(model, request, job.form, index)
    feed = EventFeed(engine, request)
    try:
        while True:
            event = await feed.next()
            record.take(event)
            if event.finish_reason == "overload":
                record.end("overload")
                raise overloaded()
            delta = choice.take(event)
            if delta.finish_reason:  # before it is handed out: whoever has it may come no more
                record.end("length" if delta.finish_reason == "length" else "stop")
            if delta.pieces or delta.reports or delta.prompt_reports or delta.finish_reason:
                yield delta
            if choice.failure:
                raise choice.failure
            if delta.finish_reason:
                return
    except (asyncio.CancelledError, GeneratorExit):
        if record.end("abort"):
            log.info("answer given up", sequence=request.request_id, generated_tokens=choice.num_tokens)
        raise
    except Exception:
        record.end("error")
        raise
    finally:
        await feed.close()


async def _in_order(
    choice: AsyncGenerator[Delta, None], order: _Order, *, is_first: bool
) -> AsyncGenerator[Delta, None]:
    """A choice, of many, when its turn has come."""
    if not is_first:
        await order.begun.wait()
    async with order.turns, aclosing(choice) as deltas:
        async for delta in deltas:
            order.begun.set()
            yield delta


def _reader(model: ServedModel, request: GenerateRequest, form: OutputForm) -> AnswerReader:
    """What takes the answer apart."""
    if form.harmony is not None:
        return HarmonyReader(
            form.harmony,
            model.tokenizer,
            form.stops,
            with_thoughts=form.reasoning is not None,
            with_calls=form.tool_format is not None,
        )
    before = request.prompt_ids[-_LOOK_BACK:] if form.continues else ()
    return TextReader(
        Detokenizer(model.tokenizer, _shown_ids(model, form), before),
        StopMatcher(form.stops),
        make_parser(form.tool_format, form.reasoning, starts_in_reasoning=form.in_reasoning),
    )


def _shown_ids(model: ServedModel, form: OutputForm) -> frozenset[int]:
    """Control tokens that a parser needs to see."""
    texts = [*(form.tool_format.shown_tokens if form.tool_format else ())]
    texts += form.reasoning.shown_tokens if form.reasoning else ()
    ids = (model.tokenizer.id_of(text) for text in texts)
    return frozenset(token for token in ids if token is not None)
