"""Authentication and authorisation: each test is named after what happened to a peer."""

from __future__ import annotations

import ast
import hashlib
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts

from fakes import KEY, AsgiCall, FakeEngine
from security.raw_socket import ALICE, Caller, exchange
from server_process import ServerProcess
from toptwo.api import security
from toptwo.api.security import KeyRing
from toptwo.errors import StartupError
from toptwo.settings import load_settings

OPEN = {"/health/live", "/health/ready"}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
# Each made a server see another path than the one that was routed, or tries to.
HOSTS = [
    *("localhost/v1/models?", "localhost/health/live?", "localhost/health/live#", "localhost/health/live;"),
    *(
        "localhost/x?",
        "localhost/x#",
        "localhost/%2e%2e/health/live?",
        "localhost\\health\\live?",
        "/health/live",
    ),
    *("//health/live", "?", "#", "", " ", "localhost:80/health/live?x=", "localhost:x/health/ready?"),
    *("user@localhost/health/live?", "user:pass@localhost", "[::1]/health/live?", "[::1", "[/health/live?]"),
    *("localhost, localhost/health/live?", "127.0.0.1:99999", "\xe9", "*", "localhost/health/live?\t"),
    *("http://localhost/health/live?", "a" * 4000, "localhost/health/live?" + "a" * 1000, "localhost?/v1"),
]


def paths_of(app: FastAPI) -> list[str]:
    """Every path that needs a key."""
    found = {route.path.replace("{model_id:path}", "tiny-moe") for route in iter_route_contexts(app.routes)}
    return sorted(found - OPEN)


@pytest.fixture
def caller(server: ServerProcess) -> Iterator[Caller]:
    caller = Caller(server)
    yield caller
    caller.close()


def test_cve_2026_48710_and_cve_2026_48746_host_header(caller: Caller, app: FastAPI) -> None:
    """Starlette and vLLM: a path in the Host header changed the one that authentication looked at."""
    assert len(HOSTS) >= 30
    for host, path in itertools.product(HOSTS, paths_of(app)):
        method = "GET" if "models" in path else "POST"
        assert caller.status(method, path, host) == 401, (method, path, host)


def variants(path: str) -> Iterator[str]:
    """Other spellings of a path, some of which some servers take for the same."""
    yield from (path + "/", path + "//", "/" + path, path.replace("/", "//"), path + "/.", path + "/..")
    yield from (path.upper(), path.title(), path.replace("o", "%6f", 1), "/" + path[1:].replace("/", "%2f"))
    yield from (path + "%00", path + "%20", path + ";x=/health/live", path + "?x=/health/live")
    yield from ("/health/live/.." + path, "/health/live/%2e%2e" + path, "/./" + path[1:], path + "%2e%2e")
    yield from ("/health/live/../.." + path, path + "/../../health/live", "http://test" + path)


def test_only_health_answers_without_a_key(caller: Caller, app: FastAPI) -> None:
    """vLLM's --api-key guards /v1 alone: here whatever is spelt like a route, or not, asks for a key."""
    for path in paths_of(app):
        for method in METHODS:
            assert caller.status(method, path) == 401, (method, path)
        for variant, method in itertools.product(variants(path), ("GET", "HEAD", "OPTIONS", "POST")):
            if not path.startswith(("/v3", "/openai")):  # what is mounted there is the same
                assert caller.status(method, variant) == 401, (method, variant)


UNLISTED = """
/ /docs /redoc /openapi.json /metrics /v1 /invocations /pause /resume /sleep /wake_up /is_sleeping
/update_weights /update_weights_from_disk /init_weights_update_group /reset_prefix_cache
/reset_mm_cache /collective_rpc /load_lora_adapter /v1/load_lora_adapter /v1/unload_lora_adapter
/tokenize /detokenize /start_profile /stop_profile /server_info /get_server_info /get_model_info
/flush_cache /abort_request /set_internal_state /slow_down /dump_expert_distribution_record
/generate /generate_stream /pooling /score /rerank /classify /props /slots /slots/0?action=erase
/lora-adapters /infill /completion /embedding /api/tags /api/pull /api/create /api/generate /ping
/version /load /health /health/ /health/live/ /health/ready/x /shutdown /debug /debug/pprof /.env
/.git/config /static/ /favicon.ico /admin /key/generate /spend/logs
"""


@pytest.mark.parametrize("path", UNLISTED.split())
async def test_peers_unlisted_endpoints(app: FastAPI, path: str) -> None:
    """Endpoints of vLLM, SGLang, TGI, llama.cpp, Ollama and LiteLLM that were open to all or forgotten."""
    for method in (*METHODS, "CONNECT", "PROPFIND"):
        call = AsgiCall(method, path)
        await call.run(app)
        assert call.status == 401, method


def test_cve_2025_59425_constant_time() -> None:
    """vLLM and llama.cpp compared keys with ==, which is done sooner the sooner they differ.

    Seconds on a shared machine tell nothing, so the code is read: digests, by compare_digest, all of them.
    """
    source = Path(security.__file__)
    verify = next(
        node
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name == "verify"
    )
    assert not [n for n in ast.walk(verify) if isinstance(n, ast.Compare | ast.Break | ast.Continue)]
    assert [n for n in ast.walk(verify) if isinstance(n, ast.Attribute) and n.attr == "compare_digest"]
    ring = KeyRing.from_keys([KEY])
    assert ring._digests == (hashlib.sha256(KEY.encode()).digest(),)
    assert KEY not in repr(vars(ring))


