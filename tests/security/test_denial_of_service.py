"""One request harms nobody but its sender: a test for each that has stopped a peer.

`alice` asserts that the engine process is the same one afterwards, and that the server is ready.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import httpx2
import psutil
import pytest
from fastapi import FastAPI

from fakes import KEY, AsgiCall, FakeEngine, chat, served_model
from security.raw_socket import ALICE, exchange, statuses
from server_process import ServerProcess
from toptwo.api.sampling_schema import MOST_CHOICES

URL = "/v1/chat/completions"
BEARER = [("authorization", f"Bearer {KEY}"), ("content-type", "application/json")]


def ask(**fields: Any) -> dict[str, Any]:
    """A short request to the real server."""
    return {
        "model": "tiny-moe",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 2,
        **fields,
    }


def refused(answer: httpx2.Response, param: str | None = None) -> None:
    assert answer.status_code == 400, answer.text[:200]
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert str(error["param"]).startswith(param), error


@contextmanager
def within(seconds: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


NUMBERS = [0, -1, MOST_CHOICES + 1, 16384, 2**31, 10**9, 2**63, 10**30, True, "1", 1.5, [], {}]


@pytest.mark.parametrize("value", NUMBERS)
@pytest.mark.parametrize("name", ["n", "best_of"])
async def test_cve_2026_34756_and_cve_2024_8939_choices(
    http: httpx2.AsyncClient, engine: FakeEngine, name: str, value: object
) -> None:
    """vLLM made n copies of a request, whatever n and best_of were, before it looked at anything else."""
    for path, body in (
        ("/chat/completions", chat(**{name: value})),
        ("/completions", {"model": "org/tiny-moe", "prompt": "hello", name: value}),
    ):
        answer = await http.post(path, json=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == name
    assert engine.requests == []


WORK: list[tuple[str, Any]] = [
    ("stop", [str(i) for i in range(100_000)]),
    ("stop", ["x"] * 5),
    ("stop", "x" * 257),
    ("stop", ["x" * 1_000_000]),
    ("stop", ""),
    ("top_logprobs", 21),
    ("top_logprobs", -1),
    ("top_logprobs", 10**9),
    ("logit_bias", {str(i): 1 for i in range(100_000)}),
    ("logit_bias", {"-1": 1}),
    ("logit_bias", {"99999999": 1}),
    ("logit_bias", {"x" * 100_000: 1}),
    ("stop_token_ids", list(range(100_000))),
    ("max_tokens", 2**63),
    ("max_tokens", -1),
    ("messages", [{"role": "user", "content": "x"}] * 100_000),
    ("tools", [{"type": "function", "function": {"name": "f"}}] * 100_000),
]


@pytest.mark.parametrize(("name", "value"), WORK, ids=[f"{n}-{i}" for i, (n, _) in enumerate(WORK)])
async def test_tgi_limits_of_work_per_token(
    app: FastAPI, engine: FakeEngine, name: str, value: object
) -> None:
    """What is looked at for every token, or for every message, is bounded, and refused in little time."""
    body = json.dumps(chat(**{"logprobs": True} if name == "top_logprobs" else {}, **{name: value})).encode()
    took = []
    for _ in range(3):  # the collector may strike at any time
        call = AsgiCall("POST", URL, BEARER, body)
        began = time.process_time()  # seconds of this process: others may keep the machine busy
        await call.run(app)
        took.append(time.process_time() - began)
        assert call.status == 400
        assert json.loads(call.answer)["error"]["param"].startswith(name)
    assert min(took) < 0.1 + len(body) / 5e6
    assert engine.requests == []


EDGES = [
    "",
    " ",
    "\n",
    "\t\t",
    "\0",
    "\ufeff",
    "\u200b",
    "a",
    "<|im_end|>",
    "\U0010ffff",
    "\u202e",
    "e\u0301" * 50,
]


@pytest.mark.parametrize("text", EDGES)
def test_cve_2024_8768_empty_prompts(alice: httpx2.Client, text: str) -> None:
    """An empty prompt ended vLLM's engine."""
    completion = {"model": "tiny-moe", "prompt": text, "max_tokens": 1}
    for path, body in (
        ("/completions", completion),
        ("/completions", completion | {"prompt": [text, text]}),
        ("/chat/completions", ask(messages=[{"role": "user", "content": text}])),
        ("/responses", {"model": "tiny-moe", "input": text, "max_output_tokens": 16}),
        ("/messages", ask(messages=[{"role": "user", "content": text}])),
        ("/tokenize", {"model": "tiny-moe", "prompt": text}),
    ):
        assert alice.post(path, json=body).status_code in (200, 400), (path, text)


