"""Code that comes with a model, with a request or over a socket is not run: a test for each way found."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import httpx2
import numpy as np
import psutil
import pytest
import torch
import zmq
from structlog.testing import capture_logs

from fakes import FakeEngine, chat, served_model
from security.raw_socket import address
from server_process import ServerProcess
from tampering import edit_config
from tiny import write_mixtral
from toptwo.engine.transport import ClientSocket, EngineSocket
from toptwo.errors import ApiError, CheckpointError, StartupError
from toptwo.gguf.header import read_gguf
from toptwo.messages import AbortRequest
from toptwo.models.registry import read_config
from toptwo.runtime.checkpoints.header import read_header
from toptwo.runtime.checkpoints.open import open_checkpoint
from toptwo.text.template import ChatTemplate
from toptwo.text.tokenizer import Tokenizer

USER = {"role": "user", "content": "hello"}
SHELL = "touch it-ran"
# As published against servers that rendered a model's template without a sandbox, and the usual variations.
INJECTIONS = [
    "{{ self.__init__.__globals__.__builtins__.__import__('os').popen('SHELL').read() }}",
    "{{ cycler.__init__.__globals__.os.popen('SHELL').read() }}",
    "{{ joiner.__init__.__globals__.os.popen('SHELL').read() }}",
    "{{ namespace.__init__.__globals__.os.popen('SHELL').read() }}",
    "{{ lipsum.__globals__['os'].popen('SHELL').read() }}",
    "{{ raise_exception.__globals__.__builtins__.open('it-ran', 'w') }}",
    "{{ strftime_now.__globals__['__builtins__']['eval']('open(\"it-ran\", \"w\")') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__()[100].__init__.__globals__['sys'].modules['os'] }}",
    "{% for c in [].__class__.__base__.__subclasses__() %}{% if c.__name__ == 'catch_warnings' %}"
    "{{ c()._module.__builtins__['__import__']('os').popen('SHELL') }}{% endif %}{% endfor %}{{ 1/0 }}",
    "{{ messages.__class__.__base__.__subclasses__()[0] }}",
    "{{ self._TemplateReference__context.cycler.__init__.__globals__.os.popen('SHELL').read() }}",
    "{{ request['application']['__globals__']['__builtins__']['__import__']('os')['popen']('SHELL') }}",
    "{% set x = cycler|attr('__init__')|attr('__globals__') %}{{ x['os'].popen('SHELL') }}",
    "{% set x = ''|attr('\\x5f\\x5fclass\\x5f\\x5f') %}{{ x|attr('\\x5f\\x5fmro\\x5f\\x5f')|last }}{{ x() }}",
    "{{ (''|attr(['_'*2,'class','_'*2]|join))|attr(['_'*2,'base','_'*2]|join) }}{{ 1/0 }}",
    "{{ messages|map(attribute='__class__.__init__.__globals__')|list|first|attr('keys') }}{{ 1/0 }}",
    "{% macro m() %}{{ caller.__globals__.os.system('SHELL') }}{% endmacro %}{% call m() %}{% endcall %}",
    "{% set ns = namespace(a=1) %}{{ ns.__init__.__globals__ }}{{ ns.__class__.__mro__[1]() }}",
    "{{ (messages|groupby('role'))[0].__class__.__mro__[1].__subclasses__() }}",
    "{{ (1).__class__.__base__.__subclasses__() }}",
    "{% set g = (i for i in messages) %}{{ g.gi_frame.f_builtins }}",
    "{{ raise_exception.__code__.co_consts }}{{ raise_exception.__wrapped__() }}",
    "{% include '/etc/passwd' %}",
    "{% from 'os' import system %}{{ system('SHELL') }}",
    "{% extends '/proc/self/environ' %}",
]


def assert_harmless(source: str, where: Path) -> None:
    """The template is refused, when it is read or when it is used, and nothing has happened."""
    with contextlib.chdir(where):
        with pytest.raises((ApiError, StartupError)) as caught:
            ChatTemplate(source.replace("SHELL", SHELL), {}).render([USER])
        if isinstance(caught.value, ApiError):
            assert caught.value.status == 400
    assert list(where.iterdir()) == []


@pytest.mark.parametrize("source", INJECTIONS)
def test_cve_2024_34359_and_cve_2026_5760_template_injection(source: str, tmp_path: Path) -> None:
    """llama-cpp-python and SGLang rendered a model's chat template in a plain Jinja environment."""
    assert_harmless(source, tmp_path)