QUOTES = ("'", '"', "`", "')", "'))", '")', "\\'", "%27", "\xef\xbc\x87", "';", "1'")
CLAUSES = (
    *(" OR 1=1--", " OR '1'='1", " UNION SELECT api_key FROM keys--", "; DROP TABLE keys--", " OR 1=1#"),
    *(
        "||pg_sleep(10)--",
        " AND (SELECT 1 FROM pg_sleep(9))::text='1",
        "/**/OR/**/1=1/*",
        " OR token LIKE 'sk-%",
    ),
    *(
        "; COPY keys TO PROGRAM 'touch canary'--",
        " UNION SELECT NULL,NULL,NULL--",
        " OR ''='",
        " HAVING 1=1--",
    ),
    *("+OR+1=1--", "{{7*7}}", "\\x00 OR 1", " RLIKE SLEEP(5)#", " OR EXISTS(SELECT * FROM sqlite_master)--"),
)


async def test_cve_2026_42208_sql_in_the_authorization_header(app: FastAPI, engine: FakeEngine) -> None:
    """LiteLLM: the presented key was joined into SQL. Every payload gets the answer of a wrong key."""
    payloads = [quote + clause for quote in QUOTES for clause in CLAUSES]
    assert len(payloads) >= 190
    answers = set()
    for payload in [*payloads, *(f"{KEY}{p}" for p in payloads[:20]), "wrong"]:
        call = AsgiCall.post_json("/v1/chat/completions", {}, [("authorization", f"Bearer {payload}")])
        await call.run(app)
        assert call.status == 401, payload
        answers.add(bytes(call.answer))
    assert len(answers) == 1
    assert engine.requests == []


@pytest.mark.parametrize("key", ["", " ", "\t", "None", "none", "null", "a,,b", "good, ", "two words", "é"])
def test_lightllm_empty_nonce(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    """LightLLM: an empty secret is false, and switched the check off. Here it stops the start."""
    monkeypatch.setenv("TOPTWO_API_KEY", key)
    with pytest.raises(StartupError, match=r"TOPTWO_API_KEY: .*key"):
        load_settings({})


def test_an_empty_ring_admits_nobody() -> None:
    """What an empty secret would look like if one ever came this far."""
    for presented in ("", " ", "None", "null", "\0"):
        assert KeyRing([]).verify(presented) is None
        assert KeyRing.from_keys([KEY]).verify(presented) is None


ORIGINS = ["https://evil.example", "null", "http://localhost:3000", "http://127.0.0.1:8000", "file://"]


@pytest.mark.parametrize("origin", ORIGINS)
async def test_llama_cpp_cross_origin_credentials(
    http: httpx2.AsyncClient, app: FastAPI, origin: str
) -> None:
    """llama.cpp echoed any Origin and allowed credentials. Here no answer ever speaks of origins."""
    preflight = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    preflight["Access-Control-Request-Headers"] = "authorization,content-type"
    call = AsgiCall("OPTIONS", "/v1/chat/completions", list(preflight.items()))
    await call.run(app)
    assert call.status == 401
    asked = await http.get("/models", headers={"Origin": origin})
    live = await http.get("http://test/health/live", headers={"Origin": origin})
    for names in (call.answer_headers, asked.headers, live.headers):
        assert not [name for name in names if name.lower().startswith("access-control-")]
        assert "set-cookie" not in names


def test_dns_rebinding(server: ServerProcess, caller: Caller) -> None:
    """A page whose name now leads to this machine has no key, and nothing here is known by a cookie."""
    for host in ("evil.example", "evil.example:8000", "localhost.evil.example"):
        assert caller.status("POST", "/v1/chat/completions", host, Origin=f"http://{host}") == 401
        assert caller.status("GET", "/v1/models", host, Cookie="session=1; Authorization=Bearer x") == 401


def test_keys_are_not_taken_from_elsewhere(server: ServerProcess, caller: Caller) -> None:
    """A key in a query, a cookie or a body would be logged by every proxy on the way."""
    for name in ("api_key", "key", "token", "access_token", "api-key"):
        assert caller.status("GET", f"/v1/models?{name}={ALICE}") == 401
        assert caller.status("GET", "/v1/models", Cookie=f"{name}={ALICE}") == 401
    body = json.dumps({"api_key": ALICE}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    assert b" 401 " in exchange(server, head + b"Content-Length: %d\r\n\r\n" % len(body) + body)


def test_which_keys_exist_cannot_be_told(server: ServerProcess) -> None:
    """Wrong keys that are nearly right get the same bytes as those that are not."""
    rng = random.Random(0)
    answers: set[str] = set()
    near = [
        ALICE[:-1],
        ALICE + "x",
        ALICE.upper(),
        ALICE.replace("5", "6"),
        ALICE[:10],
        "x",
        "sk-" + "0" * 500,
    ]
    near += ["".join(rng.choices("abcdefgh-", k=len(ALICE))) for _ in range(5)]
    for key in near:
        answer: Any = httpx2.get(f"{server.root}/v1/models", headers={"Authorization": f"Bearer {key}"})
        assert answer.status_code == 401
        answers.add(answer.text)
    assert len(answers) == 1
