"""What people who signed in may do: with their own account, and no other.

Knows HTTP, the cookie of a session and the book of accounts; must not know how somebody signs in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from toptwo.accounts import key_store, ownership, sessions
from toptwo.accounts.book import AccountBook
from toptwo.accounts.store import Account
from toptwo.accounts.usage import summarise
from toptwo.accounts.views import show_account, show_key
from toptwo.api.account_answers import answered, new_key_answer, page_answer, parsed, usage_answer
from toptwo.api.admin_query import Query
from toptwo.api.admin_schema import CreateOwnKey, RotateKey
from toptwo.api.security import address_of, forbidden
from toptwo.errors import ApiError

Result = TypeVar("Result")

SESSION_COOKIE = "toptwo_session"
_SAFE_METHODS = ("GET", "HEAD")


class OwnerAuthenticator:
    """Admits whoever has a session, and leaves their account in `request.state.owner`.

    origin: the server's own. A browser names in each request that changes something the page that sent it,
    and what another page sends is refused. Raises ApiError (401, 403, 503).
    """

    def __init__(self, book: AccountBook, origin: str) -> None:
        self._book = book
        self._origin = origin

    async def __call__(self, request: Request) -> Account:
        """The account."""
        if request.method not in _SAFE_METHODS:
            require_origin(request, self._origin)
        token = request.cookies.get(SESSION_COOKIE, "")
        look = partial(sessions.signed_in, token=token, at=self._book.now)
        account = await answered(self._book.read(look)) if token else None
        if account is None:
            raise ApiError("Nobody is signed in.", status=401, code="not_signed_in")
        request.state.owner, request.state.key_id = account, account.id
        return account


@dataclass(frozen=True)
class OwnerEndpoints:
    """The handlers of the routes."""

    book: AccountBook

    async def show_account(self, request: Request) -> Response:
        """The account of who asks."""
        return JSONResponse(show_account(_owner(request)))

    async def list_keys(self, request: Request) -> Response:
        """A page of its keys."""
        query = Query(request, "after", "limit")
        after, limit = query.text("after") or "", query.limit
        look = partial(key_store.list_keys, account_id=_owner(request).id, after=after, limit=limit)
        found = await answered(self.book.read(look))
        return page_answer([show_key(one, self.book.now) for one in found], limit)

    async def create_key(self, request: Request) -> Response:
        """A new key, with its text."""
        wanted = (await parsed(request, CreateOwnKey)).wanted(_owner(request).id)
        return new_key_answer(await self._write(request, ownership.create_key, wanted=wanted), self.book.now)

    async def revoke_key(self, request: Request, key_id: str) -> Response:
        """The end of a key."""
        ended = await self._write(request, ownership.revoke_key, key_id=key_id)
        return JSONResponse(show_key(ended, self.book.now))

    async def rotate_key(self, request: Request, key_id: str) -> Response:
        """A key like another, which ends after a while."""
        rotated = key_id, (await parsed(request, RotateKey)).overlap_seconds
        return new_key_answer(
            await self._write(request, ownership.rotate_key, rotated=rotated), self.book.now
        )

    async def show_usage(self, request: Request) -> Response:
        """What the account has used."""
        query = Query(request, "key_id", "model", "by", "from", "to", "format")
        look = partial(summarise, query=query.usage(account_id=_owner(request).id))
        return usage_answer(await answered(self.book.read(look)), query.format)

    async def _write(self, request: Request, work: Callable[..., Result], **values: Any) -> Result:
        who = {"account": _owner(request), "address": address_of(request), "at": self.book.now}
        return await answered(self.book.write(partial(work, **who, **values)))


def owner_router(endpoints: OwnerEndpoints, authenticate: OwnerAuthenticator, prefix: str) -> APIRouter:
    """The routes. Every one needs a session."""
    router = APIRouter(prefix=prefix, dependencies=[Depends(authenticate)], tags=["owner"])
    for method, path, handle in (
        ("GET", "", endpoints.show_account),
        ("GET", "/keys", endpoints.list_keys),
        ("POST", "/keys", endpoints.create_key),
        ("DELETE", "/keys/{key_id}", endpoints.revoke_key),
        ("POST", "/keys/{key_id}/rotate", endpoints.rotate_key),
        ("GET", "/usage", endpoints.show_usage),
    ):
        router.add_api_route(path, handle, methods=[method], include_in_schema=False)
    return router


def require_origin(request: Request, origin: str) -> None:
    """Raises ApiError (403) for what no page of ours sent."""
    if request.headers.getlist("origin") != [origin]:
        raise forbidden("This can only be done from the console's own page.", "wrong_origin")


def _owner(request: Request) -> Account:
    account: Account = request.state.owner
    return account
