"""The client's retries, with a server in between that refuses first and then passes on."""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Iterator
from typing import ClassVar

import httpx2
import openai
import pytest
from strict import ask

ENVELOPE = b'{"error":{"message":"Not now.","type":"server_error","param":null,"code":"overloaded"}}'


class Gate(http.server.BaseHTTPRequestHandler):
    """Answers with the refusals, one per request, then forwards to the real server."""

    protocol_version = "HTTP/1.1"
    target: ClassVar[str]
    refusals: ClassVar[list[tuple[int, dict[str, str]]]]
    counts: ClassVar[list[str | None]]

    def do_POST(self) -> None:
        self.counts.append(self.headers["x-stainless-retry-count"])
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.refusals:
            status, headers = self.refusals.pop(0)
            self._answer(status, {"content-type": "application/json", **headers}, ENVELOPE)
            return
        passed = {name: self.headers[name] for name in ("authorization", "content-type")}
        answer = httpx2.post(self.target + self.path, content=body, headers=passed, timeout=60)
        self._answer(answer.status_code, {"content-type": answer.headers["content-type"]}, answer.content)

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in {**headers, "content-length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def gate(url: str) -> Iterator[tuple[str, type[Gate]]]:
    """Address of the gate, and its handler to be told what to refuse."""
    handler = type("ThisGate", (Gate,), {"target": url, "refusals": [], "counts": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", handler
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("stream", [False, True])
def test_refusals_are_waited_out(gate: tuple[str, type[Gate]], key: str, model: str, stream: bool) -> None:
    address, handler = gate
    handler.refusals += [(429, {"retry-after-ms": "20"}), (503, {"retry-after-ms": "30"})]
    began = time.monotonic()
    with openai.OpenAI(base_url=address, api_key=key, max_retries=2) as client:
        if stream:
            chunks = list(
                client.chat.completions.create(model=model, messages=ask("hi"), max_tokens=3, stream=True)
            )
            assert chunks[-1].choices[0].finish_reason == "length"
        else:
            assert client.chat.completions.create(model=model, messages=ask("hi"), max_tokens=3).choices
    assert handler.counts == ["0", "1", "2"]
    assert 0.05 <= time.monotonic() - began < 5


async def test_the_async_client_waits_too(gate: tuple[str, type[Gate]], key: str, model: str) -> None:
    address, handler = gate
    handler.refusals += [(503, {"retry-after-ms": "10"})]
    async with openai.AsyncOpenAI(base_url=address, api_key=key, max_retries=1) as client:
        answer = await client.chat.completions.create(model=model, messages=ask("hi"), max_tokens=3)
    assert answer.choices
    assert handler.counts == ["0", "1"]


def test_a_refusal_for_good_is_not_tried_again(gate: tuple[str, type[Gate]], key: str, model: str) -> None:
    address, handler = gate
    handler.refusals += [(429, {"x-should-retry": "false"})]
    with (
        openai.OpenAI(base_url=address, api_key=key, max_retries=2) as client,
        pytest.raises(openai.RateLimitError, match=r"Not now\."),
    ):
        client.chat.completions.create(model=model, messages=ask("hi"), max_tokens=3)
    assert handler.counts == ["0"]


def test_mistakes_of_ours_are_not_tried_again(gate: tuple[str, type[Gate]], key: str, model: str) -> None:
    address, handler = gate
    with (
        openai.OpenAI(base_url=address, api_key=key, max_retries=2) as client,
        pytest.raises(openai.BadRequestError),
    ):
        client.chat.completions.create(model=model, messages=[], max_tokens=3)
    assert handler.counts == ["0"]
