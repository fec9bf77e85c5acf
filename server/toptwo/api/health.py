"""Liveness and readiness, for load balancers: the only routes without a key.

Knows the engine's state and whether the server is stopping; must not know requests.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import APIRouter
from starlette.responses import JSONResponse

from toptwo.engine.client import Engine


@dataclass
class Lifecycle:
    """draining: the server has been told to stop; it finishes what runs and takes nothing new."""

    draining: bool = False


def health_router(engine: Engine, lifecycle: Lifecycle) -> APIRouter:
    """GET /health/live (the process answers) and /health/ready (a request would be served)."""
    router = APIRouter(prefix="/health", tags=["health"])

    @router.api_route("/live", methods=["GET", "HEAD"])
    async def live() -> JSONResponse:
        return JSONResponse({"status": "live"})

    @router.api_route("/ready", methods=["GET", "HEAD"])
    async def ready() -> JSONResponse:
        if lifecycle.draining:
            return JSONResponse({"status": "unready", "reason": "shutting down"}, status_code=503)
        if engine.info is None:
            reason = "the engine is loading or restarting"
            return JSONResponse({"status": "unready", "reason": reason}, status_code=503)
        return JSONResponse({"status": "ready"})

    return router
