"""Every error in OpenAI's envelope, and the headers that every answer carries.

Knows errors and ASGI; must not know routes or what they do.
"""

from __future__ import annotations

import re
import time
import uuid
from http import HTTPStatus

import structlog
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from toptwo.api.security import Credentials, address_of, bearer_of
from toptwo.errors import ApiError, internal_error
from toptwo.telemetry.metrics import Metrics
from toptwo.telemetry.record import CLIENT_LEFT, RequestRecord

log = structlog.get_logger()

_SANE_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")


def install_error_handlers(app: FastAPI, credentials: Credentials) -> None:
    """Answer errors in the envelope.

    Paths and methods that do not exist ask for a key too: without one a caller learns nothing, and a
    route that somebody forgets to protect can at most be found by those who have one.
    """

    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        try:
            await credentials.identify(bearer_of(request), address_of(request))
        except ApiError as refusal:
            return error_response(refusal)
        return error_response(
            ApiError(
                HTTPStatus(error.status_code).phrase + ".",
                status=error.status_code,
                headers=dict(error.headers or {}),
            )
        )

    @app.exception_handler(RequestValidationError)
    async def on_invalid_request(request: Request, error: RequestValidationError) -> Response:
        return error_response(ApiError("The request is not valid.", code="invalid_value"))

    @app.exception_handler(ClientDisconnect)
    async def on_disconnect(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_LEFT)


def error_response(error: ApiError) -> JSONResponse:
    """The error as an HTTP answer."""
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


class RequestEnvelope:
    """ASGI middleware: names, times and records each request, and turns what nobody handled into a plain 500.

    Response headers: x-request-id (the caller's, when it is a sane one), openai-processing-ms (until the
    answer began), and what is left of the caller's limits. Whatever is logged on the way has the same id;
    handlers find the record in `request.state.record`.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord(_request_id(scope), self._metrics)
        state = scope.setdefault("state", {})
        state["record"] = record
        status = None

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = record.request_id
                if "tab" in state:
                    headers.update(state["tab"].headers())
                headers["openai-processing-ms"] = str(int((time.perf_counter() - record.began) * 1000))
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=record.request_id):
            try:
                await self._app(scope, receive, send_with_headers)
            except Exception:
                if status is not None:
                    status = HTTPStatus.INTERNAL_SERVER_ERROR
                    raise  # the server then cuts the connection, so that half an answer looks like half
                log.exception("request failed", request_id=record.request_id)
                await error_response(internal_error())(scope, receive, send_with_headers)
            finally:
                # A path that leads nowhere is its caller's text, and there are endlessly many.
                endpoint = getattr(scope.get("route"), "path", "other")
                record.end(scope["method"], endpoint, int(status or CLIENT_LEFT), state.get("key_id"))


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _SANE_REQUEST_ID.fullmatch(value):
            return str(value.decode("ascii"))
    return f"req_{uuid.uuid4().hex}"
