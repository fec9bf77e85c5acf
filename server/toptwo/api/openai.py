"""OpenAI's routes: chat completions and models.

Knows HTTP and who calls; the work itself is done in generation, its JSON in completion, its stream in
sse.
"""

from __future__ import annotations

import time
import uuid
from contextlib import aclosing
from dataclasses import dataclass, field

import anyio
from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from toptwo.api.body import read_body, run_while_connected
from toptwo.api.completion import ChunkWriter, CompletionHead, completion, fingerprint
from toptwo.api.generation import (
    RETRY_AFTER_SECONDS,
    Delta,
    GenerationJob,
    JobTicket,
    engine_unavailable,
    generate,
    prepare,
)
from toptwo.api.health import Lifecycle
from toptwo.api.security import Authenticator
from toptwo.api.sse import EventStream, chat_events
from toptwo.api.validation import ParsedChat, parse_chat
from toptwo.engine.client import Engine
from toptwo.errors import ApiError
from toptwo.messages import EngineInfo
from toptwo.text.model import ServedModel

IGNORED_HEADER = "x-toptwo-ignored"
_SMALL_BODY_BYTES = 64 * 1024
# Threads that parse, render and tokenise. Few: this work competes with the model for the cores.
_NUM_TEXT_THREADS = 2


@dataclass(frozen=True)
class OpenAIEndpoints:
    """The handlers of the routes, bound to one model and one engine."""

    engine: Engine
    model: ServedModel
    lifecycle: Lifecycle
    limiter: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(_NUM_TEXT_THREADS))

    async def list_models(self) -> Response:
        """The models that requests may name."""
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def retrieve_model(self, model_id: str) -> Response:
        """One model. Raises ApiError (404)."""
        self._require_model(model_id)
        return JSONResponse(self._card())

    async def create_chat_completion(self, request: Request) -> Response:
        """Answer a conversation, whole or as a stream."""
        parsed = await self._parse(await read_body(request))
        chat = parsed.request
        self._require_model(chat.model)
        info = self._require_engine()
        head = CompletionHead(
            completion_id=f"chatcmpl-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=self.model.name,
            fingerprint=fingerprint(self.model.name, info),
        )
        ticket = JobTicket(head.completion_id, cache_scope=request.state.key_id)
        preparing = prepare(chat, self.model, ticket, max_model_len=info.max_model_len, limiter=self.limiter)
        headers = {IGNORED_HEADER: ", ".join(parsed.ignored)} if parsed.ignored else {}
        job = await run_while_connected(request, preparing)
        if chat.stream:
            writer = ChunkWriter(head, include_usage=chat.include_usage)
            deltas = generate(self.engine, self.model, job)
            return EventStream(chat_events(deltas, writer, include_usage=chat.include_usage), headers)
        text, last = await run_while_connected(request, self._collect(job))
        return Response(completion(head, text, last), media_type="application/json", headers=headers)

    async def _parse(self, body: bytes) -> ParsedChat:
        if len(body) <= _SMALL_BODY_BYTES:
            return parse_chat(body)
        return await anyio.to_thread.run_sync(parse_chat, body, limiter=self.limiter)

    async def _collect(self, job: GenerationJob) -> tuple[str, Delta]:
        texts = []
        last = Delta("")
        async with aclosing(generate(self.engine, self.model, job)) as deltas:
            async for last in deltas:
                texts.append(last.text)
        return "".join(texts), last

    def _require_model(self, name: str) -> None:
        if name != self.model.name:
            shown = name[:64]
            raise ApiError(
                f"The model '{shown}' does not exist or you do not have access to it.",
                status=404,
                param="model",
                code="model_not_found",
            )

    def _require_engine(self) -> EngineInfo:
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

    def _card(self) -> dict[str, object]:
        return {
            "id": self.model.name,
            "object": "model",
            "created": self.model.created,
            "owned_by": "toptwo",
        }


def openai_router(endpoints: OpenAIEndpoints, authenticate: Authenticator) -> APIRouter:
    """The routes, without a prefix: they are mounted under several. Every one needs a key."""
    router = APIRouter(dependencies=[Depends(authenticate)], tags=["openai"])
    router.add_api_route("/chat/completions", endpoints.create_chat_completion, methods=["POST"])
    router.add_api_route("/models", endpoints.list_models, methods=["GET"])
    router.add_api_route("/models/{model_id:path}", endpoints.retrieve_model, methods=["GET"])
    return router
