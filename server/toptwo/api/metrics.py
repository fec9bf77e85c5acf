"""GET /metrics: what the server has counted, for those who watch it.

Knows the service and who may read; must not know what is counted or how it is written.
"""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter, Depends
from starlette.responses import Response

from toptwo.api.fair_threads import FairThreads
from toptwo.api.security import OperatorAuthenticator
from toptwo.api.service import Service
from toptwo.telemetry.metrics import CONTENT_TYPE, EngineView, Metrics


def metrics_router(
    service: Service, metrics: Metrics, authenticate: OperatorAuthenticator | None
) -> APIRouter:
    """The route. It needs a key unless there is nobody to check it."""
    router = APIRouter(dependencies=[Depends(authenticate)] if authenticate else [], tags=["metrics"])
    threads = FairThreads(
        1
    )  # a page of a model with many experts takes a while, which nobody else is to notice

    # It is for those who run the server, and no part of the API.
    @router.get("/metrics", include_in_schema=False)
    async def show() -> Response:
        engine = service.engine
        view = EngineView(engine.info, await engine.stats(), engine.num_restarts, service.admission.num_open)
        page = await threads.run("metrics", partial(metrics.render, view))
        return Response(page, headers={"content-type": CONTENT_TYPE})

    return router
