"""The management API: accounts, keys, credit, prices, usage and the audit log, for management keys alone.

Knows HTTP and the book of accounts; what is done, and that it is put on record, is the stores' business.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from fastapi import APIRouter, Depends
from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from toptwo.accounts import audit, key_store, ledger, store
from toptwo.accounts.audit import Actor
from toptwo.accounts.book import AccountBook
from toptwo.accounts.money import Price
from toptwo.accounts.store import NewAccount
from toptwo.accounts.usage import summarise
from toptwo.accounts.views import show_account, show_audit, show_entry, show_key, show_price
from toptwo.api.account_answers import answered, new_key_answer, page_answer, parsed, usage_answer
from toptwo.api.admin_query import Query
from toptwo.api.admin_schema import (
    ChangeAccount,
    ChangeKey,
    CreateAccount,
    CreateKey,
    CreditAccount,
    RotateKey,
    SetPrice,
)
from toptwo.api.security import ManagerAuthenticator, address_of
from toptwo.errors import ApiError

Result = TypeVar("Result")
PREFIX = "/v3/admin"


@dataclass(frozen=True)
class AdminEndpoints:
    """The handlers of the routes. grant: micro-credits that a new account begins with by default."""

    book: AccountBook
    grant: int

    async def create_account(self, request: Request) -> Response:
        """A new account."""
        body = await parsed(request, CreateAccount)
        grant = self.grant if body.grant_microcredits is None else body.grant_microcredits
        new = NewAccount(body.name, body.email, grant, body.limits.limits())
        made = await self._write(store.create_account, actor=_actor(request), new=new, at=self.book.now)
        return JSONResponse(show_account(made), status_code=201)

    async def list_accounts(self, request: Request) -> Response:
        """A page of accounts."""
        query = Query(request, "after", "limit")
        found = await self._read(store.list_accounts, after=query.text("after") or "", limit=query.limit)
        return page_answer([show_account(one) for one in found], query.limit)

    async def show_account(self, account_id: str) -> Response:
        """One account."""
        return JSONResponse(show_account(await self._read(store.get_account, account_id=account_id)))

    async def change_account(self, request: Request, account_id: str) -> Response:
        """Another name, address, status or limit."""
        body = await parsed(request, ChangeAccount)
        changed = await self._write(
            store.change_account,
            actor=_actor(request),
            account_id=account_id,
            changes=body.columns(),
            at=self.book.now,
        )
        return JSONResponse(show_account(changed))

    async def credit_account(self, request: Request, account_id: str) -> Response:
        """More credit, or less."""
        body = await parsed(request, CreditAccount)
        credit = partial(store.credit_account, amount=body.amount_microcredits, note=body.note)
        changed = await self._write(credit, actor=_actor(request), account_id=account_id, at=self.book.now)
        return JSONResponse(show_account(changed))

    async def show_ledger(self, request: Request, account_id: str) -> Response:
        """What an account was given and charged."""
        query = Query(request, "before", "limit")
        await self._read(store.get_account, account_id=account_id)
        found = await self._read(
            ledger.entries, account_id=account_id, before=query.number("before"), limit=query.limit
        )
        return page_answer([show_entry(one) for one in found], query.limit)

    async def create_key(self, request: Request) -> Response:
        """A new key, with its text."""
        body = await parsed(request, CreateKey)
        if body.account_id is None and (body.scopes or body.models or body.limits.model_fields_set):
            message = "A management key has no scopes, models or limits; an inference key needs 'account_id'."
            raise ApiError(message, param="account_id", code="invalid_value")
        wanted = body.wanted(body.account_id)
        made = await self._write(key_store.create_key, actor=_actor(request), wanted=wanted, at=self.book.now)
        return new_key_answer(made, self.book.now)

    async def list_keys(self, request: Request) -> Response:
        """A page of keys."""
        query = Query(request, "account_id", "after", "limit")
        found = await self._read(
            key_store.list_keys,
            account_id=query.text("account_id"),
            after=query.text("after") or "",
            limit=query.limit,
        )
        return page_answer([show_key(one, self.book.now) for one in found], query.limit)

    async def show_key(self, key_id: str) -> Response:
        """Everything about a key but the key."""
        found = await self._read(key_store.get_key, key_id=key_id)
        return JSONResponse(show_key(found, self.book.now))

    async def change_key(self, request: Request, key_id: str) -> Response:
        """Another name, end, scope, model or limit."""
        body = await parsed(request, ChangeKey)
        changed = await self._write(
            key_store.change_key,
            actor=_actor(request),
            key_id=key_id,
            changes=body.columns(),
            at=self.book.now,
        )
        return JSONResponse(show_key(changed, self.book.now))

    async def revoke_key(self, request: Request, key_id: str) -> Response:
        """The end of a key."""
        ended = await self._write(
            key_store.revoke_key, actor=_actor(request), key_id=key_id, at=self.book.now
        )
        return JSONResponse(show_key(ended, self.book.now))

    async def rotate_key(self, request: Request, key_id: str) -> Response:
        """A key like another, which ends after a while."""
        body = await parsed(request, RotateKey)
        made = await self._write(
            key_store.rotate_key,
            actor=_actor(request),
            key_id=key_id,
            overlap=body.overlap_seconds,
            at=self.book.now,
        )
        return new_key_answer(made, self.book.now)

    async def show_usage(self, request: Request) -> Response:
        """Sums by account, key, model or day, as JSON or CSV."""
        query = Query(request, "account_id", "key_id", "model", "by", "from", "to", "format")
        return usage_answer(await self._read(summarise, query=query.usage()), query.format)

    async def list_prices(self) -> Response:
        """What models cost."""
        found = await self._read(store.list_prices)
        return page_answer([show_price(model, price) for model, price in found.items()])

    async def set_price(self, request: Request) -> Response:
        """What a model costs from now on."""
        body = await parsed(request, SetPrice)
        cached = body.cached_prompt_microcredits
        price = Price(
            prompt=body.prompt_microcredits,
            cached=body.prompt_microcredits if cached is None else cached,
            completion=body.completion_microcredits,
        )
        await self._write(
            store.set_price, actor=_actor(request), model=body.model, price=price, at=self.book.now
        )
        return JSONResponse(show_price(body.model, price))

    async def show_audit(self, request: Request) -> Response:
        """Who changed what, and whether the log is whole."""
        query = Query(request, "before", "limit")
        found = await self._read(audit.entries, before=query.number("before"), limit=query.limit)
        broken = await self._read(audit.first_broken)
        return page_answer([show_audit(one) for one in found], query.limit, first_broken=broken)

    async def _read(self, work: Callable[..., Result], **values: Any) -> Result:
        return await answered(self.book.read(partial(work, **values)))

    async def _write(self, work: Callable[..., Result], **values: Any) -> Result:
        def write(connection: Connection) -> Result:
            return work(connection, **values)

        return await answered(self.book.write(write))


def admin_router(endpoints: AdminEndpoints, authenticate: ManagerAuthenticator) -> APIRouter:
    """The routes. Every one needs a management key."""
    router = APIRouter(prefix=PREFIX, dependencies=[Depends(authenticate)], tags=["admin"])
    for method, path, handle in (
        ("POST", "/accounts", endpoints.create_account),
        ("GET", "/accounts", endpoints.list_accounts),
        ("GET", "/accounts/{account_id}", endpoints.show_account),
        ("PATCH", "/accounts/{account_id}", endpoints.change_account),
        ("POST", "/accounts/{account_id}/credit", endpoints.credit_account),
        ("GET", "/accounts/{account_id}/ledger", endpoints.show_ledger),
        ("POST", "/keys", endpoints.create_key),
        ("GET", "/keys", endpoints.list_keys),
        ("GET", "/keys/{key_id}", endpoints.show_key),
        ("PATCH", "/keys/{key_id}", endpoints.change_key),
        ("DELETE", "/keys/{key_id}", endpoints.revoke_key),
        ("POST", "/keys/{key_id}/rotate", endpoints.rotate_key),
        ("GET", "/usage", endpoints.show_usage),
        ("GET", "/prices", endpoints.list_prices),
        ("PUT", "/prices", endpoints.set_price),
        ("GET", "/audit", endpoints.show_audit),
    ):
        router.add_api_route(path, handle, methods=[method], include_in_schema=False)
    return router


def _actor(request: Request) -> Actor:
    return Actor(request.state.manager.actor, address_of(request))
