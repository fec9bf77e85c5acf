"""Reads a request's body within bounds of size and time, and notices when its sender leaves.

Knows the ASGI request; must not know what the body means.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from toptwo.errors import ApiError

MAX_BODY_BYTES = 8 * 1024 * 1024
MAX_READ_SECONDS = 60.0

Result = TypeVar("Result")


async def read_body(request: Request) -> bytes:
    """The whole body, counted as it arrives: a declared length is a claim, a chunked body has none.

    Raises ApiError (413 when too large, 408 when too slow) and ClientDisconnect.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and len(declared) < 20 and int(declared) > MAX_BODY_BYTES:
        raise _too_large()
    body = bytearray()
    try:
        async with asyncio.timeout(MAX_READ_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise _too_large()
    except TimeoutError:
        raise ApiError("The request body did not arrive in time.", status=408) from None
    return bytes(body)


async def run_while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled when the client leaves before it is done.

    Starlette cancels streaming responses only; without this, a client that gives up on a long answer
    would leave it running. Call it when the body has been read.
    Raises ClientDisconnect when the client left, and whatever `work` raises.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(wait_for_disconnect(request.receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def wait_for_disconnect(receive: Receive) -> None:
    """Return when the client has left. Call it when the body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _too_large() -> ApiError:
    return ApiError(f"The request body is larger than {MAX_BODY_BYTES} bytes.", status=413)
