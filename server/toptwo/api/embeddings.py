"""OpenAI's embeddings, which a model that generates does not have.

Knows HTTP; without this route a caller could not tell a wrong path from a missing ability.
"""

from __future__ import annotations

from fastapi import APIRouter, Depends
from starlette.requests import Request

from toptwo.api.security import Authenticator
from toptwo.errors import ApiError


def embeddings_router(authenticate: Authenticator) -> APIRouter:
    """POST /embeddings, which answers 501, without a prefix. It needs a key."""
    router = APIRouter(dependencies=[Depends(authenticate)], tags=["openai"])
    router.add_api_route("/embeddings", _create_embeddings, methods=["POST"])
    return router


async def _create_embeddings(request: Request) -> None:
    raise ApiError(
        "This server generates text; it does not compute embeddings.",
        status=501,
        kind="not_implemented_error",
        code="unsupported_endpoint",
        headers={"x-should-retry": "false"},  # or clients would try again, as they do for every 5xx
    )