def test_cve_2024_8768_prompts_that_are_none(alice: httpx2.Client) -> None:
    """And its like: no messages, no tokens, tokens that no vocabulary has, one token too many."""
    for prompt in (
        [],
        [[]],
        [-1],
        [2**31],
        [2**63],
        [266],
        [[1], []],
        None,
        {},
        [None],
        ["a", 1],
        [1.5],
        [True],
    ):
        refused(alice.post("/completions", json={"model": "tiny-moe", "prompt": prompt, "max_tokens": 1}))
    refused(alice.post("/chat/completions", json=ask(messages=[])), "messages")
    for length, status in ((1, 200), (8190, 200), (8191, 400), (8192, 400), (100_000, 400)):
        body = {"model": "tiny-moe", "prompt": [65] * length, "max_tokens": 2}
        assert alice.post("/completions", json=body).status_code == status, length


BAD_SCHEMAS: list[Any] = [
    {"type": "invalid_type"},
    {"type": ["object", 5]},
    {"properties": {"a": {"type": "stsring"}}, "type": "object"},
    {"type": "string", "pattern": "("},
    {"type": "string", "pattern": "\\d{-1}"},
    {"type": "string", "pattern": "(?P<x>a)(?P=x)"},
    {"$ref": "#/$defs/none"},
    {"$ref": "http://127.0.0.1:1/schema"},
    {"$ref": "#"},
    {"enum": []},
    {"minimum": "x", "type": "integer"},
    {"required": 5, "type": "object"},
    {"items": "x", "type": "array"},
    "string",
    [],
    5,
]


@pytest.mark.parametrize("schema", BAD_SCHEMAS, ids=range(len(BAD_SCHEMAS)))
def test_cve_2025_48942_and_cve_2025_48944_bad_schemas(alice: httpx2.Client, schema: Any) -> None:
    """A schema, or a tool whose pattern or type was none, ended vLLM's worker."""
    formats = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    function = {"name": "f", "parameters": schema, "strict": True}
    tool = {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}
    named = tool | {"tool_choice": {"type": "function", "function": {"name": "f"}}}
    for body in (ask(response_format=formats), ask(**tool), ask(**named)):
        assert alice.post("/chat/completions", json=body).status_code in (200, 400)
        # A schema that refers to itself alone says nothing, and may be taken for one.


@pytest.mark.parametrize(
    "regex", ["(", "[", "*", "a{2,1}", "(?=a)", "\\1", "(?<x", "[z-a]", "(?i", "\\", "\ud7ff(", "x" * 70_000]
)
def test_cve_2025_48943_bad_expressions(alice: httpx2.Client, regex: str) -> None:
    """A regular expression that is none ended vLLM's worker."""
    refused(alice.post("/chat/completions", json=ask(guided_regex=regex)), "guided_regex")


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


HOSTILE: list[tuple[str, Callable[[], Any]]] = [
    ("guided_regex", lambda: "(a+)+$"),
    ("guided_regex", lambda: "((a{1,1000}){1,1000}){1,1000}"),
    ("guided_regex", lambda: "(?:" * 2000 + "a" + ")" * 2000),
    ("guided_regex", lambda: "(?:" * 10_000 + "a" + ")" * 10_000),
    ("guided_grammar", lambda: "start: " + "(" * 30_000 + '"a"' + ")" * 30_000),
    ("guided_grammar", lambda: 'start: x\nx: x x | "a" | '),
    ("response_format", lambda: nested(60)),
    (
        "response_format",
        lambda: {"type": "array", "minItems": 10**9, "items": {"type": "array", "minItems": 10**9}},
    ),
]


