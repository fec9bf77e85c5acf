"""Signing in: to the provider, back again, and a session in a cookie.

The cookies are the console's alone: their path keeps them from every other route, HttpOnly from the page, and
SameSite from other sites. Knows HTTP, providers and sessions; must not know how a provider is spoken with.
"""

from __future__ import annotations

import hmac
import secrets
from dataclasses import dataclass, field
from functools import partial
from typing import Literal
from urllib.parse import urlencode

import structlog
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response

from toptwo.accounts import sessions
from toptwo.accounts.book import AccountBook
from toptwo.accounts.database import DatabaseUnavailableError
from toptwo.accounts.sessions import SESSION_SECONDS, Person
from toptwo.api.account_answers import answered
from toptwo.api.owner import SESSION_COOKIE, require_origin
from toptwo.api.pages import CONSOLE
from toptwo.api.security import Guesses, address_of
from toptwo.errors import ApiError
from toptwo.identity.opening import SignIn
from toptwo.identity.provider import Attempt, Identity, Provider, SignInError

log = structlog.get_logger()

ATTEMPT_COOKIE = "toptwo_sign_in"
_SIGNED_IN = f"{CONSOLE}/signed-in"
_LONGEST_CODE = 4096
_LONGEST_IDENTITY, _LONGEST_NAME, _LONGEST_EMAIL = 500, 200, 320


@dataclass(frozen=True)
class _Cookie:
    name: str
    path: str
    seconds: int
    same_site: Literal["lax", "strict"]


# Lax: the provider's page is another site, and who comes from there must bring it.
_ATTEMPT = _Cookie(ATTEMPT_COOKIE, _SIGNED_IN, 600, "lax")
_SESSION = _Cookie(SESSION_COOKIE, CONSOLE, SESSION_SECONDS, "strict")


@dataclass(frozen=True)
class SignInEndpoints:
    """The handlers of the routes. how: None where nobody can sign in. grant: of a new account."""

    book: AccountBook
    how: SignIn | None
    grant: int
    failures: Guesses = field(default_factory=lambda: Guesses("attempts to sign in that failed"))

    async def list_providers(self) -> Response:
        """Whom the page may offer."""
        providers = self.how.providers if self.how else ()
        return JSONResponse({"providers": [{"name": one.name, "label": one.label} for one in providers]})

    async def begin(self, request: Request, provider: str) -> Response:
        """To the provider."""
        how, asked = self._provider(provider)
        attempt = Attempt(*(secrets.token_urlsafe(32) for _ in range(3)))
        try:
            url = await asked.begin(attempt, _redirect_uri(how, asked))
        except SignInError as error:
            return _failed(error)
        answer = _redirect(url)
        value = ".".join((asked.name, attempt.state, attempt.nonce, attempt.verifier))
        self._set_cookie(answer, _ATTEMPT, value)
        return answer

    async def finish(self, request: Request, provider: str) -> Response:
        """Back from the provider."""
        how, asked = self._provider(provider)
        address = address_of(request)
        self.failures.require_few(address)
        try:
            attempt, code = _returned(request, asked.name)
            person = _person(await asked.finish(attempt, _redirect_uri(how, asked), code), how)
            token = await self._open_session(person, address)
        except SignInError as error:
            self.failures.count(address)
            answer = _failed(error)
        else:
            answer = _redirect(CONSOLE)
            self._set_cookie(answer, _SESSION, token)
        answer.delete_cookie(_ATTEMPT.name, path=_ATTEMPT.path)
        return answer

    async def sign_out(self, request: Request) -> Response:
        """The end of the session."""
        if self.how is not None:
            require_origin(request, self.how.public_url)
        token = request.cookies.get(_SESSION.name, "")
        if token:
            await answered(self.book.write(partial(sessions.sign_out, token=token)))
        answer = Response(status_code=204)
        answer.delete_cookie(_SESSION.name, path=_SESSION.path)
        return answer

    async def _open_session(self, person: Person, address: str) -> str:
        begin = partial(sessions.sign_in, person=person, address=address, grant=self.grant, at=self.book.now)
        try:
            return await self.book.write(begin)
        except DatabaseUnavailableError:
            raise SignInError("unavailable", "the accounts' database cannot be used") from None

    def _provider(self, name: str) -> tuple[SignIn, Provider]:
        for one in self.how.providers if self.how else ():
            if one.name == name and self.how is not None:
                return self.how, one
        raise ApiError("There is no such provider.", status=404, code="not_found")

    def _set_cookie(self, answer: Response, cookie: _Cookie, value: str) -> None:
        is_secure = self.how is not None and self.how.public_url.startswith("https://")
        answer.set_cookie(
            cookie.name,
            value,
            max_age=cookie.seconds,
            path=cookie.path,
            secure=is_secure,
            httponly=True,
            samesite=cookie.same_site,
        )


def sign_in_router(endpoints: SignInEndpoints) -> APIRouter:
    """The routes. They need no key: whoever comes there has none yet."""
    router = APIRouter(prefix=CONSOLE, tags=["console"])
    for method, path, handle in (
        ("GET", "/providers", endpoints.list_providers),
        ("GET", "/sign-in/{provider}", endpoints.begin),
        ("GET", "/signed-in/{provider}", endpoints.finish),
        ("POST", "/sign-out", endpoints.sign_out),
    ):
        router.add_api_route(path, handle, methods=[method], include_in_schema=False)
    return router


def _redirect_uri(how: SignIn, provider: Provider) -> str:
    return f"{how.public_url}{_SIGNED_IN}/{provider.name}"


def _returned(request: Request, provider: str) -> tuple[Attempt, str]:
    """The attempt that the browser kept, and the code that it brings. Raises SignInError."""
    kept = request.cookies.get(_ATTEMPT.name, "").split(".")
    given = request.query_params
    if len(kept) != 4 or kept[0] != provider or not all(kept):
        raise SignInError("expired", "the browser brought no attempt")
    attempt = Attempt(*kept[1:])
    if not hmac.compare_digest(given.get("state", "").encode(), attempt.state.encode()):
        raise SignInError("expired", "the state is another one")
    if "error" in given:
        raise SignInError("declined", "the provider says that it was not allowed")
    code = given.get("code", "")
    if not 0 < len(code) <= _LONGEST_CODE:
        raise SignInError("provider_failed", "the provider sent no code")
    return attempt, code


def _person(found: Identity, how: SignIn) -> Person:
    """Who somebody is to the accounts, if they may come in. Raises SignInError."""
    identity = f"{found.issuer} {found.subject}"
    if not how.guests.admits(found.email) or len(identity) > _LONGEST_IDENTITY or " " in found.subject:
        raise SignInError("not_admitted", "this person may not sign in")
    name = "".join(each for each in found.name if each.isprintable()).strip()[:_LONGEST_NAME]
    email = found.email if found.email and len(found.email) <= _LONGEST_EMAIL else None
    return Person(identity, name or "somebody", email)


def _redirect(url: str) -> Response:
    return RedirectResponse(url, status_code=303, headers={"cache-control": "no-store"})


def _failed(error: SignInError) -> Response:
    log.warning("nobody was signed in", reason=str(error))
    return _redirect(f"{CONSOLE}#{urlencode({'sign-in': error.code})}")
