"""One real server for all attacks, and an app over a scripted engine for those that need no socket.

The server's model is a stranger's: its directory is full of code that waits to be run, and its configs
name that code wherever peers have been talked into loading it. All other tests of this folder attack
this server, and the canary is looked for at the end.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI

import tiny
from fakes import KEY, FakeEngine, FakeGrammars, Script, served_model
from security.raw_socket import ALICE, MALLORY
from server_process import ServerProcess
from tampering import edit_config
from toptwo.api.health import Lifecycle
from toptwo.api.security import KeyRing
from toptwo.app import create_app

CODE = ("modeling_evil", "configuration_evil", "tokenization_evil", "processing_evil", "handler", "hubconf")
SHADOWS = ("torch", "zmq", "structlog", "tokenizers", "sitecustomize", "usercustomize", "json", "toptwo")
AUTO_MAP = {
    "AutoConfig": "configuration_evil.EvilConfig",
    "AutoModel": "modeling_evil.EvilModel",
    "AutoModelForCausalLM": "attacker/repository--modeling_evil.EvilModel",
    "AutoTokenizer": ["tokenization_evil.EvilTokenizer", None],
}


@pytest.fixture(scope="session")
def canary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that code of the model's author creates when it is run."""
    return tmp_path_factory.mktemp("canary") / "it-ran"


@pytest.fixture(scope="session")
def hostile_model(tmp_path_factory: pytest.TempPathFactory, canary: Path) -> Path:
    """A checkpoint that can be served and brings along every trap that a config can set."""
    directory = tmp_path_factory.mktemp("models") / "tiny-moe"
    tiny.write_chat_mixtral(directory)
    edit_config(
        directory,
        auto_map=AUTO_MAP,
        trust_remote_code=True,
        _attn_implementation_internal="attacker/kernel",
        _attn_implementation="attacker/kernel",
        attn_implementation="attacker/kernel",
        _experts_implementation_internal="attacker/kernel",
        custom_pipelines={"text-generation": {"impl": "handler.Pipeline", "pt": ["AutoModelForCausalLM"]}},
        architectures=["EvilForCausalLM"],
    )
    words = directory / "tokenizer_config.json"
    traps: dict[str, Any] = {
        "auto_map": AUTO_MAP,
        "tokenizer_class": "EvilTokenizer",
        "trust_remote_code": True,
    }
    words.write_text(json.dumps({**json.loads(words.read_text()), **traps}))
    for name in (*CODE, *SHADOWS):
        (directory / f"{name}.py").write_text(f"open({str(canary)!r}, 'w')\n")
    (directory / "custom_generate").mkdir()
    (directory / "custom_generate" / "generate.py").write_text(f"open({str(canary)!r}, 'w')\n")
    return directory


@pytest.fixture(scope="session")
def server(hostile_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Started in the model's own directory, as people do."""
    arguments = [".", "--threads", "1", "--api-key", ALICE, "--api-key", MALLORY]
    with contextlib.chdir(hostile_model):
        process = ServerProcess(tmp_path_factory.mktemp("server"), arguments, {"PYTHONPATH": ""})
    try:
        yield process.wait_until_ready()
    finally:
        process.kill()


@pytest.fixture
def alice(server: ServerProcess) -> Iterator[httpx2.Client]:
    """A client of the real server, which must be the same one before and after the test."""
    engine = server.engine_pid
    headers = {"Authorization": f"Bearer {ALICE}"}
    with httpx2.Client(base_url=server.url, headers=headers, timeout=30) as client:
        yield client
    assert server.engine_pid == engine
    assert server.readiness() == 200


@pytest.fixture
def engine() -> FakeEngine:
    """Answers "hello"."""
    return FakeEngine(Script(token_ids=served_model().tokenizer.encode(["hello<|im_end|>"])))


@pytest.fixture
def app(engine: FakeEngine) -> FastAPI:
    return create_app(engine, served_model(), FakeGrammars(), KeyRing.from_keys([KEY]), Lifecycle())


@pytest.fixture
async def http(app: FastAPI) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of the app, with its key."""
    async with httpx2.AsyncClient(
        transport=httpx2.ASGITransport(app=app),
        base_url="http://test/v1",
        headers={"Authorization": f"Bearer {KEY}"},
    ) as client:
        yield client