@pytest.mark.parametrize(("name", "value"), HOSTILE, ids=[f"{n}-{i}" for i, (n, _) in enumerate(HOSTILE)])
def test_cve_2025_48887_and_llama_cpp_grammars(
    alice: httpx2.Client, name: str, value: Callable[[], Any]
) -> None:
    """Catastrophic expressions (vLLM), deep groups (llama.cpp died of both), deep schemas (xgrammar)."""
    given = value()
    if name == "response_format":
        given = {"type": "json_schema", "json_schema": {"name": "x", "schema": given}}
    with within(15):
        answer = alice.post("/chat/completions", json=ask(**{name: given}))
    assert answer.status_code in (200, 400)
    if answer.status_code == 400:
        assert len(answer.json()["error"]["message"]) < 500


def test_cve_2025_29770_grammars_are_not_kept_on_disk(alice: httpx2.Client, server: ServerProcess) -> None:
    """vLLM kept every compiled grammar in a cache on disk, without bound."""
    parent = psutil.Process(server.process.pid)

    def written() -> int:
        # The log of requests is written, to one file.
        return sum(1 for p in server.directory.rglob("*") if p.is_file())

    before, files = written(), len(parent.open_files())
    for i in range(50):
        assert (
            alice.post("/chat/completions", json=ask(guided_regex=f"a{{{i + 1}}}", max_tokens=1)).status_code
            == 200
        )
    assert written() == before
    assert len(parent.open_files()) == files


