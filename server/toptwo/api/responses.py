"""OpenAI's responses, without a memory: each request brings its whole conversation.

Knows HTTP and who calls; the work itself is done by the service as for a chat completion, the JSON by
responses_writer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import orjson
from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response

from toptwo.api.body import run_while_connected
from toptwo.api.chat_translation import translated_job
from toptwo.api.job import GenerationJob, JobTicket, Workshop
from toptwo.api.named_events import named_events, write_whole
from toptwo.api.responses_chat import NAMES, Abilities, chat_of
from toptwo.api.responses_schema import ResponsesRequest
from toptwo.api.responses_writer import ResponseWriter
from toptwo.api.security import Authenticator
from toptwo.api.service import Service, ignored_header
from toptwo.api.sse import EventStream


@dataclass(frozen=True)
class ResponsesEndpoint:
    """The handler of the route."""

    service: Service

    async def create_response(self, request: Request) -> Response:
        """Answer a conversation, whole or as a stream."""
        parsed = await self.service.parse(request, ResponsesRequest)
        wanted = parsed.request
        self.service.require_model(request, wanted.model)
        head = self.service.head("resp")
        head = replace(head, completion_id=head.completion_id.replace("-", "_", 1))
        model = self.service.model
        abilities = Abilities(model.reasoning is not None, model.looks_up("reasoning_effort"))
        ignored = [name for name in parsed.ignored if not abilities.effort or name != "reasoning.effort"]
        headers = ignored_header(ignored)

        def make_job(ticket: JobTicket, workshop: Workshop) -> GenerationJob:
            return translated_job(chat_of(wanted, abilities), ticket, workshop, NAMES)

        job = await self.service.prepare(request, head.completion_id, make_job)
        await self.service.reserve(request, head.completion_id, job)
        deltas = self.service.deltas(job)
        writer = ResponseWriter(head, wanted)
        if wanted.stream:
            return EventStream(named_events(deltas, writer), headers)
        await run_while_connected(request, write_whole(deltas, writer))
        body = orjson.dumps(writer.response())
        return Response(body, media_type="application/json", headers=headers)


def responses_router(service: Service, authenticate: Authenticator) -> APIRouter:
    """The route, without a prefix. It needs a key."""
    router = APIRouter(dependencies=[Depends(authenticate), Depends(service.enter)], tags=["openai"])
    router.add_api_route("/responses", ResponsesEndpoint(service).create_response, methods=["POST"])
    return router
