"""GitHub, which speaks OAuth 2 without the identity part: who somebody is, is asked of its API.

Knows GitHub's addresses and answers; must not know cookies, pages or accounts.
Source: docs.github.com, "Authorizing OAuth apps" and "REST API endpoints for users".
"""

from __future__ import annotations

from typing import Any

from toptwo.identity.openid import CLIENT_OPTIONS, OAuthApp, provider_errors
from toptwo.identity.provider import Attempt, Client, Identity

ISSUER = "https://github.com"
API = "https://api.github.com"


class GitHub:
    """Signs in with GitHub. issuer, api: where it is, which only tests change."""

    name, label = "github", "GitHub"

    def __init__(self, client: Client, issuer: str = ISSUER, api: str = API) -> None:
        self._issuer, self._api = issuer, api
        self._app = OAuthApp(
            None,
            name=self.name,
            client_id=client.id,
            client_secret=client.secret,
            authorize_url=f"{issuer}/login/oauth/authorize",
            access_token_url=f"{issuer}/login/oauth/access_token",
            client_kwargs={
                "scope": "read:user user:email",
                "token_endpoint_auth_method": "client_secret_post",
                **CLIENT_OPTIONS,
            },
        )

    async def begin(self, attempt: Attempt, redirect_uri: str) -> str:
        """The address to send the browser to. Raises SignInError."""
        with provider_errors(self.name):
            begun = await self._app.create_authorization_url(
                redirect_uri, state=attempt.state, code_verifier=attempt.verifier
            )
            return str(begun["url"])

    async def finish(self, attempt: Attempt, redirect_uri: str, code: str) -> Identity:
        """Who came back with `code`. Raises SignInError."""
        with provider_errors(self.name):
            token = await self._app.fetch_access_token(
                redirect_uri, code=code, code_verifier=attempt.verifier
            )
            user = await self._ask("/user", token)
            emails = await self._ask("/user/emails", token)
            email = next((each["email"] for each in emails if each["primary"] and each["verified"]), None)
            return Identity(self._issuer, str(int(user["id"])), str(user["name"] or user["login"]), email)

    async def _ask(self, path: str, token: dict[str, Any]) -> Any:
        answer = await self._app.request("GET", f"{self._api}{path}", token=token)
        answer.raise_for_status()
        return answer.json()
