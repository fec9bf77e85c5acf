"""OpenAI's routes: chat completions and models.

Knows HTTP and who calls; the work itself is done by the service, its JSON by completion, its stream by
sse.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from toptwo.accounts.caller import Caller
from toptwo.api.chat_job import chat_job
from toptwo.api.completion import ChunkWriter, completion
from toptwo.api.schemas import ChatCompletionRequest
from toptwo.api.security import Authenticator, Credentials
from toptwo.api.service import Service, ignored_header
from toptwo.api.sse import EventStream, data_events


@dataclass(frozen=True)
class OpenAIEndpoints:
    """The handlers of the routes."""

    service: Service

    async def list_models(self, request: Request) -> Response:
        """The models that the caller's requests may name."""
        caller: Caller = request.state.caller
        may_use = caller.models is None or self.service.model.name in caller.models
        return JSONResponse({"object": "list", "data": [self._card()] if may_use else []})

    async def retrieve_model(self, request: Request, model_id: str) -> Response:
        """One model. Raises ApiError (403, 404)."""
        self.service.require_model(request, model_id)
        return JSONResponse(self._card())

    async def create_chat_completion(self, request: Request) -> Response:
        """Answer a conversation, whole or as a stream."""
        parsed = await self.service.parse(request, ChatCompletionRequest)
        chat = parsed.request
        self.service.require_model(request, chat.model)
        head = self.service.head("chatcmpl")
        unused = (name for name in chat.chat_template_kwargs or () if not self.service.model.looks_up(name))
        headers = ignored_header([*parsed.ignored, *(f"chat_template_kwargs.{name}" for name in unused)])
        job = await self.service.prepare(
            request, head.completion_id, lambda ticket, workshop: chat_job(chat, ticket, workshop)
        )
        await self.service.reserve(request, head.completion_id, job)
        logprobs = bool(chat.logprobs)
        if chat.stream:
            writer = ChunkWriter(head, num_choices=chat.num_choices, include_usage=chat.include_usage)
            return EventStream(data_events(self.service.deltas(job), writer), headers)
        choices = await self.service.choices(request, job)
        body = completion(head, choices, logprobs=logprobs)
        return Response(body, media_type="application/json", headers=headers)

    def _card(self) -> dict[str, object]:
        model = self.service.model
        return {"id": model.name, "object": "model", "created": model.created, "owned_by": "toptwo"}


def openai_router(endpoints: OpenAIEndpoints, credentials: Credentials) -> APIRouter:
    """The routes, without a prefix: they are mounted under several. Every one needs a key."""
    router = APIRouter(tags=["openai"])
    router.add_api_route(
        "/chat/completions",
        endpoints.create_chat_completion,
        methods=["POST"],
        dependencies=[Depends(Authenticator(credentials)), Depends(endpoints.service.enter)],
    )
    reading = [Depends(Authenticator(credentials, "models:read"))]
    for path, show in (
        ("/models", endpoints.list_models),
        ("/models/{model_id:path}", endpoints.retrieve_model),
    ):
        router.add_api_route(path, show, methods=["GET"], dependencies=reading)
    return router
