"""Servers for the end-to-end tests: real processes with a tiny model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import tiny
from server_process import ServerProcess


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny-moe"
    tiny.write_chat_mixtral(directory)
    return directory


@pytest.fixture(scope="session")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One server for all tests that leave it as it was."""
    process = ServerProcess(tmp_path_factory.mktemp("server"), [str(checkpoint), "--threads", "1"])
    try:
        yield process.wait_until_ready()
    finally:
        process.kill()


@pytest.fixture
def start(checkpoint: Path, tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    """Start servers of one's own; they are gone after the test."""
    started: list[ServerProcess] = []

    def start_server(*arguments: str, model: str | None = None, **environment: str) -> ServerProcess:
        model_arguments = [str(checkpoint) if model is None else model]
        directory = tmp_path / f"server-{len(started)}"
        process = ServerProcess(directory, [*model_arguments, "--threads", "1", *arguments], environment)
        started.append(process)
        return process

    yield start_server
    for process in started:
        process.kill()
