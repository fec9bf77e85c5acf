"""OpenAI's text completions: raw prompts, without a conversation around them.

Knows HTTP and who calls; the work itself is done by the service, its JSON by text_completion.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response

from toptwo.api.body import run_while_connected
from toptwo.api.completion import ChoiceText, collect
from toptwo.api.generation import Delta
from toptwo.api.merging import merge
from toptwo.api.security import Authenticator
from toptwo.api.service import Service, ignored_header
from toptwo.api.sse import EventStream, data_events
from toptwo.api.text_completion import TextChunkWriter, form_of, text_completion
from toptwo.api.text_completion_job import completion_job, numbered
from toptwo.api.text_completion_schema import CompletionRequest


@dataclass(frozen=True)
class CompletionsEndpoint:
    """The handler of the route."""

    service: Service

    async def create_completion(self, request: Request) -> Response:
        """Continue one or more prompts, whole or as a stream."""
        parsed = await self.service.parse(request, CompletionRequest)
        wanted = parsed.request
        self.service.require_model(request, wanted.model)
        head = self.service.head("cmpl")
        headers = ignored_header(parsed.ignored)
        jobs = [
            await self.service.prepare(
                request, f"{head.completion_id}-p{number}", partial(completion_job, wanted, prompt)
            )
            for number, prompt in enumerate(wanted.prompts)
        ]
        form = form_of(wanted, [job.requests[0].prompt_ids for job in jobs], self.service.model.tokenizer)
        request.state.record.shows_output = form.has_output
        await self.service.reserve(request, head.completion_id, *jobs)
        deltas = merge(
            [numbered(self.service.deltas(job), at, wanted.num_candidates) for at, job in enumerate(jobs)]
        )
        num_choices = len(jobs) * wanted.num_candidates
        if wanted.stream:
            writer = TextChunkWriter(head, form, num_choices=num_choices, include_usage=wanted.include_usage)
            return EventStream(data_events(deltas, writer), headers)
        choices = await run_while_connected(request, _collect(deltas, num_choices))
        body = text_completion(head, choices, form, wanted.num_candidates)
        return Response(body, media_type="application/json", headers=headers)


def completions_router(service: Service, authenticate: Authenticator) -> APIRouter:
    """The route, without a prefix. It needs a key."""
    router = APIRouter(dependencies=[Depends(authenticate), Depends(service.enter)], tags=["openai"])
    endpoint = CompletionsEndpoint(service)
    router.add_api_route("/completions", endpoint.create_completion, methods=["POST"])
    return router


async def _collect(deltas: AsyncGenerator[Delta, None], num_choices: int) -> list[ChoiceText]:
    async with aclosing(deltas):
        return collect([delta async for delta in deltas], num_choices)
