"""Connections within bounds: slow, large, wrong, early and many, all told by raw bytes on a real socket."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
from collections.abc import AsyncIterator

import pytest
from fastapi import FastAPI

import loopback
from fakes import KEY, FakeEngine, Script, chat
from loopback import Loopback, get, head, post
from toptwo.api import connection
from toptwo.launch import bound_clients

LIVE = get("/health/live")
POST = f"POST {loopback.CHAT} HTTP/1.1"
WITH_KEY = [POST, "host: test", f"authorization: Bearer {KEY}"]
CHUNKED = head([*WITH_KEY, "transfer-encoding: chunked"])


@pytest.fixture
async def site(app: FastAPI) -> AsyncIterator[Loopback]:
    async with loopback.served(app) as served:
        yield served
        async with asyncio.timeout(5):
            while served.num_connections:  # whoever opened them has closed them, or the server has
                await asyncio.sleep(0.01)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds of time that a test can wait for."""
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(connection, "REST_SECONDS", 0.3)


async def answer(site: Loopback, *pieces: bytes) -> bytes:
    """What the server says until it closes, to pieces sent one after the other."""
    peer = await site.connect()
    for piece in pieces:
        peer.writer.write(piece)
        await asyncio.sleep(0.01)
    response = await peer.rest()
    peer.leave()
    return response


def error_of(response: bytes) -> tuple[int, dict[str, object]]:
    """Status and error of the one response that there is."""
    start, _, body = response.partition(b"\r\n\r\n")
    assert start.startswith(b"HTTP/1.1 ")
    assert b"connection: close" in start
    assert response.count(b"HTTP/1.1 ") == 1
    return int(start.split()[1]), json.loads(body)["error"]