PLAIN = """
import contextlib, jinja2, json, pathlib, sys
environment = jinja2.Environment()
environment.globals.update(raise_exception=print, strftime_now=print)
ran, canary = 0, pathlib.Path("it-ran")
for source in json.load(sys.stdin):
    with contextlib.suppress(Exception):
        environment.from_string(source).render(messages=[{"role": "user", "content": "hello"}])
    ran += canary.exists()
    canary.unlink(missing_ok=True)
sys.exit(ran)
"""


def test_the_injections_are_real(tmp_path: Path) -> None:
    """In a plain environment, as those servers had, the same templates run a shell."""
    given = json.dumps([source.replace("SHELL", SHELL) for source in INJECTIONS])
    done = subprocess.run(
        [sys.executable, "-c", PLAIN], cwd=tmp_path, input=given, text=True, capture_output=True, check=False
    )
    assert done.returncode >= 6, done.stderr


@pytest.mark.parametrize(
    "source",
    [
        "{{ '{0.__class__.__mro__}'.format(messages) }}{{ messages() }}",
        "{% set f = '{0.__class__.__init__.__globals__}'.format %}{{ f(raise_exception) }}{{ f() }}",
        "{% set ns = namespace(f='{0.__globals__}'.format) %}{{ ns.f(raise_exception) }}{{ ns.f() }}",
        "{{ dict(f='{x.__globals__}'.format)['f'](x=raise_exception) }}{{ 1/0 }}",
        "{{ ['{0.__globals__}'.format]|map('string')|join }}{{ ('%s'|attr('format_map'))(x) }}{{ 1/0 }}",
        "{{ '{0.__class__}'.format_map({'0': messages}) }}{{ 1/0 }}",
    ],
)
def test_cve_2024_56326_stored_format(source: str, tmp_path: Path) -> None:
    """Jinja before 3.1.5: str.format, kept in a variable and called later, was not looked after."""
    assert_harmless(source, tmp_path)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ('{0.__class__.__mro__}'|attr('format'))(messages).x.y }}",
        "{{ ['{0.__globals__}'|attr('format')][0](raise_exception).x.y }}",
        "{% set f = '{0.__globals__}'|attr('format') %}{{ f(raise_exception).x.y }}",
    ],
)
def test_cve_2025_27516_format_through_the_attr_filter(source: str, tmp_path: Path) -> None:
    """Jinja before 3.1.6: |attr fetched str.format past the sandbox."""
    assert_harmless(source, tmp_path)


async def test_requests_cannot_bring_a_template(http: httpx2.AsyncClient, engine: FakeEngine) -> None:
    """Whatever the sandbox lets through, it is the operator's choice of model that it comes from."""
    for name in ("chat_template", "template", "prompt_template", "jinja"):
        answer = await http.post("/chat/completions", json=chat(**{name: "{{ 1 }}"}))
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unknown_parameter")
    assert engine.requests == []


