"""How the routes of accounts read bodies and answer, whoever asks: managers, owners or bearers.

Knows HTTP and the errors of accounts; must not know routes.
"""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import asdict
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from toptwo.accounts.database import DatabaseUnavailableError
from toptwo.accounts.key_store import KeyInfo
from toptwo.accounts.keys import NewKey
from toptwo.accounts.ledger import InsufficientQuotaError
from toptwo.accounts.ownership import TooManyKeysError
from toptwo.accounts.store import NotFoundError
from toptwo.accounts.usage import UsageRow, as_csv
from toptwo.accounts.views import show_key
from toptwo.api.body import read_body
from toptwo.api.security import accounts_unavailable
from toptwo.api.validation import Schema, parse_body
from toptwo.errors import ApiError

Result = TypeVar("Result")


async def answered(work: Awaitable[Result]) -> Result:
    """The result of work on the accounts. Raises ApiError (404, 409, 503) for what goes wrong there."""
    try:
        return await work
    except NotFoundError as error:
        raise ApiError(str(error), status=404, code="not_found") from None
    except TooManyKeysError as error:
        raise ApiError(str(error), status=409, code="too_many_keys") from None
    except InsufficientQuotaError as error:
        raise ApiError(str(error), status=409, code="insufficient_credit") from None
    except DatabaseUnavailableError:
        raise accounts_unavailable() from None


async def parsed(request: Request, schema: type[Schema]) -> Schema:
    """The body; a route that needs none takes an empty one."""
    return parse_body(await read_body(request) or b"{}", schema).request


def page_answer(data: list[dict[str, Any]], limit: int | None = None, **more: object) -> Response:
    """Rows, of which there are more if there are as many as were asked for."""
    has_more = limit is not None and len(data) == limit
    return JSONResponse({"object": "list", "data": data, "has_more": has_more, **more})


def new_key_answer(made: tuple[KeyInfo, NewKey], now: int) -> Response:
    """A key with its text, which is in no other answer."""
    info, new = made
    shown = show_key(info, now) | {"key": new.text}
    return JSONResponse(shown, status_code=201, headers={"cache-control": "no-store"})


def usage_answer(rows: list[UsageRow], form: str) -> Response:
    """Sums of usage, as JSON or CSV."""
    if form == "csv":
        return Response(as_csv(rows), media_type="text/csv; charset=utf-8")
    return page_answer([asdict(row) for row in rows])
