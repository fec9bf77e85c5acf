"""What one caller sends reaches no other, no log and no error: a test for each way it has."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

import schedules
import tiny
from fakes import KEY, AsgiCall, FakeEngine, FakeGrammars, Script, chat, served_model
from security.raw_socket import ALICE, MALLORY, exchange
from server_process import ServerProcess
from toptwo.api.health import Lifecycle
from toptwo.api.security import KeyRing
from toptwo.app import create_app
from toptwo.engine.blocks import hash_block, root_hash
from toptwo.runtime import build
from toptwo.runtime.kv_cache import allocate_kv_cache
from toptwo_kernels.registry import BACKENDS

CANARY = "canary-3141592653"


def test_cve_2025_25183_foreseeable_hashes() -> None:
    """vLLM keyed cached prefixes by Python's hash(), for which anybody can find two prompts of one hash."""
    same = [((1, 2), (1 + 2**61 - 1, 2)), ((0, 0), (2**61 - 1, 0)), ((-1,), (-2,))]
    for parent, (one, other) in product((root_hash(""), root_hash("k"), bytes(32)), same):
        assert hash(one) == hash(other)
        assert hash_block(parent, one) != hash_block(parent, other)
    assert len(hash_block(bytes(32), [1])) == 32
    # Neither can a boundary be moved: between scope and tokens, or between one block and the next.
    assert root_hash("a") != root_hash("a\0")
    assert hash_block(hash_block(bytes(32), [1]), [2]) != hash_block(bytes(32), [1, 2])


def cached(server: ServerProcess, key: str, text: str) -> int:
    body = {"model": "tiny-moe", "messages": [{"role": "user", "content": text}], "max_tokens": 1}
    headers = {"Authorization": f"Bearer {key}"}
    answer = httpx2.post(f"{server.url}/chat/completions", json=body, headers=headers, timeout=30)
    found: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return found


def test_cve_2025_46570_timing_of_strangers_prompts(server: ServerProcess) -> None:
    """vLLM: the time to the first token told whether anybody had sent the same prompt before."""
    text = "the merger will be announced on friday " * 20
    assert cached(server, ALICE, text) == 0
    assert cached(server, ALICE, text) > 100
    assert cached(server, MALLORY, text) == 0
    assert cached(server, MALLORY, text) > 100


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mixtral")
    tiny.write_mixtral(directory)
    return directory


