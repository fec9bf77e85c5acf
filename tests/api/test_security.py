"""Keys, and that nothing but the health routes answers without one."""

from __future__ import annotations

import ast
import hashlib
from pathlib import Path

import httpx2
import openai
import pytest
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from hypothesis import given
from hypothesis import strategies as st

from fakes import KEY, AsgiCall, FakeEngine, FakeGrammars, chat, served_model
from toptwo.api import security
from toptwo.api.health import Lifecycle
from toptwo.api.security import KeyRing
from toptwo.app import create_app

OPEN = {"/health/live", "/health/ready"}
HOSTS = [
    "test",
    "",
    "localhost/health/live?",
    "localhost/health/live#",
    "localhost/x?",
    "a@b/health/ready?x=",
    "[::1]/health/live?",
    "test:80/health/live",
    "/health/live",
    "\\health",
    "te st",
    "x" * 5000,
    "é",
    "test, localhost/health/live?",
]
PATHS = [
    "/",
    "/docs",
    "/redoc",
    "/openapi.json",
    "/metrics",
    "/v1",
    "/v1/",
    "/v1/models/",
    "//v1/models",
    "/v1//models",
    "/V1/models",
    "/v1/models/../models",
    "/v1/%6dodels",
    "/health/live/",
    "/health/../v1/models",
    "/health/live/../../v1/models",
    "/health",
    "/v1/chat/completions/",
]
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "ODD"]


def routes(app: FastAPI) -> list[tuple[str, str]]:
    """Every (method, path) that the app serves."""
    found = []
    for route in iter_route_contexts(app.routes):
        path = route.path.replace("{model_id:path}", "org/tiny-moe")
        found += [(method, path) for method in route.methods]
    return found


def test_the_routes_are_the_known_ones(app: FastAPI) -> None:
    prefixes = ("/v3/openai", "/openai/v1", "/v1")
    expected = {(method, path) for path in OPEN for method in ("GET", "HEAD")}
    expected |= {("GET", "/openapi.json"), ("GET", "/metrics")}
    for prefix in prefixes:
        expected |= {
            ("POST", f"{prefix}/chat/completions"),
            *(("GET", f"{prefix}/{name}") for name in ("key", "usage", "models")),
            ("GET", f"{prefix}/models/org/tiny-moe"),
        }
        expected |= {
            ("POST", f"{prefix}/{name}")
            for name in (
                "completions",
                "responses",
                "embeddings",
                "tokenize",
                "detokenize",
                "messages",
                "messages/count_tokens",
            )
        }
    assert set(routes(app)) == expected


@pytest.mark.parametrize("host", HOSTS)
async def test_no_route_answers_without_a_key(app: FastAPI, engine: FakeEngine, host: str) -> None:
    asked = set(routes(app)) | {(method, path) for method in METHODS for path in PATHS}
    asked |= {(method, path) for method in METHODS for _, path in routes(app) if path not in OPEN}
    for method, path in asked:
        if path in OPEN:
            continue
        call = AsgiCall(method, path, [("host", host)], b"{}")
        await call.run(app)
        assert call.status == 401, (method, path)
        assert call.answer_headers["www-authenticate"] == "Bearer"
    assert engine.requests == []


async def test_health_needs_no_key(stranger: httpx2.AsyncClient) -> None:
    for path in OPEN:
        assert (await stranger.get(path)).status_code == 200
        assert (await stranger.head(path)).status_code == 200


@pytest.mark.parametrize(
    "value",
    [
        "",
        " ",
        "Bearer",
        "Bearer ",
        KEY,
        f"Basic {KEY}",
        f"bearer{KEY}",
        "Bearer wrong",
        f"Bearer {KEY}x",
        f"Bearer {KEY[:-1]}",
        f"Bearer {KEY.upper()}",
        f"Bearer {KEY} {KEY}",
        "Bearer \xff\xfe\x00\x80",
        "Bearer ' OR 1=1 --",
        "Bearer " + "x" * 100_000,
    ],
)
async def test_wrong_keys_get_the_envelope(app: FastAPI, value: str) -> None:
    call = AsgiCall("GET", "/v1/models", [("authorization", value)])
    await call.run(app)
    assert call.status == 401
    assert call.answer_headers["www-authenticate"] == "Bearer"
    assert b'"type":"invalid_request_error"' in call.answer
    assert KEY.encode() not in call.answer


async def test_two_authorization_headers_are_refused(app: FastAPI) -> None:
    bearer = ("authorization", f"Bearer {KEY}")
    call = AsgiCall("GET", "/v1/models", [bearer, ("authorization", "Bearer wrong")])
    await call.run(app)
    assert call.status == 401


async def test_the_scheme_has_no_case(app: FastAPI) -> None:
    call = AsgiCall("GET", "/v1/models", [("authorization", f"bEARER  {KEY} ")])
    await call.run(app)
    assert call.status == 200


async def test_the_official_client_explains_a_wrong_key(app: FastAPI) -> None:
    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app))
    async with openai.AsyncOpenAI(base_url="http://test/v1", api_key="no", http_client=http) as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            await client.models.list()
    assert caught.value.code == "invalid_api_key"
    assert "The API key is not valid." in str(caught.value)


async def test_without_any_key_nobody_is_admitted() -> None:
    app = create_app(FakeEngine(), served_model(), FakeGrammars(), KeyRing.from_keys([]), Lifecycle())
    for headers in ([], [("authorization", "Bearer ")], [("authorization", "Bearer None")]):
        call = AsgiCall("GET", "/v1/models", headers)
        await call.run(app)
        assert call.status == 401


async def test_each_key_has_its_own_cache_scope(engine: FakeEngine) -> None:
    app = create_app(engine, served_model(), FakeGrammars(), KeyRing.from_keys(["one", "two"]), Lifecycle())
    for key in ("one", "two", "one"):
        call = AsgiCall.post_json("/v1/chat/completions", chat(), [("authorization", f"Bearer {key}")])
        await call.run(app)
        assert call.status == 200
    scopes = [request.cache_scope for request in engine.requests]
    assert scopes[0] == scopes[2] != scopes[1]
    assert scopes[0] == hashlib.sha256(b"one").hexdigest()[:16]


@given(st.lists(st.text(min_size=1).filter(str.strip), max_size=4), st.text(alphabet=st.characters()))
def test_only_the_ring_is_accepted(keys: list[str], other: str) -> None:
    ring = KeyRing.from_keys(keys)
    assert all(ring.verify(key) for key in keys)
    assert (ring.verify(other) is not None) == (other in keys)
    assert ring.verify("\ud800") is None


def test_senseless_rings_are_refused() -> None:
    for keys in ([""], ["good", "  "]):
        with pytest.raises(ValueError, match="empty key"):
            KeyRing.from_keys(keys)
    with pytest.raises(ValueError, match="SHA-256"):
        KeyRing([b"short"])
    assert KeyRing([hashlib.sha256(b"k").digest()]).verify("k")


def test_no_secret_is_compared_with_equals() -> None:
    tree = ast.parse(Path(security.__file__).read_text())
    verify = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "verify")
    assert not [node for node in ast.walk(verify) if isinstance(node, ast.Compare | ast.Break)]
    assert "compare_digest" in ast.dump(verify)
