"""The servers of `servers.py`, started once for all tests of this folder."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench_command.servers import BadServer, Host, Ours, our_server


@pytest.fixture(scope="session")
def host() -> Iterator[Host]:
    host = Host()
    yield host
    host.close()


@pytest.fixture(scope="session")
def _bad_server(host: Host) -> Iterator[BadServer]:
    bad = BadServer()
    server = host.run(asyncio.start_server(bad.serve, "127.0.0.1", 0))
    bad.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    yield bad
    host.loop.call_soon_threadsafe(server.close)


@pytest.fixture
def bad(_bad_server: BadServer) -> BadServer:
    """A server whose behaviour can be chosen; it remembers nothing of earlier tests."""
    _bad_server.bodies.clear()
    _bad_server.headers.clear()
    return _bad_server


@pytest.fixture(scope="session")
def _ours(host: Host) -> Iterator[Ours]:
    with our_server(host) as ours:
        yield ours


@pytest.fixture
def ours(_ours: Ours) -> Ours:
    """Answers every request with NUM_TOKENS letters; wants KEY."""
    _ours.engine.requests.clear()
    return _ours


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither the environment's keys nor the one of this machine's own server."""
    for name in ("TOPTWO_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TOPTWO_CACHE_DIR", str(tmp_path / "cache"))
