"""The engine's loop: take in messages, plan a step, run it, hand out its tokens.

One thread, one loop. Knows the scheduler, a runner and a socket; must not know torch or HTTP. What
goes wrong with one request ends that request; what goes wrong in a step ends the process, because
the KV cache can no longer be trusted, and whoever started it starts it anew.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

import structlog

from toptwo.engine.scheduler import Scheduler
from toptwo.engine.transport import EngineSocket
from toptwo.messages import (
    SECONDS,
    AbortRequest,
    ClientMessage,
    EngineInfo,
    EngineStats,
    GenerateRequest,
    Hello,
    Histogram,
    StatsRequest,
    StepPlan,
    StepResult,
    TokenEvent,
    TokenEvents,
)

log = structlog.get_logger()

_PREPARING_SECONDS = 0.002  # between two looks at what is being prepared, where there is nothing else to do


class Runner(Protocol):
    """The runtime's side of waist 2."""

    @property
    def overlaps(self) -> bool:
        """Whether a launched step runs by itself, so that the next one is better launched at once."""

    def launch(self, plan: StepPlan) -> Callable[[], StepResult]:
        """Begin a step; what is returned waits for its result. Results are taken in the order of steps."""

    def expert_tokens(self) -> dict[int, list[int]]:
        """By layer, how many tokens came to each expert so far."""


class _Origin(NamedTuple):
    """Who asked: a client's routing id, and what the logs call its request."""

    client: bytes
    log_name: str


class Engine:
    """Serves clients on a socket until the process is ended."""

    def __init__(self, scheduler: Scheduler, runner: Runner, socket: EngineSocket, info: EngineInfo) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._socket = socket
        self._info = info
        self._origins: dict[str, _Origin] = {}
        self._launched: deque[Callable[[], StepResult]] = deque()
        self._step_seconds = Histogram.over(SECONDS)

    def run(self) -> None:
        """Loop for ever. Raises what a step raised, after every request was told."""
        while True:
            self.receive(block=not self._scheduler.has_work and not self._launched)
            self.step()

    def receive(self, *, block: bool) -> None:
        """Handle waiting messages; with `block`, wait for the first."""
        while received := self._socket.receive(block=block):
            self._handle(*received)
            block = False

    def step(self) -> None:
        """Plan and launch a step, if there is anything to run, and report the one whose result is due."""
        try:
            self._expire()
            began = time.perf_counter()
            plan = self._scheduler.plan()
            if plan:
                self._launched.append(self._runner.launch(plan))
            if len(self._launched) > (1 if plan and self._runner.overlaps else 0):
                result = self._launched.popleft()()
                self._step_seconds.add(time.perf_counter() - began)
                self._send(self._scheduler.apply(result))
            elif not plan and self._scheduler.has_work:
                time.sleep(_PREPARING_SECONDS)
        except Exception:
            log.error("step failed", requests=sorted({origin.log_name for origin in self._origins.values()}))
            self._send(self._scheduler.fail_all("the engine failed while it computed this request"))
            raise

    def _expire(self) -> None:
        if expired := self._scheduler.expire():
            log.warning("requests waited too long", count=len(expired))
            self._send(expired)

    def _handle(self, client: bytes, message: ClientMessage) -> None:
        match message:
            case Hello():
                self._socket.send(client, self._info)
            case GenerateRequest():
                self._add(client, message)
            case AbortRequest():
                self._abort(message.request_id)
            case StatsRequest():
                self._socket.send(client, self._stats())

    def _add(self, client: bytes, request: GenerateRequest) -> None:
        try:
            refusal = self._scheduler.add(request)
        except Exception:  # nothing was computed for it yet, so it can go alone
            log.exception("request failed", request_id=request.log_name, sequence=request.request_id)
            self._scheduler.abort(request.request_id)
            error = "the engine failed to take in this request"
            refusal = TokenEvent(request.request_id, [], "error", error=error)
        if refusal is None:
            self._origins[request.request_id] = _Origin(client, request.log_name)
        else:
            names = {"request_id": request.log_name, "sequence": request.request_id}
            log.warning("request refused", **names, reason=refusal.error)
            self._socket.send(client, TokenEvents([refusal]))

    def _abort(self, request_id: str) -> None:
        event = self._scheduler.abort(request_id)
        if event:
            names = {"request_id": self._origins[request_id].log_name, "sequence": request_id}
            log.info("request aborted", **names, free_blocks=self._scheduler.blocks.num_free)
            self._send([event])

    def _stats(self) -> EngineStats:
        scheduler = self._scheduler
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_free_blocks=scheduler.blocks.num_free,
            preemptions=scheduler.num_preemptions,
            prompt_tokens=scheduler.num_prompt_tokens,
            generation_tokens=scheduler.num_generated_tokens,
            prefix_queries=scheduler.num_prefix_queries,
            prefix_hits=scheduler.num_prefix_hits,
            step_seconds=self._step_seconds,
            expert_tokens=self._runner.expert_tokens(),
        )

    def _send(self, events: list[TokenEvent]) -> None:
        """One message per client with all of its events."""
        by_client: dict[bytes, list[TokenEvent]] = {}
        for event in events:
            origin = self._origins.get(event.request_id)
            if origin is None:  # it has ended meanwhile
                continue
            by_client.setdefault(origin.client, []).append(event)
            if event.finish_reason:
                del self._origins[event.request_id]
        for client, own in by_client.items():
            self._socket.send(client, TokenEvents(own))
