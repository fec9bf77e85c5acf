"""OpenID Connect: the code flow with PKCE, by Authlib (OpenID Connect Core 1.0, section 3.1).

Knows Authlib and the claims of a token; must not know cookies, pages or accounts.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import httpx2
from authlib.integrations.base_client import BaseApp, OAuthError
from authlib.integrations.base_client.async_app import AsyncOAuth2Mixin
from authlib.integrations.base_client.async_openid import AsyncOpenIDMixin
from authlib.integrations.httpx_client import AsyncOAuth2Client
from joserfc.errors import JoseError

from toptwo.identity.provider import Attempt, Client, Identity, SignInError

TIMEOUT_SECONDS = 10.0
# Signatures that only the provider can make: not `none`, nor those by a secret that both sides have.
ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
CLIENT_OPTIONS = {"code_challenge_method": "S256", "timeout": TIMEOUT_SECONDS, "follow_redirects": False}

_ERRORS = (OAuthError, JoseError, httpx2.HTTPError, LookupError, ValueError, TypeError, RuntimeError)

logging.getLogger("authlib").setLevel(logging.INFO)  # its debug messages tell verifiers and tokens


class OAuthApp(AsyncOAuth2Mixin, AsyncOpenIDMixin, BaseApp):  # type: ignore[misc]  # Authlib has no types
    """Authlib's parts without a web framework around them."""

    client_cls = AsyncOAuth2Client


class OpenIDProvider:
    """A provider that describes itself under its issuer's address. It is asked when it is first needed."""

    def __init__(self, name: str, label: str, issuer: str, client: Client) -> None:
        self.name, self.label = name, label
        self._issuer = issuer
        self._app = OAuthApp(
            None,
            name=name,
            client_id=client.id,
            client_secret=client.secret,
            server_metadata_url=f"{issuer.rstrip('/')}/.well-known/openid-configuration",
            client_kwargs={"scope": "openid email profile", **CLIENT_OPTIONS},
        )

    async def begin(self, attempt: Attempt, redirect_uri: str) -> str:
        """The address to send the browser to. Raises SignInError."""
        with provider_errors(self.name):
            await self._load()
            begun = await self._app.create_authorization_url(
                redirect_uri, state=attempt.state, nonce=attempt.nonce, code_verifier=attempt.verifier
            )
            return str(begun["url"])

    async def finish(self, attempt: Attempt, redirect_uri: str, code: str) -> Identity:
        """Who came back with `code`. Raises SignInError."""
        with provider_errors(self.name):
            await self._load()
            token = await self._app.fetch_access_token(
                redirect_uri, code=code, code_verifier=attempt.verifier
            )
            claims = await self._app.parse_id_token(token, attempt.nonce)
            if claims is None:
                raise SignInError("provider_failed", f"{self.name} sent no ID token")
            return self._identity(claims)

    async def _load(self) -> None:
        metadata = await self._app.load_server_metadata()
        if metadata.get("issuer") != self._issuer:
            raise SignInError("provider_failed", f"{self.name} says that it is another issuer")
        named = metadata.get("id_token_signing_alg_values_supported") or ["RS256"]
        metadata["id_token_signing_alg_values_supported"] = [each for each in named if each in ALGORITHMS]

    def _identity(self, claims: dict[str, Any]) -> Identity:
        email = claims.get("email") if claims.get("email_verified") is True else None
        subject = str(claims["sub"])
        name = claims.get("name") or claims.get("preferred_username") or email or subject
        return Identity(self._issuer, subject, str(name), email)


@contextlib.contextmanager
def provider_errors(name: str) -> Iterator[None]:
    """Whatever goes wrong at a provider, as a SignInError."""
    try:
        yield
    except _ERRORS as error:
        # What it says may hold a token; its kind cannot.
        raise SignInError("provider_failed", f"{name}: {type(error).__name__}") from None
