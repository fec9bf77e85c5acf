"""Anthropic's messages, for clients that speak that format: routes, keys and errors in their manner.

Knows HTTP and who calls; the work itself is done by the service as for a chat completion, the JSON by
anthropic_writer.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any

import orjson
from fastapi import APIRouter, Depends
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from toptwo.api.anthropic_chat import NAMES, chat_of, wants_thoughts
from toptwo.api.anthropic_schema import CountTokensRequest, MessagesRequest
from toptwo.api.anthropic_writer import MessageWriter, error_body
from toptwo.api.body import run_while_connected
from toptwo.api.chat_translation import prompt_ids_of, translated_job
from toptwo.api.job import GenerationJob, JobTicket, Workshop
from toptwo.api.named_events import named_events, write_whole
from toptwo.api.sampling_schema import INT32_MAX
from toptwo.api.security import Authenticator, invalid_key
from toptwo.api.service import Service, ignored_header
from toptwo.api.sse import EventStream
from toptwo.api.tokens import in_text_thread
from toptwo.errors import ApiError

KEY_HEADER = "x-api-key"


class AnthropicAuthenticator(Authenticator):
    """Admits requests with an accepted key in x-api-key, or else with a bearer key."""

    def _presented(self, request: Request) -> str:
        headers = request.headers.getlist(KEY_HEADER)
        if not headers:
            return super()._presented(request)
        if len(headers) > 1:
            raise invalid_key()
        return headers[0].strip()


class AnthropicRoute(APIRoute):
    """A route that answers errors, those about keys too, in Anthropic's envelope."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler, with errors caught."""
        handle = super().get_route_handler()

        async def handle_or_explain(request: Request) -> Response:
            try:
                return await handle(request)
            except ApiError as error:
                return JSONResponse(error_body(error), status_code=error.status, headers=error.headers)

        return handle_or_explain


@dataclass(frozen=True)
class AnthropicEndpoints:
    """The handlers of the routes."""

    service: Service

    async def create_message(self, request: Request) -> Response:
        """Answer a conversation, whole or as a stream."""
        parsed = await self.service.parse(request, MessagesRequest)
        wanted = parsed.request
        self.service.require_model(request, wanted.model)
        with_thoughts = wants_thoughts(wanted, can_think=self._can_think)
        head = self.service.head("msg")
        head = replace(head, completion_id=head.completion_id.replace("-", "_", 1))
        headers = ignored_header(parsed.ignored)

        def make_job(ticket: JobTicket, workshop: Workshop) -> GenerationJob:
            return translated_job(chat_of(wanted, can_think=self._can_think), ticket, workshop, NAMES)

        job = await self.service.prepare(request, head.completion_id, make_job)
        await self.service.reserve(request, head.completion_id, job)
        deltas = self.service.deltas(job)
        writer = MessageWriter(head, len(job.requests[0].prompt_ids), with_thoughts=with_thoughts)
        if wanted.stream:
            return EventStream(named_events(deltas, writer), headers)
        await run_while_connected(request, write_whole(deltas, writer))
        return Response(orjson.dumps(writer.message()), media_type="application/json", headers=headers)

    async def count_tokens(self, request: Request) -> Response:
        """How many tokens the prompt of a conversation has."""
        parsed = await self.service.parse(request, CountTokensRequest)
        self.service.require_model(request, parsed.request.model)
        workshop = Workshop(self.service.model, INT32_MAX)

        def prompt_ids() -> list[int]:
            return prompt_ids_of(chat_of(parsed.request, can_think=self._can_think), workshop)

        count = len(await in_text_thread(self.service, request, prompt_ids))
        return JSONResponse({"input_tokens": count}, headers=ignored_header(parsed.ignored))

    @property
    def _can_think(self) -> bool:
        return self.service.model.reasoning is not None


def messages_router(service: Service, authenticate: AnthropicAuthenticator) -> APIRouter:
    """The routes, without a prefix. Every one needs a key."""
    router = APIRouter(
        dependencies=[Depends(authenticate), Depends(service.enter)],
        tags=["anthropic"],
        route_class=AnthropicRoute,
    )
    endpoints = AnthropicEndpoints(service)
    router.add_api_route("/messages", endpoints.create_message, methods=["POST"])
    router.add_api_route("/messages/count_tokens", endpoints.count_tokens, methods=["POST"])
    return router