class Bomb:
    """Unpickling it creates the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


async def test_pickle_over_a_socket(tmp_path: Path) -> None:
    """CVE-2026-3059, CVE-2026-3060, CVE-2026-3989, CVE-2026-7301 (SGLang), CVE-2026-26220 (LightLLM),
    CVE-2025-32444, CVE-2025-30165, CVE-2025-47277 and CVE-2024-11041 (vLLM) unpickled what a socket brought.
    """
    path, canary = tmp_path / "engine.sock", tmp_path / "it-ran"
    engine, client = EngineSocket(path), ClientSocket(path)
    stranger = zmq.Context.instance().socket(zmq.DEALER)
    stranger.linger = 0
    try:
        stranger.connect(f"ipc://{path}")
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            stranger.send(pickle.dumps(Bomb(canary), protocol))
            with capture_logs():
                assert engine.receive(block=True) is None
        await client.send(AbortRequest("r"))
        received = engine.receive(block=True)
        assert received is not None
        assert received[1] == AbortRequest("r")
        engine._socket.send_multipart([received[0], pickle.dumps(Bomb(canary))])
        with capture_logs():
            assert await client.receive() is None
    finally:
        for each in (stranger, engine, client):
            each.close()
    assert not canary.exists()


def test_only_the_documented_port_listens(server: ServerProcess) -> None:
    """The same servers bound those sockets to every address of the machine."""
    parent = psutil.Process(server.process.pid)
    connections = [c for p in (parent, *parent.children(recursive=True)) for c in p.net_connections("inet")]
    assert {c.laddr for c in connections if c.status == psutil.CONN_LISTEN} == {address(server)}
    assert not [c for c in connections if c.type != 1]  # no datagrams either
    assert address(server)[0] == "127.0.0.1"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl"])
def test_cve_2025_32434_and_cve_2026_24747_weights_only(tmp_path: Path, name: str) -> None:
    """torch.load(weights_only=True) ran code, twice. Here pickles are refused by their name, unread."""
    canary = tmp_path / "it-ran"
    model = tmp_path / "model"
    model.mkdir()
    torch.save({"w": Bomb(canary)}, model / name)
    with pytest.raises(CheckpointError, match=re.escape(f"{model / name}: pickled weights are refused")):
        open_checkpoint(model, ())
    assert not canary.exists()


def lying_safetensors(path: Path, **tensor: Any) -> Path:
    header = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **tensor}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    return path


SAFETENSORS_LIES: list[dict[str, Any]] = [
    {"shape": [1 << 40], "data_offsets": [0, 1 << 42]},
    {"data_offsets": [0, 1 << 40]},
    {"shape": [1 << 40]},
    {"shape": [1 << 32, 1 << 32], "data_offsets": [0, 0]},
    {"shape": [-4]},
    {"data_offsets": [1 << 40, (1 << 40) + 16]},
]


@pytest.mark.parametrize("lie", SAFETENSORS_LIES)
def test_cve_2026_7482_safetensors_larger_than_its_file(tmp_path: Path, lie: dict[str, Any]) -> None:
    """Ollama believed a tensor's declared size and read on past the file, into its heap."""
    path = lying_safetensors(tmp_path / "model.safetensors", **lie)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="w "):
        read_header(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def lying_gguf(path: Path, old: bytes, new: bytes) -> Path:
    """A GGUF file of one 8 x 32 tensor w, with the first bytes after its name replaced."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("w", np.zeros((8, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    content = path.read_bytes()
    at = content.index(struct.pack("<Q", 1) + b"w") + 9
    assert content[at:].startswith(old)
    path.write_bytes(content[:at] + new + content[at + len(old) :])
    return path


SHAPE = struct.pack("<IQQ", 2, 32, 8)  # dimensions, fastest first
GGUF_LIES = [
    (SHAPE, struct.pack("<IQQ", 2, 32, 9)),
    (SHAPE, struct.pack("<IQQ", 2, 32, 1 << 40)),
    (SHAPE, struct.pack("<IQQ", 2, 1 << 63, 2)),
    (SHAPE, struct.pack("<IQQ", 2, 1 << 33, 1 << 31)),
    (SHAPE, struct.pack("<IQQ", 2, 0, 8)),
    (struct.pack("<I", 2), struct.pack("<I", 0xFFFFFFFF)),
    (SHAPE + struct.pack("<I", 0), SHAPE + struct.pack("<I", 1 << 20)),
    (SHAPE + struct.pack("<IQ", 0, 0), SHAPE + struct.pack("<IQ", 0, 32)),
    (SHAPE + struct.pack("<IQ", 0, 0), SHAPE + struct.pack("<IQ", 0, (1 << 64) - 32)),
]


@pytest.mark.parametrize(("old", "new"), GGUF_LIES)
def test_cve_2026_7482_and_cve_2026_53923_gguf_lies(tmp_path: Path, old: bytes, new: bytes) -> None:
    """Ollama and vLLM took shapes and offsets of a GGUF file for true."""
    read_gguf([lying_gguf(tmp_path / "good.gguf", SHAPE, SHAPE)])
    path = lying_gguf(tmp_path / "a.gguf", old, new)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=r"a\.gguf: "):
        read_gguf([path])
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_cve_2026_22807_auto_map(alice: httpx2.Client, canary: Path, hostile_model: Path) -> None:
    """vLLM (and CVE-2025-66448 before) resolved auto_map before it asked whether code was trusted.

    The model served here names its code in every such place; it answers, and the code has not run.
    """
    assert "auto_map" in json.loads((hostile_model / "config.json").read_text())
    messages = [{"role": "user", "content": "hello"}]
    answer = alice.post(
        "/chat/completions", json={"model": "tiny-moe", "messages": messages, "max_tokens": 4}
    )
    assert answer.json()["usage"]["completion_tokens"] == 4
    assert not canary.exists()


def test_cve_2026_4372_implementation_named_by_the_config(hostile_model: Path, tmp_path: Path) -> None:
    """transformers before 5.3 fetched the code that _attn_implementation_internal names, trusted or not;
    CVE-2026-1839 and CVE-2026-5241 (LightGlue) are its like. Unknown keys are not even read here.
    """
    write_mixtral(tmp_path)
    plain = read_config(tmp_path)[1]
    names = ("_attn_implementation_internal", "_attn_implementation", "auto_map", "trust_remote_code")
    edit_config(tmp_path, **dict.fromkeys(names, "attacker/kernel"))
    assert read_config(tmp_path)[1] == plain
    edit_config(tmp_path, model_type="../../attacker")
    with pytest.raises(StartupError, match="model_type"):
        read_config(tmp_path)
    assert isinstance(Tokenizer.load(hostile_model), Tokenizer)


TENSOR_FIELDS = (
    "prompt_embeds",
    "prompt_embeddings",
    "input_embeds",
    "multi_modal_data",
    "mm_processor_kwargs",
)
TENSOR_FIELDS += (
    "kv_transfer_params",
    "image_data",
    "lora_path",
    "lora_request",
    "logits_processors",
    "vllm_xargs",
)


@pytest.mark.parametrize("name", TENSOR_FIELDS)
async def test_cve_2025_62164_prompt_embeds(http: httpx2.AsyncClient, engine: FakeEngine, name: str) -> None:
    """vLLM gave a client's tensors to torch.load. Here no field takes one."""
    given = {"model": "org/tiny-moe", "prompt": "hello", name: "gASVBAAAAAAAAABLAS4="}
    for path, body in (
        ("/completions", given),
        ("/chat/completions", chat(**{name: "gASVBAAAAAAAAABLAS4="})),
    ):
        answer = await http.post(path, json=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == name
    assert engine.requests == []


PYTHON = """__import__('os').system('touch it-ran')"""


@pytest.mark.parametrize(
    "arguments", [PYTHON, f'{{"x": {PYTHON}}}', f'{{"x": "{PYTHON}"}}', "{**1}", "[1][", "f(x=1)"]
)
async def test_cve_2025_9141_tool_arguments(
    http: httpx2.AsyncClient, engine: FakeEngine, arguments: str, tmp_path: Path
) -> None:
    """vLLM evaluated what a model wrote as a call's arguments. Here they stay text."""
    text = f'<tool_call>\n{{"name": "f", "arguments": {arguments}}}\n</tool_call><|im_end|>'
    engine.script.token_ids = served_model().tokenizer.encode([text])
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    with contextlib.chdir(tmp_path):
        answer = await http.post("/chat/completions", json=chat(tools=tools))
        called = {"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}}
        sent_back = [USER, {"role": "assistant", "tool_calls": [called]}, USER]
        again = await http.post("/chat/completions", json=chat(messages=sent_back))
    assert answer.status_code == 200
    assert again.status_code in (200, 400)
    message = answer.json()["choices"][0]["message"]
    for call in message.get("tool_calls") or []:  # a broken call ends where it stops being JSON
        assert arguments.startswith(call["function"]["arguments"])
    assert list(tmp_path.iterdir()) == []


GOOD: dict[str, dict[str, Any]] = {
    "chat/completions": {"messages": [USER]},
    "completions": {"prompt": "hello"},
    "responses": {"input": "hello"},
    "messages": {"messages": [USER], "max_tokens": 5},
    "messages/count_tokens": {"messages": [USER]},
    "tokenize": {"prompt": "hello"},
    "detokenize": {"tokens": [1]},
}


def integer_fields(document: Any, path: str) -> Iterator[str]:
    """Names of the fields of a request that may be an integer."""
    item = document["paths"][f"/v1/{path}"]["$ref"].rpartition("/")[2]
    content = document["components"]["pathItems"][item]["post"]["requestBody"]["content"]
    schema = content["application/json"]["schema"]["$ref"].rpartition("/")[2]
    for name, field in document["components"]["schemas"][schema]["properties"].items():
        if "integer" in [choice.get("type") for choice in (field, *field.get("anyOf", []))]:
            yield name


@pytest.mark.parametrize("path", GOOD)
async def test_cve_2026_21869_every_integer_is_bounded(
    http: httpx2.AsyncClient, engine: FakeEngine, path: str
) -> None:
    """llama.cpp: a negative n_discard reached the KV code and wrote out of bounds."""
    good = {"model": "org/tiny-moe", **GOOD[path]}
    assert (await http.post(path, json=good)).status_code == 200
    engine.requests.clear()
    document = (await http.get("http://test/openapi.json")).json()
    fields = list(integer_fields(document, path))
    assert fields or path in ("tokenize", "detokenize", "messages/count_tokens")
    for field, value in itertools.product(fields, (-(2**63) - 1, -(2**31) - 1, 2**63, 2**64, 1.5)):
        if field == "seed" and value == -(2**31) - 1:
            continue  # any number of 64 bits is one
        answer = await http.post(path, json={**good, field: value})
        assert answer.status_code == 400, (field, value)
        assert field in answer.json()["error"]["message"]
    assert engine.requests == []