@pytest.mark.parametrize(
    "pieces",
    [
        [b"GET /health/live HTTP/1.1\r\nx: " + b"a" * 40_000 + b"\r\n\r\n"],
        [b"GET /health/live HTTP/1.1\r\nx: " + b"a" * 40_000],
        [b"GET /health/live HTTP/1.1\r\n", *(b"x: " + b"a" * 10_000 for _ in range(5))],
        [b"GET /health/live HTTP/1.1\r\n" + b"x: y\r\n" * 6_000 + b"\r\n"],
        [b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\n\r\n"],
        [b"GET /" + b"a" * 20_000, b"a" * 20_000],
        [b"\r\n" * 20_000],
        [CHUNKED, b"1;" + b"x" * 40_000],
        [CHUNKED, *(b"1;" + b"x" * 3_000 + b"\r\n{\r\n" for _ in range(20))],
        [CHUNKED, b"1\r\n{\r\n0\r\n", *(b"x: " + b"a" * 10_000 for _ in range(5))],
        [CHUNKED, b"1\r\n{\r\n0\r\n" + b"x: y\r\n" * 10_000],
    ],
    ids=lambda pieces: pieces[-1][:12].decode(),
)
async def test_what_is_not_the_body_is_bounded(
    site: Loopback, engine: FakeEngine, pieces: list[bytes]
) -> None:
    status, error = error_of(await answer(site, *pieces))
    assert status == 431
    assert error["type"] == "invalid_request_error"
    assert engine.requests == []


async def test_heads_and_chunks_of_clients_that_mean_no_harm_are_within_the_bounds(site: Loopback) -> None:
    peer = await site.connect()
    await peer.send(b"GET /health/live HTTP/1.1\r\nhost: test\r\ncookie: " + b"a" * 30_000 + b"\r\n\r\n")
    assert b"200 OK" in await peer.until(b'{"status":"live"}')
    body = json.dumps(chat(user="u" * 20_000)).encode()
    await peer.send(CHUNKED + b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n")
    assert b"200 OK" in await peer.until(b'"finish_reason"')
    peer.leave()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("begun", [b"", b"POST", b"GET /health/live HTTP/1.1\r\nhost: te"])
async def test_a_head_that_does_not_come_ends_the_connection(site: Loopback, begun: bytes) -> None:
    peer = await site.connect()
    await peer.send(begun)
    assert await peer.rest(2) == b""


@pytest.mark.usefixtures("quick")
async def test_a_head_that_comes_in_drops_has_no_more_time(site: Loopback) -> None:
    peer = await site.connect()
    await peer.send(LIVE)  # the second head is bounded like the first
    await peer.until(b'{"status":"live"}')
    closed = asyncio.create_task(peer.rest(2))
    began = asyncio.get_running_loop().time()
    while not closed.done():
        peer.writer.write(b"G" if peer.reader.at_eof() else b"\r\n")
        await asyncio.sleep(0.05)
    assert asyncio.get_running_loop().time() - began < 1


@pytest.mark.usefixtures("quick")
async def test_the_rest_of_a_body_that_was_answered_ends_soon(site: Loopback) -> None:
    """Without a key nobody reads it; by drops it could come for ever."""
    peer = await site.connect()
    await peer.send(head([POST, "host: test", "content-length: 1000000"]))
    assert b"401" in await peer.until(b"\r\n\r\n")
    closed = asyncio.create_task(peer.rest(2))
    while not closed.done():
        peer.writer.write(b"{")
        await asyncio.sleep(0.05)


async def test_a_body_that_is_answered_early_and_ends_soon_keeps_the_connection(site: Loopback) -> None:
    peer = await site.connect()
    await peer.send(head([POST, "host: test", "content-length: 6"]) + b"{")
    assert b"401" in await peer.until(b'"code":null}}')
    await peer.send(b'"a":1' + LIVE)
    assert b"200 OK" in await peer.until(b'{"status":"live"}')
    peer.leave()


BOTH = head([*WITH_KEY, "content-length: 4", "transfer-encoding: chunked"])


@pytest.mark.parametrize(
    "request_bytes",
    [
        BOTH + b"1\r\n{\r\n0\r\n\r\n" + LIVE,
        head([*WITH_KEY, "transfer-encoding: chunked", "content-length: 4"]) + b"0\r\n\r\n" + LIVE,
        head([*WITH_KEY, "content-length: 4", "content-length: 5"]) + b"{   " + LIVE,
        head([*WITH_KEY, "content-length: 4, 5"]) + b"{   " + LIVE,
        head([*WITH_KEY, "content-length: -1"]) + LIVE,
        head([*WITH_KEY, "content-length: +4"]) + b"{   " + LIVE,
        head([*WITH_KEY, "content-length: 0x4"]) + b"{   " + LIVE,
        head([*WITH_KEY, "content-length: 99999999999999999999"]) + LIVE,
        head([*WITH_KEY, "transfer-encoding: xchunked"]) + b"0\r\n\r\n" + LIVE,
        head([*WITH_KEY, "transfer-encoding: chunked, identity"]) + b"0\r\n\r\n" + LIVE,
        head([*WITH_KEY, "transfer-encoding : chunked"]) + b"0\r\n\r\n" + LIVE,
        head([*WITH_KEY, "x: a\r\n folded"]) + LIVE,
        head([*WITH_KEY, "x: a\nb: c"]) + LIVE,
        head([*WITH_KEY, "x: a\0b"]) + LIVE,
        head([*WITH_KEY, "no colon"]) + LIVE,
        CHUNKED + b"zz\r\n{\r\n0\r\n\r\n" + LIVE,
        CHUNKED + b"1\r\n{}\r\n0\r\n\r\n" + LIVE,
        CHUNKED + b"-1\r\n{\r\n0\r\n\r\n" + LIVE,
        CHUNKED + b"fffffffffffffffff\r\n{" + LIVE,
        b"GET /health/live HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x00" * 100,
    ],
)
async def test_what_two_parsers_could_read_differently_is_refused(
    site: Loopback, engine: FakeEngine, request_bytes: bytes
) -> None:
    """And what comes behind it is not taken for a request."""
    status, error = error_of(await answer(site, request_bytes))
    assert status == 400
    assert error["type"] == "invalid_request_error"
    assert engine.requests == []


async def test_a_trailer_is_no_header(site: Loopback, engine: FakeEngine) -> None:
    peer = await site.connect()
    request = head([POST, "host: test", "transfer-encoding: chunked"])
    await peer.send(request + b"2\r\n{}\r\n0\r\nauthorization: Bearer " + KEY.encode() + b"\r\n\r\n")
    assert b"401" in await peer.until(b"\r\n\r\n")
    peer.leave()


async def test_a_request_behind_another_is_dropped_and_the_connection_closed(
    site: Loopback, engine: FakeEngine
) -> None:
    response = await answer(site, post(chat()) * 3)
    assert response.count(b"HTTP/1.1 200 OK") == 1
    assert len(engine.requests) == 1
    peer = await site.connect()
    for _ in range(3):  # one after the other is what most clients do
        await peer.send(post(chat()))
        await peer.until(b'"finish_reason"')
        await peer.until(b"}}")
    assert len(engine.requests) == 4
    peer.leave()


@pytest.mark.parametrize("stream", [True, False])
async def test_the_end_of_a_client_that_sent_too_much_is_noticed(
    site: Loopback, engine: FakeEngine, stream: bool
) -> None:
    engine.script = Script(hang_after=0)
    peer = await site.connect()
    await peer.send(post(chat(stream=stream)))
    await asyncio.wait_for(engine.started.wait(), 5)
    await peer.send(post(chat()) * 1000)
    peer.writer.close()
    await asyncio.wait_for(engine.closed.wait(), 5)


@pytest.mark.parametrize("stream", [True, False])
async def test_half_closing_is_leaving(site: Loopback, engine: FakeEngine, stream: bool) -> None:
    engine.script = Script(hang_after=0)
    peer = await site.connect()
    await peer.send(post(chat(stream=stream)))
    await asyncio.wait_for(engine.started.wait(), 5)
    peer.writer.write_eof()
    await asyncio.wait_for(engine.closed.wait(), 5)
    assert engine.aborted == [engine.requests[0].request_id]
    peer.leave()


async def test_rubbish_in_the_middle_of_an_answer_does_not_get_into_it(
    site: Loopback, engine: FakeEngine
) -> None:
    engine.script = Script(hang_after=1, token_ids=[65] * 2)
    peer = await site.connect()
    await peer.send(post(chat(stream=True)))
    began = await peer.until(b"\r\n\r\n")
    await peer.send(b"\x00rubbish")
    peer.writer.write_eof()
    assert b"HTTP/1.1" not in (began + await peer.rest()).removeprefix(b"HTTP/1.1 200 OK")
    await asyncio.wait_for(engine.closed.wait(), 5)


async def test_a_broken_body_ends_its_request(site: Loopback, engine: FakeEngine) -> None:
    status, _ = error_of(await answer(site, CHUNKED, b"1\r\n{\r\n", b"rubbish\r\n"))
    assert status == 400
    assert engine.requests == []


async def test_connections_end_where_files_would(site: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (connection.SPARE_FILES + 2, 1 << 20))
    monkeypatch.setattr(connection, "REST_SECONDS", 0.3)
    first, second, third = [await site.connect() for _ in range(3)]
    status, error = error_of(await third.rest())
    assert (status, error["code"]) == (503, "overloaded")
    for peer in (first, second):
        await peer.send(LIVE)
        assert b"200 OK" in await peer.until(b'{"status":"live"}')
        peer.leave()


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_stops_reading_is_given_up(
    app: FastAPI, engine: FakeEngine, stream: bool
) -> None:
    """After the send timeout; a stream's tokens are no longer computed then."""
    engine.script = Script(token_ids=[65] * 100_000, pause=0.001) if stream else Script(token_ids=[65] * 500)
    async with loopback.served(app, send_timeout=1) as site:
        peer = await site.connect(receive_buffer=4096)
        peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await peer.send(post(chat(stream=stream, logprobs=True, top_logprobs=20)))
        await asyncio.wait_for(engine.closed.wait(), 10)
        assert len(engine.aborted) == stream
        assert engine.num_tokens < 5000
        async with asyncio.timeout(10):
            while site.num_connections:
                await asyncio.sleep(0.01)


def test_clients_whose_machines_vanish_are_found_out() -> None:
    with socket.socket() as listener:
        bound_clients(listener, 7)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with socket.create_connection(listener.getsockname()), listener.accept()[0] as accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 7000
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) <= 256 * 1024
