"""What all generating endpoints have in common, from the body of a request to the deltas of its answer.

Knows HTTP requests, one model and one engine; must not know any endpoint's format.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial

from starlette.requests import Request

from toptwo.accounts.book import AccountBook
from toptwo.accounts.caller import Caller
from toptwo.api.admission import Admission, Permit
from toptwo.api.billing import Tab
from toptwo.api.body import read_body, run_while_connected
from toptwo.api.completion import ChoiceText, CompletionHead, collect, fingerprint
from toptwo.api.events import RETRY_AFTER_SECONDS, engine_unavailable
from toptwo.api.fair_threads import FairThreads
from toptwo.api.generation import Delta, generate
from toptwo.api.health import Lifecycle
from toptwo.api.job import GenerationJob, JobTicket, Workshop
from toptwo.api.security import forbidden
from toptwo.api.validation import Parsed, Schema, parse_body
from toptwo.engine.client import Engine
from toptwo.errors import ApiError
from toptwo.messages import EngineInfo
from toptwo.telemetry.record import RequestRecord
from toptwo.text.grammar import GrammarChecker, GrammarError
from toptwo.text.model import ServedModel

IGNORED_HEADER = "x-toptwo-ignored"
_SMALL_BODY_BYTES = 64 * 1024
# Threads that parse, render and tokenise. Few: this work competes with the model for the cores.
_NUM_TEXT_THREADS = 2
_NUM_GRAMMAR_THREADS = 1  # there is one worker to check them, and a check may take seconds

MakeJob = Callable[[JobTicket, Workshop], GenerationJob]


@dataclass(frozen=True)
class Service:
    """One model behind one engine, as endpoints use it."""

    engine: Engine
    model: ServedModel
    grammars: GrammarChecker
    lifecycle: Lifecycle
    admission: Admission
    book: AccountBook | None = None
    text_threads: FairThreads = field(default_factory=lambda: FairThreads(_NUM_TEXT_THREADS))
    grammar_threads: FairThreads = field(default_factory=lambda: FairThreads(_NUM_GRAMMAR_THREADS))

    async def enter(self, request: Request) -> AsyncGenerator[None, None]:
        """A FastAPI dependency that leaves a permit and a tab in the request's state until it is answered.

        It comes behind the authentication. Raises ApiError (429, 503) when there is no room anyway: then
        there is no need to read the body.
        """
        caller: Caller = request.state.caller
        request.state.permit = permit = Permit(self.admission, caller)
        request.state.tab = tab = Tab(self.book, caller, request.state.record)
        permit.require_room(1)
        tab.take_request()
        try:
            yield
        finally:
            permit.release()
            tab.close()

    async def parse(self, request: Request, schema: type[Schema]) -> Parsed[Schema]:
        """The request's body as the schema, once there is room for what it asks for.

        A sender that is slow takes nobody's place. Raises ApiError (400, 408, 413, 429, 503) and
        ClientDisconnect.
        """
        body = await read_body(request)
        permit: Permit = request.state.permit
        permit.take(1)
        if len(body) <= _SMALL_BODY_BYTES:
            parsed = parse_body(body, schema)
        else:
            parsed = await self.text_threads.run(request.state.key_id, partial(parse_body, body, schema))
        permit.take(parsed.request.num_sequences - 1)
        request.state.tab.is_stream = parsed.request.is_stream
        return parsed

    def head(self, kind: str) -> CompletionHead:
        """The head of a new answer, whose id begins with `kind`. Raises ApiError (503)."""
        info = self.require_engine()
        completion_id = f"{kind}-{uuid.uuid4().hex}"
        return CompletionHead(completion_id, int(time.time()), self.model.name, fingerprint(info))

    async def prepare(self, request: Request, request_id: str, make_job: MakeJob) -> GenerationJob:
        """The job, made in threads while the client stays. Raises ApiError (400, 503)."""
        record: RequestRecord = request.state.record
        ticket = JobTicket(request_id, cache_scope=request.state.key_id, log_name=record.request_id)
        workshop = Workshop(self.model, self.require_engine().max_model_len)
        job = await run_while_connected(request, self._make(make_job, ticket, workshop))
        return replace(job, record=record)

    async def reserve(self, request: Request, request_id: str, *jobs: GenerationJob) -> None:
        """Keep what the jobs may take of the caller's limits and credit, before any of them runs.

        Raises ApiError (429, 503).
        """
        tab: Tab = request.state.tab
        await tab.reserve(request_id, self.model.name, jobs)

    def deltas(self, job: GenerationJob) -> AsyncGenerator[Delta, None]:
        """The answer in pieces."""
        return generate(self.engine, self.model, job, self.admission.overloaded)

    async def choices(self, request: Request, job: GenerationJob) -> list[ChoiceText]:
        """The whole answer. Raises ApiError (500, 503) and ClientDisconnect."""
        return await run_while_connected(request, self._collect(job))

    def require_model(self, request: Request, name: str) -> None:
        """Raises ApiError: 404 unless it is the name of the model, 403 where the caller's key excludes it."""
        if name != self.model.name:
            raise ApiError(
                f"The model '{name[:64]}' does not exist or you do not have access to it.",
                status=404,
                param="model",
                code="model_not_found",
            )
        caller: Caller = request.state.caller
        if caller.models is not None and name not in caller.models:
            raise forbidden(f"The API key may not use the model '{name}'.", "model_access_denied")

    def require_engine(self) -> EngineInfo:
        """What the engine is. Raises ApiError (503) when nothing new can be served now."""
        if self.lifecycle.draining:
            raise ApiError(
                "The server is shutting down.",
                status=503,
                kind="server_error",
                code="shutting_down",
                headers={"Retry-After": str(RETRY_AFTER_SECONDS)},
            )
        if self.engine.info is None:
            raise engine_unavailable()
        return self.engine.info

    async def _make(self, make_job: MakeJob, ticket: JobTicket, workshop: Workshop) -> GenerationJob:
        job = await self.text_threads.run(ticket.cache_scope, partial(make_job, ticket, workshop))
        grammar, param = job.requests[0].grammar, job.grammar_param
        if grammar is not None:
            try:
                await self.grammar_threads.run(
                    ticket.cache_scope, partial(self.grammars.check, grammar.source)
                )
            except GrammarError as error:
                message = f"Invalid value for '{param}': {error}"
                raise ApiError(message, param=param, code="invalid_value") from None
        return job

    async def _collect(self, job: GenerationJob) -> list[ChoiceText]:
        deltas = []
        async with aclosing(self.deltas(job)) as stream:
            async for delta in stream:
                deltas.append(delta)
        return collect(deltas, len(job.requests))


def ignored_header(ignored: Sequence[str]) -> dict[str, str]:
    """Tells the caller which fields made no difference."""
    return {IGNORED_HEADER: ", ".join(ignored)} if ignored else {}
