"""What became of one HTTP request: counted as it goes on, and one line in the log when it has ended.

Knows times, counts and how a request can end; must not know HTTP's bytes, prompts, outputs or keys.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import structlog

from toptwo.messages import FinishReason, TokenEvent
from toptwo.telemetry.metrics import Metrics

log = structlog.get_logger()

Outcome = Literal["completed", "refused", "failed", "cancelled"]
"""Answered in full; not taken on; taken on and not answered because of the server; or of its client."""

CLIENT_LEFT = 499
"""Nobody reads this status; it is the custom in access logs."""
_QUIET = ("/health", "/metrics")  # asked all the time by machines


@dataclass
class RequestRecord:
    """One HTTP request.

    request_id: the one that its answer carries. began: by time.perf_counter.
    num_sequences: how many were to be generated. finish_reasons: of those that have ended.
    prompt_tokens: of all prompts; begun_prompt_tokens: of those whose answers have begun.
    shows_output: False where the tokens that are generated are nobody's business, and not counted.
    first_token: when the first token of any came. queue_seconds: how long the first one waited for its turn.
    """

    request_id: str
    metrics: Metrics
    began: float = field(default_factory=time.perf_counter)
    num_sequences: int = 0
    finish_reasons: list[FinishReason] = field(default_factory=list)
    shows_output: bool = True
    prompt_tokens: int = 0
    begun_prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    first_token: float | None = None
    queue_seconds: float | None = None

    def expect(self, num_prompt_tokens: int, num_sequences: int) -> None:
        """One prompt more is going to be answered, by so many sequences."""
        self.prompt_tokens += num_prompt_tokens
        self.num_sequences += num_sequences

    @property
    def has_failed(self) -> bool:
        """Whether the server gave up on any sequence."""
        return "error" in self.finish_reasons or "overload" in self.finish_reasons

    @property
    def is_complete(self) -> bool:
        """Whether every sequence has ended as it should."""
        done = sum(reason in ("stop", "length") for reason in self.finish_reasons)
        return 0 < self.num_sequences == done

    def outcome(self, status: int) -> Outcome:
        """How it ended. status: of the answer, which a stream has from its beginning."""
        if self.has_failed or (self.num_sequences and status >= 500):
            return "failed"
        if status == CLIENT_LEFT or self.num_sequences > len(self.finish_reasons):
            return "cancelled"
        if "abort" in self.finish_reasons:
            return "cancelled"
        return "completed" if status < 400 else "failed" if status == 500 else "refused"

    def end(self, method: str, endpoint: str, status: int, key_id: str | None) -> None:
        """Count it and log it. endpoint: the route's own path, which callers cannot write."""
        seconds = time.perf_counter() - self.began
        outcome = self.outcome(status)
        first = None if self.first_token is None else self.first_token - self.began
        self.metrics.count_request(endpoint, status, outcome)
        if self.num_sequences and outcome == "completed":
            self.metrics.count_answer(seconds, self.prompt_tokens, self.completion_tokens)
        fields: dict[str, object] = {
            "request_id": self.request_id,
            "method": method,
            "endpoint": endpoint,
            "status": status,
            "outcome": outcome,
            "key": key_id,
            "seconds": round(seconds, 4),
        }
        if self.num_sequences:
            fields |= {
                "model": self.metrics.model_name,
                "prompt_tokens": self.prompt_tokens,
                "cached_tokens": self.cached_tokens,
                "completion_tokens": self.completion_tokens,
                "queue_seconds": None if self.queue_seconds is None else round(self.queue_seconds, 4),
                "ttft_seconds": None if first is None else round(first, 4),
                "finish_reason": ",".join(sorted(set(self.finish_reasons))) or None,
                "client_left": outcome == "cancelled",
            }
        write = log.debug if endpoint.startswith(_QUIET) and status < 400 else log.info
        write("request", **fields)


class SequenceRecord:
    """One sequence of a request, from its events. is_first: of those with the same prompt."""

    def __init__(self, request: RequestRecord, num_prompt_tokens: int, *, is_first: bool) -> None:
        self._request = request
        self._num_prompt_tokens = num_prompt_tokens
        self._is_first = is_first
        self._last: float | None = None
        self._has_ended = False

    def take(self, event: TokenEvent) -> None:
        """Count an event's tokens."""
        request, count = self._request, len(event.token_ids)
        if not count:
            return
        now = time.perf_counter()
        if request.shows_output:
            request.completion_tokens += count
        if self._last is None:
            self._begin(event, now)
        else:
            request.metrics.token_seconds.add((now - self._last) / count, count)
        self._last = now

    def _begin(self, event: TokenEvent, now: float) -> None:
        request = self._request
        if request.first_token is None:
            request.first_token, request.queue_seconds = now, event.queue_seconds
            request.metrics.first_token_seconds.add(now - request.began)
        if event.queue_seconds is not None:
            request.metrics.queue_seconds.add(event.queue_seconds)
        if self._is_first:
            request.begun_prompt_tokens += self._num_prompt_tokens
            request.cached_tokens += event.num_cached_tokens

    def end(self, reason: FinishReason) -> bool:
        """It has ended; whether nobody has said so before, since only the first reason counts."""
        is_news, self._has_ended = not self._has_ended, True
        if is_news:
            self._request.finish_reasons.append(reason)
            self._request.metrics.count_sequence(reason)
        return is_news


def sequence_records(request: RequestRecord, num_prompt_tokens: int, count: int) -> Sequence[SequenceRecord]:
    """The records of all sequences that answer one prompt."""
    request.expect(num_prompt_tokens, count)
    return [SequenceRecord(request, num_prompt_tokens, is_first=at == 0) for at in range(count)]