@pytest.mark.parametrize("depth", [64, 65, 1000, 100_000, 1_000_000])
def test_deep_json(alice: httpx2.Client, depth: int) -> None:
    """A body of a thousand levels made every route of Rapid-MLX answer 500."""
    good = json.dumps(ask(metadata="HERE"))
    for deep in ("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth):
        body = good.replace('"HERE"', deep)  # a field that may hold anything
        answer = alice.post("/chat/completions", content=body[: 8 << 20])
        assert answer.status_code == (200 if depth <= 64 else 400)
        refused(alice.post("/chat/completions", content=f'{{"model":"tiny-moe","tools":{deep}}}'[: 8 << 20]))
        refused(alice.post("/chat/completions", content=deep[: 4 << 20]))


async def test_cve_2025_62426_and_cve_2025_61620_template_arguments(
    http: httpx2.AsyncClient, engine: FakeEngine
) -> None:
    """vLLM: chat_template_kwargs overrode what the server hands to its template, `tokenize` and the template
    itself among it. Here they are variables that a template may look up, and nothing that is ours.
    """
    assert (await http.post("/chat/completions", json=chat())).status_code == 200
    given = {
        "tokenize": True,
        "chat_template": "{{ 1 }}",
        "return_tensors": "pt",
        "raise_exception": 1,
        "namespace": 1,
    }
    assert (await http.post("/chat/completions", json=chat(chat_template_kwargs=given))).status_code == 200
    plain, with_arguments = engine.requests
    assert plain.prompt_ids == with_arguments.prompt_ids
    for name in (
        "messages",
        "tools",
        "add_generation_prompt",
        "documents",
        "bos_token",
        "__class__",
        "a.b",
        "",
    ):
        answer = await http.post("/chat/completions", json=chat(chat_template_kwargs={name: []}))
        assert answer.status_code == 400, name
    assert len(engine.requests) == 2


def test_cve_2025_46560_placeholders_in_linear_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM expanded placeholders in a prompt in quadratic time."""
    model = served_model()
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # all in the thread whose seconds are counted

    def seconds(text: str) -> float:
        began = time.thread_time()
        model.prompt_of([{"role": "user", "content": text}])
        return time.thread_time() - began

    for text in ("<|im_start|>", "<|im_end|><|im_", "hello <|im_start|>user "):
        seconds(text)
        short, long = (min(seconds(text * count) for _ in range(5)) for count in (1_000, 4_000))
        assert long / short <= 2.6**2, text  # two doublings; quadratic time would be 16


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\n" % ALICE.encode()
GOOD = json.dumps(ask()).encode()
PLAIN = HEAD + b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(GOOD) + GOOD


@pytest.mark.parametrize(
    "head",
    [
        b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-Big: " + b"a" * (1 << 20) + b"\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 200_000 + b"\r\n",
        b"GET /" + b"a" * (1 << 20) + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + b"a" * (1 << 20) + b"\r\n\r\n",
        b"A" * (1 << 20),
        b"GET /v1/models HTTP/1.1\r\nHost: x\r\n" + b"a" * (1 << 20),
    ],
    ids=["value", "many", "path", "key", "method", "unending"],
)
def test_cve_2025_48956_giant_headers(server: ServerProcess, alice: httpx2.Client, head: bytes) -> None:
    """vLLM read headers of any size."""
    parent = psutil.Process(server.process.pid)
    before = parent.memory_info().rss
    for _ in range(8):
        assert all(400 <= status < 500 for status in statuses(exchange(server, head)))
    assert parent.memory_info().rss - before < 64 << 20
    assert statuses(exchange(server, PLAIN)) == [200]


def test_multipart_is_not_parsed(alice: httpx2.Client) -> None:
    """CVE-2026-42561, CVE-2026-53540, CVE-2024-53981, CVE-2024-24762 (python-multipart) and CVE-2024-47874
    (Starlette) are about parsing forms. The parser is not even installed, and a form is no JSON.
    """
    assert find_spec("multipart") is None
    assert find_spec("python_multipart") is None
    part = b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\ntiny-moe\r\n--x--\r\n'
    kinds = [
        "multipart/form-data; boundary=x",
        "multipart/form-data; boundary=" + "x" * 10_000,
        "multipart/form-data",
    ]
    kinds += [
        "application/x-www-form-urlencoded; " + "\\" * 10_000 + "!",
        "application/x-www-form-urlencoded",
    ]
    for kind in kinds:
        with within(2):
            refused(alice.post("/chat/completions", content=part, headers={"Content-Type": kind}))


def test_cve_2025_62727_ranges_are_not_parsed(alice: httpx2.Client) -> None:
    """Starlette merged the ranges of a Range header in quadratic time. No route serves parts of a file."""
    ranges = "bytes=" + ",".join(f"{i}-{i + 1}" for i in range(0, 1000, 2))
    for path in ("/v1/models", "/health/live", "/openapi.json"):
        with within(2):
            answer = alice.get(alice.base_url.join(path), headers={"Range": ranges})
        assert answer.status_code == 200
        assert "content-range" not in answer.headers


def with_headers(*lines: bytes, body: bytes = GOOD) -> bytes:
    return HEAD + b"".join(line + b"\r\n" for line in lines) + b"\r\n" + body


CHUNKED = b"%x\r\n%s\r\n0\r\n\r\n" % (len(GOOD), GOOD)
SECOND = (
    b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"  # without a key: 401 wherever it is taken for a request
)
LENGTH = b"Content-Length: %d" % len(GOOD)
SMUGGLED = {
    "both": with_headers(LENGTH, b"Transfer-Encoding: chunked", body=CHUNKED + SECOND),
    "both, the other way": with_headers(
        b"Transfer-Encoding: chunked", b"Content-Length: 5", body=CHUNKED + SECOND
    ),
    "two lengths": with_headers(LENGTH, b"Content-Length: 5", body=GOOD + SECOND),
    "a list of lengths": with_headers(b"Content-Length: 5, 5", body=GOOD + SECOND),
    "a signed length": with_headers(b"Content-Length: +%d" % len(GOOD), body=GOOD + SECOND),
    "a negative length": with_headers(b"Content-Length: -1", body=GOOD + SECOND),
    "a hexadecimal length": with_headers(b"Content-Length: 0x5", body=GOOD + SECOND),
    "a length beyond all": with_headers(b"Content-Length: " + b"9" * 30, body=GOOD + SECOND),
    "a space in a name": with_headers(b"Content-Length : %d" % len(GOOD), body=GOOD + SECOND),
    "another coding": with_headers(b"Transfer-Encoding: xchunked", LENGTH, body=GOOD + SECOND),
    "chunked is not last": with_headers(b"Transfer-Encoding: chunked, identity", body=CHUNKED + SECOND),
    "no chunk size": with_headers(b"Transfer-Encoding: chunked", body=b"\r\n" + CHUNKED + SECOND),
    "a signed chunk size": with_headers(b"Transfer-Encoding: chunked", body=b"-1\r\n" + GOOD + SECOND),
    "a chunk size beyond all": with_headers(
        b"Transfer-Encoding: chunked", body=b"f" * 20 + b"\r\n" + GOOD + SECOND
    ),
    "a chunk of another length": with_headers(b"Transfer-Encoding: chunked", body=b"5\r\n" + GOOD + SECOND),
    "garbage behind a chunk": with_headers(
        b"Transfer-Encoding: chunked", body=b"%x\r\n%sXX0\r\n\r\n" % (len(GOOD), GOOD) + SECOND
    ),
    "a bare line feed": HEAD.replace(b"\r\n", b"\n") + b"Content-Length: 5\n\n" + GOOD + SECOND,
    "a folded header": with_headers(b"X: a", b" Content-Length: 5", LENGTH, body=GOOD + SECOND),
    "a null byte": with_headers(b"X: a\0b", LENGTH, body=GOOD + SECOND),
    "a carriage return": with_headers(b"X: a\rContent-Length: 5", LENGTH, body=GOOD + SECOND),
}


@pytest.mark.parametrize("name", SMUGGLED)
def test_cve_2025_43859_smuggling(server: ServerProcess, alice: httpx2.Client, name: str) -> None:
    """h11 took chunks that end in anything. Where two servers see a body's end differently, one caller puts
    requests into another's connection: bytes behind an unclear end must never be answered as a request.
    """
    found = statuses(exchange(server, SMUGGLED[name]))
    assert found in ([], [400], [200, 401], [413]), found
    if found == [200, 401]:
        assert name in ("a bare line feed", "a folded header")
    assert statuses(exchange(server, PLAIN)) == [200]


PARTS: list[Any] = [
    {"type": "image_url", "image_url": {"url": "URL/a.png"}},
    {"type": "image_url", "image_url": "URL/a.png"},
    {"type": "input_image", "image_url": "URL/a.png"},
    {"type": "image", "source": {"type": "url", "url": "URL/a.png"}},
    {"type": "input_audio", "input_audio": {"data": "URL/a.wav", "format": "wav"}},
    {"type": "audio_url", "audio_url": {"url": "URL/a.wav"}},
    {"type": "video_url", "video_url": {"url": "URL/a.mp4"}},
    {"type": "file", "file": {"file_id": "URL/a.pdf"}},
    {"type": "input_file", "file_url": "URL/a.pdf"},
    {"type": "document", "source": {"type": "url", "url": "URL/a.pdf"}},
]
TEXTS = [
    "![](URL/a.png)",
    "URL/x",
    '<img src="URL/a.png">',
    "URL\\@URL/x",
    "http://user@URL",
    "file:///etc/passwd",
]


@pytest.fixture(scope="module")
def listener() -> Iterator[tuple[str, list[object]]]:
    """A server on this machine that nobody has any reason to call, and who has called it."""
    calls: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def watch() -> None:
            while True:
                try:
                    connection, peer = listening.accept()
                except OSError:
                    return
                calls.append(peer)
                connection.close()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", calls
        listening.shutdown(socket.SHUT_RDWR)
        thread.join(5)


def test_server_side_requests(alice: httpx2.Client, listener: tuple[str, list[object]]) -> None:
    """CVE-2026-5497, CVE-2026-22773, CVE-2026-24779, CVE-2025-6242 (vLLM), CVE-2026-0599 (TGI, a link in
    plain text), CVE-2026-33626 (LMDeploy): media were fetched from wherever a request said.
    """
    url, calls = listener
    for part in PARTS:
        content = [json.loads(json.dumps(part).replace("URL", url)), {"type": "text", "text": "hello"}]
        for path in ("/chat/completions", "/messages"):
            refused(alice.post(path, json=ask(messages=[{"role": "user", "content": content}])))
        body = {"model": "tiny-moe", "input": [{"role": "user", "content": content}]}
        refused(alice.post("/responses", json=body))
    for text in TEXTS:
        messages = [{"role": "user", "content": text.replace("URL", url)}]
        assert alice.post("/chat/completions", json=ask(messages=messages)).status_code == 200
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": f"{url}/schema.json"}}}
    refused(alice.post("/chat/completions", json=ask(response_format=schema)))
    for name in ("model", "user"):
        alice.post("/chat/completions", json=ask(**{name: url}))
    assert calls == []
