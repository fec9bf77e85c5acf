"""A provider of identities as a process of its own: OpenID Connect, and GitHub's way, and every way to lie.

Run: python tests/identity_provider.py. It prints its address and serves until its standard input ends.
Whoever comes is signed in at once, as the person of `POST /person`; `POST /lie` makes it misbehave.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode

import httpx2
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse
from joserfc import jwt
from joserfc.jwk import OctKey, RSAKey

CLIENT_ID, CLIENT_SECRET = "the-client", "the-secret-of-the-client-32-bytes"
PERSON = {"sub": "248289761001", "name": "Jane Doe", "email": "jane@example.org", "email_verified": True}
LIES = ("issuer", "audience", "nonce", "expired", "none", "hmac", "other_key", "no_token", "silence")


@dataclass
class Provider:
    """Its keys, codes that are good once, and what it says of whoever comes."""

    url: str
    person: dict[str, Any] = field(default_factory=lambda: dict(PERSON))
    lie: str = ""
    key: RSAKey = field(default_factory=lambda: RSAKey.generate_key(2048, {"kid": "1", "use": "sig"}))
    codes: dict[str, dict[str, str]] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)

    def describe(self) -> dict[str, Any]:
        """Discovery."""
        return {
            "issuer": "https://elsewhere.example" if self.lie == "issuer" else self.url,
            "authorization_endpoint": f"{self.url}/authorize",
            "token_endpoint": f"{self.url}/token",
            "jwks_uri": f"{self.url}/jwks",
            "id_token_signing_alg_values_supported": ["RS256", "HS256", "none"],
        }

    def authorize(self, asked: dict[str, str]) -> str:
        """Where the browser goes with what it asked for."""
        assert asked["client_id"] == CLIENT_ID
        assert asked["response_type"] == "code"
        assert asked["code_challenge_method"] == "S256"
        if not self.person:
            return f"{asked['redirect_uri']}?{urlencode({'error': 'access_denied', 'state': asked['state']})}"
        code = secrets.token_urlsafe()
        self.codes[code] = asked
        return f"{asked['redirect_uri']}?{urlencode({'code': code, 'state': asked['state']})}"

    def exchange(self, given: dict[str, str], authorization: str) -> dict[str, Any] | None:
        """A token for a code, once, to whom it was given."""
        asked = self.codes.pop(given["code"], None)
        digest = hashlib.sha256(given["code_verifier"].encode()).digest()
        if (
            asked is None
            or asked["redirect_uri"] != given["redirect_uri"]
            or asked["code_challenge"] != base64.urlsafe_b64encode(digest).decode().rstrip("=")
            or not is_client(given, authorization)
        ):
            return None
        token = secrets.token_urlsafe()
        self.tokens.add(token)
        answer = {"access_token": token, "token_type": "bearer", "scope": asked["scope"]}
        if "nonce" in asked and self.lie != "no_token":
            answer["id_token"] = self.identify(asked["nonce"])
        return answer

    def identify(self, nonce: str) -> str:
        """An ID token, or one that nobody should believe."""
        now = int(time.time())
        claims = {
            "iss": self.url,
            "aud": "somebody-else" if self.lie == "audience" else CLIENT_ID,
            "iat": now,
            "exp": now - 3600 if self.lie == "expired" else now + 300,
            "nonce": "another" if self.lie == "nonce" else nonce,
            **self.person,
        }
        if self.lie == "none":
            parts = ({"alg": "none"}, claims)
            texts = [base64.urlsafe_b64encode(JSONResponse(part).body).decode().rstrip("=") for part in parts]
            return ".".join([*texts, ""])
        if self.lie == "hmac":
            key = OctKey.import_key(CLIENT_SECRET)
            return jwt.encode({"alg": "HS256"}, claims, key, algorithms=["HS256"])
        signer = RSAKey.generate_key(2048, {"kid": "1"}) if self.lie == "other_key" else self.key
        return jwt.encode({"alg": "RS256", "kid": "1"}, claims, signer)


def is_client(given: dict[str, str], authorization: str) -> bool:
    """Whether a request is the client's, which says so in a header or, as GitHub wants it, in the body."""
    basic = base64.b64encode(f"{CLIENT_ID}:{CLIENT_SECRET}".encode()).decode()
    in_body = (given.get("client_id"), given.get("client_secret")) == (CLIENT_ID, CLIENT_SECRET)
    return authorization == f"Basic {basic}" or (not authorization and in_body)


def create_app(provider: Provider) -> FastAPI:
    """OpenID Connect's four routes, GitHub's four, and two for tests."""
    app = FastAPI()

    @app.get("/.well-known/openid-configuration")
    async def describe() -> dict[str, Any]:
        return provider.describe()

    @app.get("/jwks")
    async def jwks() -> dict[str, Any]:
        return {"keys": [provider.key.as_dict(private=False)]}

    @app.get("/authorize")
    @app.get("/login/oauth/authorize")
    async def authorize(request: Request) -> Response:
        return RedirectResponse(provider.authorize(dict(request.query_params)))

    @app.post("/token")
    @app.post("/login/oauth/access_token")
    async def token(request: Request) -> Response:
        if provider.lie == "silence":
            return Response(status_code=500)
        given = {name: values[0] for name, values in parse_qs((await request.body()).decode()).items()}
        answer = provider.exchange(given, request.headers.get("authorization", ""))
        return JSONResponse(answer or {"error": "invalid_grant"}, status_code=200 if answer else 400)

    @app.get("/user")
    async def user(request: Request) -> Response:
        if request.headers["authorization"].removeprefix("Bearer ") not in provider.tokens:
            return Response(status_code=401)
        person = provider.person
        return JSONResponse({"id": int(person["sub"]), "login": "jane", "name": person["name"]})

    @app.get("/user/emails")
    async def emails() -> list[dict[str, Any]]:
        person = provider.person
        other = {"email": "other@example.org", "primary": False, "verified": True}
        mine = {"email": person["email"], "primary": True, "verified": person["email_verified"]}
        return [other, mine]

    @app.post("/person")
    async def become(request: Request) -> None:
        provider.person = await request.json()

    @app.post("/lie")
    async def lie(request: Request) -> None:
        provider.lie = await request.json()

    return app


@dataclass
class ProviderProcess:
    """The process, as a test speaks with it."""

    url: str

    def become(self, **changes: Any) -> None:
        """Whoever signs in next."""
        httpx2.post(f"{self.url}/person", json={**PERSON, **changes}).raise_for_status()

    def refuse(self) -> None:
        """Whoever signs in next does not want to."""
        httpx2.post(f"{self.url}/person", json={}).raise_for_status()

    def lie(self, about: str) -> None:
        """Misbehave from now on; "" for no more."""
        httpx2.post(f"{self.url}/lie", json=about).raise_for_status()


@contextmanager
def run_identity_provider() -> Iterator[ProviderProcess]:
    """The process, until the end of the block."""
    command = [sys.executable, str(Path(__file__))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdin
        try:
            yield ProviderProcess(process.stdout.readline().strip())
        finally:
            process.stdin.close()
            process.wait(10)


async def _serve() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = uvicorn.Server(uvicorn.Config(create_app(Provider(url)), log_level="error"))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    print(url, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    server.should_exit = True
    await serving


if __name__ == "__main__":
    asyncio.run(_serve())
