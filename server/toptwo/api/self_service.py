"""What the bearer of a key may know of it: its limits, its account's balance, what it has used.

Knows HTTP, callers and the book of accounts.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import APIRouter, Depends
from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from toptwo.accounts import key_store, ledger, store
from toptwo.accounts.book import AccountBook
from toptwo.accounts.caller import Caller
from toptwo.accounts.usage import summarise
from toptwo.accounts.views import Json, show_key, show_limits
from toptwo.api.account_answers import answered, usage_answer
from toptwo.api.admin_query import Query
from toptwo.api.security import Authenticator, Credentials
from toptwo.errors import ApiError


@dataclass(frozen=True)
class SelfServiceEndpoints:
    """The handlers of the routes. book: None where there are no accounts."""

    book: AccountBook | None

    async def show_key(self, request: Request) -> Response:
        """The key that asks."""
        book, caller = self._require_account(request)

        def look(connection: Connection) -> Json:
            key = key_store.get_key(connection, caller.key_id)
            account = store.get_account(connection, key.account_id or "")
            day = ledger.day_of(book.now)
            today, this_month = ledger.spent(connection, key.id, day)
            return {
                **show_key(key, book.now),
                "spent_today_microcredits": today,
                "spent_this_month_microcredits": this_month,
                "account": {
                    "id": account.id,
                    "name": account.name,
                    "balance_microcredits": account.balance,
                    "limits": show_limits(account.limits),
                },
            }

        return JSONResponse(await answered(book.read(look)))

    async def show_usage(self, request: Request) -> Response:
        """What the key that asks has used."""
        book, caller = self._require_account(request)
        query = Query(request, "model", "by", "from", "to", "format")
        wanted = query.usage(key_id=caller.key_id, account_id=caller.account_id)
        rows = await answered(book.read(lambda connection: summarise(connection, wanted)))
        return usage_answer(rows, query.format)

    def _require_account(self, request: Request) -> tuple[AccountBook, Caller]:
        caller: Caller = request.state.caller
        if self.book is None or caller.account_id is None:
            message = (
                "This key is from the server's settings: it belongs to no account, and nothing is kept of it."
            )
            raise ApiError(message, status=404, code="no_account")
        return self.book, caller


def self_service_router(endpoints: SelfServiceEndpoints, credentials: Credentials) -> APIRouter:
    """The routes, without a prefix. They need a key."""
    router = APIRouter(dependencies=[Depends(Authenticator(credentials, "usage:read"))], tags=["account"])
    for path, handle in (("/key", endpoints.show_key), ("/usage", endpoints.show_usage)):
        router.add_api_route(path, handle, methods=["GET"])
    return router