@pytest.mark.parametrize("backend", BACKENDS)
def test_cve_2026_3108_remains_of_strangers(
    checkpoint: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that was not cleared between sessions. Whatever lies in the KV cache, a request reads nothing
    that it has not written itself: with NaN everywhere its logits are the same, bit by bit.
    """
    wanted = [schedules.request("it", seed=7), schedules.request("too", seed=8, temperature=0.8)]
    clean = schedules.run(checkpoint, wanted, backend=backend)

    def poisoned(*arguments: Any) -> Any:
        layers = allocate_kv_cache(*arguments)
        for tensor in (tensor for kv in layers for tensor in kv):
            tensor.fill_(float("nan"))
        return layers

    monkeypatch.setattr(build, "allocate_kv_cache", poisoned)
    dirty = schedules.run(checkpoint, wanted, backend=backend)
    assert dirty.tokens == clean.tokens
    for name, logits in clean.logits.items():
        assert torch.equal(torch.stack(dirty.logits[name]), torch.stack(logits))


INJECTIONS = [
    "\n",
    "\r\n",
    "\x1b[2J\x1b[31m",
    "\u2028",
    "\x00",
    '"}\n{"event": "forged", "level": "critical"}',
    "%0d%0a",
    "${jndi:ldap://127.0.0.1:1/a}",
]


def test_prompts_and_keys_are_in_no_log(server: ServerProcess, alice: httpx2.Client) -> None:
    """llama.cpp's log could be forged by what a caller sends, and prompts are found in the logs of most."""
    for injection in INJECTIONS:
        text = f"{injection}{CANARY}{injection}forged"
        for body in (
            {"model": text, "messages": [{"role": "user", "content": text}]},
            {
                "model": "tiny-moe",
                "messages": [{"role": "user", "content": text}],
                "user": text,
                "max_tokens": 3,
            },
            {"model": "tiny-moe", "messages": [{"role": text, "content": text}]},
            {"model": "tiny-moe", "messages": text},
            {"model": "tiny-moe", "messages": [], text: text},
            {
                "model": "tiny-moe",
                "messages": [{"role": "user", "content": "x"}],
                "metadata": {text: text},
                "max_tokens": 3,
            },
            {"model": "tiny-moe", "messages": [{"role": "user", "content": "x"}], "guided_regex": f"({text}"},
            {
                "model": "tiny-moe",
                "messages": [{"role": "user", "content": text * 50}],
                "stream": True,
                "max_tokens": 3,
            },
        ):
            assert alice.post("/chat/completions", json=body).status_code < 500
        assert alice.post("/chat/completions", content=f'{{"{text}').status_code == 400
    for line in (
        f"X-Request-ID: {CANARY} forged",
        f"User-Agent: {CANARY}\x1b[31m",
        f"Authorization: Bearer {CANARY}",
    ):
        exchange(server, f"GET /v1/{CANARY}?{CANARY} HTTP/1.1\r\nHost: {CANARY}\r\n{line}\r\n\r\n".encode())
    written = server.out + server.err
    for secret in (CANARY, ALICE, MALLORY, "merger", "\x1b[31m"):
        assert secret not in written
    for line in server.err.splitlines():
        assert json.loads(line)["event"] != "forged"


def test_metrics_name_no_caller(alice: httpx2.Client) -> None:
    """Numbers that a dashboard shows carry neither keys nor prompts nor names that a caller made up."""
    shown = alice.get(alice.base_url.join("/metrics"))
    assert shown.status_code == 200
    for secret in (CANARY, ALICE, MALLORY, "forged"):
        assert secret not in shown.text


def bad_requests() -> list[tuple[str, bytes]]:
    """Requests that go wrong at every place where one can, with the canary wherever a text can be."""
    chats: list[dict[str, Any]] = [
        {"model": CANARY},
        {"model": f"../../{CANARY}"},
        {"messages": CANARY},
        {"messages": [{"role": CANARY, "content": CANARY}]},
        {"messages": [{"role": "user", "content": [{"type": CANARY}]}]},
        {"temperature": CANARY},
        {"logit_bias": {"5": CANARY}},
        {"stop": [CANARY, 5]},
        {"tools": [{"type": "function", "function": {"name": f"{CANARY} {CANARY}"}}]},
        {"tool_choice": {"type": "function", "function": {"name": CANARY}}},
        {"response_format": {"type": CANARY}},
        {"guided_regex": f"({CANARY}"},
        {"guided_grammar": f"start: {CANARY}"},
        {"reasoning_effort": CANARY},
        {"chat_template_kwargs": {"messages": CANARY}},
    ]
    found = [("/v1/chat/completions", json.dumps(chat(**fields)).encode()) for fields in chats]
    found += [
        ("/v1/chat/completions", body) for body in (CANARY.encode(), f'{{"a": "{CANARY}'.encode(), b"\xff")
    ]
    found += [(f"/v1/{CANARY}", b"{}"), (f"/v1/models/{CANARY}", b"{}"), ("/v1/messages", b'{"model": 5}')]
    found += [("/v1/completions", json.dumps({"model": "org/tiny-moe", "prompt": [CANARY, 5]}).encode())]
    return found


REVEALING = (
    "Traceback",
    'File "',
    "/home",
    "/work",
    "/tmp",
    "/usr",
    "site-packages",
    ".py",
    "0x7f",
    "SELECT ",
)
REVEALING += ("pydantic", "starlette", "orjson", "msgspec", "ValidationError", "Exception")


@pytest.mark.parametrize("number", range(len(bad_requests())))
async def test_errors_reveal_nothing(number: int) -> None:
    """FastAPI's own 422 repeats the input; others answered with stack traces and paths."""
    path, body = bad_requests()[number]
    app = create_app(
        FakeEngine(), served_model(), FakeGrammars(bad=(CANARY,)), KeyRing.from_keys([KEY]), Lifecycle()
    )
    call = AsgiCall("POST", path, [("authorization", f"Bearer {KEY}")], body)
    await call.run(app)
    assert call.status in (400, 404, 405)
    text = call.answer.decode()
    assert set(json.loads(text)["error"]) >= {"message", "type"}
    assert not [word for word in REVEALING if word in text]
    # The model's name is the one thing that an error repeats, and a client needs it to.
    assert CANARY not in text or number in (0, 1)


async def test_a_fault_of_ours_reveals_nothing() -> None:
    """The words of an exception may hold anything."""
    for after in (0, 1):
        engine = FakeEngine(
            Script(token_ids=[1, 2], raises=RuntimeError(f"{CANARY} {KEY}"), raises_after=after)
        )
        app = create_app(engine, served_model(), FakeGrammars(), KeyRing.from_keys([KEY]), Lifecycle())
        for stream in (False, True):
            call = AsgiCall.post_json(
                "/v1/chat/completions", chat(stream=stream), [("authorization", f"Bearer {KEY}")]
            )
            await call.run(app)
            assert call.status in (200, 500)
            assert b"error" in call.answer
            assert not [word for word in (CANARY, KEY, *REVEALING) if word.encode() in call.answer]


NAMES = [
    "../../etc/passwd",
    "/etc/passwd",
    "..\\..\\x",
    "tiny-moe/../tiny-moe",
    "file:///etc/passwd",
    "tiny-moe\0",
    ".",
]


@pytest.mark.parametrize("name", NAMES)
def test_model_names_are_no_paths(alice: httpx2.Client, name: str) -> None:
    """Adapters and models that a request names were read from wherever the name led (vLLM, Ollama)."""
    body = {"model": name, "messages": [{"role": "user", "content": "x"}]}
    answer = alice.post("/chat/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert "root:" not in answer.text
