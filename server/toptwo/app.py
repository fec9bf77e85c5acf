"""Puts the HTTP application together from parts that are handed in.

A pure factory: no globals, no files, no environment, no running loop. Knows the rooms of the API; must
not know processes, sockets or how the engine is started.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fastapi import APIRouter, FastAPI

from toptwo.accounts.book import AccountBook
from toptwo.api.admin import AdminEndpoints, admin_router
from toptwo.api.admission import DEFAULT_LIMITS, Admission, AdmissionLimits
from toptwo.api.anthropic import AnthropicAuthenticator, messages_router
from toptwo.api.completions import completions_router
from toptwo.api.embeddings import embeddings_router
from toptwo.api.handlers import RequestEnvelope, install_error_handlers
from toptwo.api.health import Lifecycle, health_router
from toptwo.api.metrics import metrics_router
from toptwo.api.openai import OpenAIEndpoints, openai_router
from toptwo.api.openapi import openapi_router
from toptwo.api.owner import OwnerAuthenticator, OwnerEndpoints, owner_router
from toptwo.api.pages import CONSOLE, pages_router
from toptwo.api.responses import responses_router
from toptwo.api.security import (
    NOBODY,
    Authenticator,
    Credentials,
    KeyRing,
    ManagerAuthenticator,
    OperatorAuthenticator,
)
from toptwo.api.self_service import SelfServiceEndpoints, self_service_router
from toptwo.api.service import Service
from toptwo.api.sign_in import SignInEndpoints, sign_in_router
from toptwo.api.tokens import tokens_router
from toptwo.engine.client import Engine
from toptwo.identity.opening import SignIn
from toptwo.settings import MetricsAccess
from toptwo.telemetry.metrics import Metrics
from toptwo.text.grammar import GrammarChecker
from toptwo.text.model import ServedModel

# Ready-made client configurations use any of these.
OPENAI_PREFIXES = ("/v3/openai", "/openai/v1", "/v1")


@dataclass(frozen=True)
class AppOptions:
    """limits: how many sequences may be open at once. metrics: who may read /metrics.

    book: the accounts, where there are any. admin_keys: who may manage them, beside management keys.
    account_grant: micro-credits that a new account begins with. sign_in: how people may make their own.
    """

    limits: AdmissionLimits = DEFAULT_LIMITS
    metrics: MetricsAccess = "key"
    book: AccountBook | None = None
    admin_keys: KeyRing = NOBODY
    account_grant: int = 0
    sign_in: SignIn | None = None


DEFAULTS = AppOptions()


def create_app(
    engine: Engine,
    model: ServedModel,
    grammars: GrammarChecker,
    keys: KeyRing,
    lifecycle: Lifecycle,
    options: AppOptions = DEFAULTS,
) -> FastAPI:
    """The application that serves `model` from `engine`.

    grammars: checks schemas and grammars of requests; the caller closes it.
    keys: who may call, beside accounts; with an empty ring and without accounts nobody may.
    lifecycle: its `draining` may be set at any time; then new requests get a 503.
    """
    credentials = Credentials(keys, options.admin_keys, options.book)
    authenticate = Authenticator(credentials)
    app = FastAPI(
        title="toptwo",
        # The documentation pages describe every route to anybody who asks.
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        # A redirect would be an answer given before the key is looked at.
        redirect_slashes=False,
    )
    service = Service(engine, model, grammars, lifecycle, Admission(options.limits), options.book)
    metrics = Metrics(model.name)
    routers = [
        openai_router(OpenAIEndpoints(service), credentials),
        completions_router(service, authenticate),
        responses_router(service, authenticate),
        embeddings_router(authenticate),
        tokens_router(service, authenticate),
        self_service_router(SelfServiceEndpoints(options.book), credentials),
        messages_router(service, AnthropicAuthenticator(credentials)),
    ]
    for prefix in OPENAI_PREFIXES:
        for router in routers:
            app.include_router(router, prefix=prefix)
    app.include_router(openapi_router(OPENAI_PREFIXES, model.name, authenticate))
    if options.book is not None:
        for router in _account_routers(options.book, options, credentials):
            app.include_router(router)
    app.include_router(health_router(engine, lifecycle))
    if options.metrics != "off":
        app.include_router(
            metrics_router(
                service, metrics, None if options.metrics == "open" else OperatorAuthenticator(credentials)
            )
        )
    install_error_handlers(app, credentials)
    app.add_middleware(RequestEnvelope, metrics=metrics)
    return app


def _account_routers(book: AccountBook, options: AppOptions, credentials: Credentials) -> Iterator[APIRouter]:
    """What only a server with accounts has: their management, and the console."""
    yield admin_router(AdminEndpoints(book, options.account_grant), ManagerAuthenticator(credentials))
    yield pages_router()
    yield sign_in_router(SignInEndpoints(book, options.sign_in, options.account_grant))
    if options.sign_in is not None:
        authenticate = OwnerAuthenticator(book, options.sign_in.public_url)
        yield owner_router(OwnerEndpoints(book), authenticate, f"{CONSOLE}/account")
