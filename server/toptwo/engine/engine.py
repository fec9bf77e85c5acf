"""The engine's loop: take in messages, plan a step, run it, hand out its tokens.

One thread, one loop. Knows the scheduler, a runner and a socket; must not know torch or HTTP. What
goes wrong with one request ends that request; what goes wrong in a step ends the process, because
the KV cache can no longer be trusted, and whoever started it starts it anew.
"""

from __future__ import annotations

from typing import Protocol

import structlog

from toptwo.engine.scheduler import Scheduler
from toptwo.engine.transport import EngineSocket
from toptwo.messages import (
    AbortRequest,
    EngineInfo,
    GenerateRequest,
    Hello,
    StepPlan,
    StepResult,
    TokenEvent,
    TokenEvents,
)

log = structlog.get_logger()


class Runner(Protocol):
    """The runtime's side of waist 2."""

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step; blocks until it is done."""


class Engine:
    """Serves clients on a socket until the process is ended."""

    def __init__(self, scheduler: Scheduler, runner: Runner, socket: EngineSocket, info: EngineInfo) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._socket = socket
        self._info = info
        self._client_of: dict[str, bytes] = {}

    def run(self) -> None:
        """Loop for ever. Raises what a step raised, after every request was told."""
        while True:
            self.receive(block=not self._scheduler.has_work)
            self.step()

    def receive(self, *, block: bool) -> None:
        """Handle waiting messages; with `block`, wait for the first."""
        while received := self._socket.receive(block=block):
            self._handle(*received)
            block = False

    def step(self) -> None:
        """Plan, run and report one step, if there is anything to run."""
        try:
            plan = self._scheduler.plan()
            if plan:
                self._send(self._scheduler.apply(self._runner.execute(plan)))
        except Exception:
            self._send(self._scheduler.fail_all("the engine failed while it computed this request"))
            raise

    def _handle(self, client: bytes, message: Hello | GenerateRequest | AbortRequest) -> None:
        match message:
            case Hello():
                self._socket.send(client, self._info)
            case GenerateRequest():
                self._add(client, message)
            case AbortRequest():
                self._abort(message.request_id)

    def _add(self, client: bytes, request: GenerateRequest) -> None:
        refusal = self._scheduler.add(request)
        if refusal is None:
            self._client_of[request.request_id] = client
        else:
            log.warning("request refused", request_id=request.request_id, reason=refusal.error)
            self._socket.send(client, TokenEvents([refusal]))

    def _abort(self, request_id: str) -> None:
        event = self._scheduler.abort(request_id)
        if event:
            log.info("request aborted", request_id=request_id, free_blocks=self._scheduler.blocks.num_free)
            self._send([event])

    def _send(self, events: list[TokenEvent]) -> None:
        """One message per client with all of its events."""
        by_client: dict[bytes, list[TokenEvent]] = {}
        for event in events:
            by_client.setdefault(self._client_of[event.request_id], []).append(event)
            if event.finish_reason:
                del self._client_of[event.request_id]
        for client, own in by_client.items():
            self._socket.send(client, TokenEvents(own))
