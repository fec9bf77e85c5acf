"""The engine's events of one request, read apart from the response that waits for them.

Knows the engine; must not know texts or HTTP. Closing a feed aborts its request in the engine.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import anyio
import structlog

from toptwo.engine.client import Engine
from toptwo.errors import ApiError, EngineDeadError
from toptwo.messages import GenerateRequest, TokenEvent

log = structlog.get_logger()

RETRY_AFTER_SECONDS = 5  # about what an engine needs to be restarted
_CLOSE_SECONDS = 5.0


def engine_unavailable() -> ApiError:
    """The answer while the engine loads or restarts."""
    return ApiError(
        "The model is not ready. Try again shortly.",
        status=503,
        kind="server_error",
        code="engine_unavailable",
        headers={"Retry-After": str(RETRY_AFTER_SECONDS)},
    )


def engine_failed(sentence: str | None) -> ApiError:
    """The answer when the engine gave up a request."""
    return ApiError(sentence or "The model failed to answer.", status=500, kind="server_error")


class EventFeed:
    """The engine's events of one request, read by a task of its own.

    Events that come while the last one is still being written are joined. And cancellation is kept apart:
    whoever waits may be cancelled at any await, while the task's generator is cancelled once and then
    cleans up in peace: it has an abort to send.
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
            log.error("request could not be closed in the engine", sequence=self._request.request_id)

    async def _read(self, engine: Engine) -> None:
        failure = engine_failed(None)
        try:
            async with aclosing(engine.generate(self._request)) as events:
                async for event in events:
                    self._waiting.append(event)
                    self._arrival.set()
        except EngineDeadError:
            failure = engine_unavailable()
        except Exception:
            log.exception("request failed in the engine", sequence=self._request.request_id)
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
        [one for event in events for one in event.logprobs],
        [one for event in events for one in event.prompt_logprobs],
        next((event.queue_seconds for event in events if event.queue_seconds is not None), None),
    )
