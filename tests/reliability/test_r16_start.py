"""R16: a server that cannot start says why in one line, at once, and never says that it is ready."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest

from reliability.figures import record
from reliability.live import FAULT_SWITCH, checkpoint
from server_process import ServerProcess
from toptwo.engine.watchdog import WATCHFUL

# Of processor time: what a person waits for on a machine that is not busy otherwise. What is wrong with
# weights is found by the engine process, which imports torch first: 3 to 4 s more.
EARLY_SECONDS, ENGINE_SECONDS = 5.0, 9.0

Spoil = Callable[[Path], object]


def rewrite_config(**fields: object) -> Spoil:
    def spoil(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | fields))

    return spoil


def cut_weights(model: Path) -> None:
    os.truncate(model / "model.safetensors", 1000)


def loop(name: str) -> Spoil:
    """A file that is there and cannot be opened, not even by root."""

    def spoil(model: Path) -> None:
        (model / name).unlink()
        (model / name).symlink_to(name)

    return spoil


# What is done to the model's directory, the exit status, and what the line must name.
MODELS: dict[str, tuple[Spoil, int, str]] = {
    "weights are missing": (lambda m: (m / "model.safetensors").unlink(), 2, "safetensors"),
    "weights are cut off": (cut_weights, 2, "model.safetensors"),
    "weights cannot be read": (loop("model.safetensors"), 2, "model.safetensors"),
    "config is missing": (lambda m: (m / "config.json").unlink(), 2, "config.json"),
    "config is no JSON": (lambda m: (m / "config.json").write_text("{"), 2, "config.json"),
    "config cannot be read": (loop("config.json"), 2, "config.json"),
    "config asks for other weights": (rewrite_config(hidden_size=128), 2, "model.embed_tokens.weight"),
    "tokenizer is missing": (lambda m: (m / "tokenizer.json").unlink(), 2, "tokenizer.json"),
    "tokenizer is damaged": (lambda m: (m / "tokenizer.json").write_text("{}"), 2, "tokenizer.json"),
    "template is wrong": (lambda m: (m / "chat_template.jinja").write_text("{% for %}"), 2, "template"),
    "model is too big": (rewrite_config(num_hidden_layers=3_000, hidden_size=65536), 1, "memory"),
}


class Start:
    """A start that is expected to fail, and somebody who asks all the time whether it is ready."""

    def __init__(self, arguments: list[str], prefix: tuple[str, ...]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        command = [*prefix, sys.executable, "-P", "-m", "toptwo", "serve"]
        command += ["--port", str(self.port), *arguments]
        clean = {name: value for name, value in os.environ.items() if not name.startswith("TOPTWO_")}
        self.num_ready = 0
        self._over = threading.Event()
        asking = threading.Thread(target=self._ask)
        asking.start()
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=clean)
        try:
            self.out, self.err = process.communicate(timeout=60)
        finally:
            process.kill()
            process.wait()
            self._over.set()
            asking.join()
        self.status = process.returncode

    def _ask(self) -> None:
        while not self._over.wait(0.05):
            with contextlib.suppress(httpx2.TransportError):
                answer = httpx2.get(f"http://127.0.0.1:{self.port}/health/ready", timeout=1)
                self.num_ready += answer.status_code == 200


def processor_seconds() -> float:
    """Of all processes that this one has waited for, and those that they have."""
    times = os.times()
    return times.children_user + times.children_system


def check_refused(
    what: str,
    wanted: tuple[int, str],
    arguments: list[str],
    *,
    by_engine: bool = False,
    full: Path | None = None,
) -> None:
    """wanted: the exit status, and what the line must name. full: a directory that is to be a full disk."""
    status, words = wanted
    before = processor_seconds()
    start = Start(arguments, on_full_disk(full) if full else ())
    seconds = processor_seconds() - before
    lines = [line for line in start.err.splitlines() if not line.startswith(("{", "dd: "))]
    assert len(lines) == 1, start.err
    assert lines[0].startswith("toptwo: ")
    assert words in lines[0]
    assert "Traceback" not in start.err
    assert start.status == status
    assert start.num_ready == 0
    assert "Try it" not in start.out
    assert seconds <= (ENGINE_SECONDS if by_engine else EARLY_SECONDS)
    record("R16", what, 1, 0, f"status {status} after {seconds:.1f} s of processor time")


@pytest.mark.parametrize("what", MODELS)
def test_a_model_that_cannot_be_served(what: str, tmp_path: Path) -> None:
    spoil, status, words = MODELS[what]
    model = tmp_path / "model"
    shutil.copytree(checkpoint(), model, ignore=shutil.ignore_patterns("toptwo-packed-*"))
    spoil(model)
    by_engine = not what.startswith(("tokenizer", "template", "config is no"))
    arguments = [str(model), "--cache-dir", str(tmp_path / "cache")]
    check_refused(what, (status, words), arguments, by_engine=by_engine)


def test_a_taken_port(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        arguments = [str(checkpoint()), "--cache-dir", str(tmp_path), "--port", port]
        check_refused("port is taken", (1, f"port {port}: Address already in use"), arguments)


@pytest.mark.parametrize("where", ["below a file", "in /proc"])
def test_a_cache_that_cannot_be_written(where: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = str(tmp_path / "file" / "cache") if where == "below a file" else "/proc/cache"
    check_refused(f"cache is {where}", (1, cache), [str(checkpoint()), "--cache-dir", cache])


def test_a_full_disk(tmp_path: Path) -> None:
    full = tmp_path / "full"
    arguments = [str(checkpoint()), "--cache-dir", str(full)]
    check_refused("disk is full", (1, str(full)), arguments, full=full)


@pytest.mark.timeout(300)
def test_an_engine_that_hangs_while_it_loads(tmp_path: Path) -> None:
    switched = {"PYTHONPATH": str(FAULT_SWITCH), "FAULTS": "stall@3"}
    began = time.monotonic()
    server = ServerProcess(tmp_path, [str(checkpoint())], switched)
    try:
        status = server.process.wait(240)
    finally:
        server.kill()
    seconds = time.monotonic() - began
    said = f"has neither answered nor computed for {WATCHFUL.load_still_seconds:g} s while it loaded"
    assert server.err.splitlines()[-1] == f"toptwo: the engine was killed: it {said}"
    assert status == 1
    assert "Try it" not in server.out
    assert seconds < WATCHFUL.load_still_seconds + 60
    record("R16", "engine hangs at its third weight", 1, 0, f"status {status} after {seconds:.0f} s")


FILL = 'mount -t tmpfs -o size=4k none "$0" && dd if=/dev/zero of="$0/all" bs=4k status=none; exec "$@"'


def on_full_disk(directory: Path) -> tuple[str, ...]:
    """A command's beginning that lets it see a full disk at `directory`; nobody else does."""
    directory.mkdir()
    return ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", FILL, str(directory))
