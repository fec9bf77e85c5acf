"""Start, stop, leave and die: the processes as a whole."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path

import httpx2
import openai
import pytest

from server_process import ServerProcess

Start = Callable[..., ServerProcess]


def body(stream: bool, max_tokens: int, text: str = "hello") -> dict[str, object]:
    """A greedy request; the tiny model never ends a greedy answer by itself."""
    messages = [{"role": "user", "content": text}]
    limits = {"max_tokens": max_tokens, "temperature": 0}
    return {"model": "tiny-moe", "messages": messages, "stream": stream, **limits}


def headers(server: ServerProcess) -> dict[str, str]:
    return {"Authorization": f"Bearer {server.key}"}


async def wait_for(condition: Callable[[], bool], timeout: float = 10.0) -> None:
    async with asyncio.timeout(timeout):
        while not condition():
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("moment", ["while queued", "in the prompt", "while decoding"])
async def test_leaving_frees_everything(server: ServerProcess, stream: bool, moment: str) -> None:
    """The engine logs every abort with the number of free blocks: afterwards all must be free."""
    # Long enough that nobody is done within the time, and new to the cache of prefixes.
    long = f"{stream:d} hello world " * 600
    text, patience = (long, 0.15) if moment == "in the prompt" else ("hello", 1.0)
    crowd = 70 if moment == "while queued" else 1  # 64 run at once
    aborts = server.err.count("request aborted")
    async with httpx2.AsyncClient(base_url=server.url, headers=headers(server), timeout=60) as client:
        wanted = body(stream, 8000 if moment != "in the prompt" else 3000, text)
        calls = [client.post("/chat/completions", json=wanted) for _ in range(crowd)]
        leaving = [asyncio.wait_for(call, patience) for call in calls]
        for result in await asyncio.gather(*leaving, return_exceptions=True):
            assert isinstance(result, TimeoutError), result
    await wait_for(lambda: server.err.count("request aborted") == aborts + crowd)
    last = json.loads([line for line in server.err.splitlines() if "request aborted" in line][-1])
    total = int(re.search(r"in ([\d,]+) blocks", server.out)[1].replace(",", ""))  # type: ignore[index]
    assert last["free_blocks"] == total


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains_open_streams(start: Start, number: signal.Signals) -> None:
    server = start().wait_until_ready()
    async with openai.AsyncOpenAI(base_url=server.url, api_key=server.key) as client:

        async def stream() -> int:
            tokens = 0
            wanted = body(True, 300) | {"stream_options": {"include_usage": True}}
            async for chunk in await client.chat.completions.create(**wanted):  # type: ignore[call-overload]
                tokens = chunk.usage.completion_tokens if chunk.usage else tokens
            return tokens

        streams = [asyncio.create_task(stream()) for _ in range(8)]
        await asyncio.sleep(0.5)
        os.killpg(server.process.pid, number)
        assert await asyncio.gather(*streams) == [300] * 8
    assert server.process.wait(10) == 0
    assert "Traceback" not in server.err


@pytest.mark.parametrize("how", ["drain timeout", "second signal"])
async def test_streams_that_must_be_cut_are_told_so(start: Start, how: str) -> None:
    server = start("--drain-timeout", "1" if how == "drain timeout" else "60").wait_until_ready()
    async with httpx2.AsyncClient(base_url=server.url, headers=headers(server), timeout=60) as client:
        stream = asyncio.create_task(client.post("/chat/completions", json=body(True, 8000)))
        whole = asyncio.create_task(client.post("/chat/completions", json=body(False, 8000)))
        await asyncio.sleep(0.5)
        began = time.monotonic()
        os.kill(server.process.pid, signal.SIGINT)
        if how == "second signal":
            await asyncio.sleep(0.3)
            os.kill(server.process.pid, signal.SIGINT)
        answers = await asyncio.gather(stream, whole)
    assert server.process.wait(10) == 0
    assert time.monotonic() - began < 5
    events = [line[6:] for line in answers[0].text.split("\n") if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["error"]["message"] == "the server is shutting down"
    assert answers[1].status_code == 500
    assert answers[1].json()["error"]["message"] == "the server is shutting down"
    assert "Traceback" not in server.err


@pytest.mark.parametrize("seconds", [0.3, 0.6, 0.9, 1.2, 1.8])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_starting_is_no_failure(
    start: Start, tmp_path: Path, seconds: float, number: signal.Signals
) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    server = start(TMPDIR=str(runs))
    time.sleep(seconds)
    status = server.stop(number, timeout=10)
    assert status in (0, 128 + number, -number)  # drained, ended by our handler, or before we had one
    assert "Traceback" not in server.err or status == -number
    assert "toptwo: " not in server.err
    assert list(runs.iterdir()) == []


async def test_engine_death_is_told_to_clients_and_survived(start: Start) -> None:
    server = start().wait_until_ready()
    async with httpx2.AsyncClient(base_url=server.url, headers=headers(server), timeout=60) as client:
        streams = [
            asyncio.create_task(client.post("/chat/completions", json=body(True, 8000))) for _ in range(6)
        ]
        whole = asyncio.create_task(client.post("/chat/completions", json=body(False, 8000)))
        await asyncio.sleep(1.0)
        os.kill(server.engine_pid, signal.SIGKILL)
        began = time.monotonic()
        answers = await asyncio.gather(*streams, whole)
        assert time.monotonic() - began < 2
        assert server.readiness() == 503
        for answer in answers[:-1]:
            events = [line[6:] for line in answer.text.split("\n") if line.startswith("data: ")]
            assert events[-1] == "[DONE]"
            assert json.loads(events[-2])["error"]["type"] == "server_error"
        assert answers[-1].status_code == 500
        assert answers[-1].json()["error"]["type"] == "server_error"
        refused = await client.post("/chat/completions", json=body(False, 1))
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        await wait_for(lambda: server.readiness() == 200, 30)
        assert (await client.post("/chat/completions", json=body(False, 1))).status_code == 200


async def test_a_server_whose_engine_keeps_dying_gives_up(start: Start) -> None:
    server = start().wait_until_ready()
    for _ in range(3):
        await wait_for(lambda: server.readiness() in (200, 0), 30)
        if server.process.poll() is None:
            os.kill(server.engine_pid, signal.SIGKILL)
            await wait_for(lambda: server.readiness() != 200)
    assert server.process.wait(10) == 1
    assert "the engine died 3 times within 60 s; giving up" in server.err


def test_nothing_outlives_a_killed_server(start: Start) -> None:
    server = start().wait_until_ready()
    engine = server.engine_pid
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait()
    deadline = time.monotonic() + 5
    while Path(f"/proc/{engine}").exists():
        assert time.monotonic() < deadline, "the engine outlived its parent"
        time.sleep(0.05)


def test_run_directories_of_killed_servers_are_removed(start: Start, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    first = start(TMPDIR=str(runs)).wait_until_ready()
    (left,) = runs.iterdir()
    assert stat.S_IMODE(left.stat().st_mode) == 0o700
    first.kill()
    second = start(TMPDIR=str(runs)).wait_until_ready()
    (now,) = runs.iterdir()
    assert now != left
    assert second.stop() == 0
    assert list(runs.iterdir()) == []


def test_a_long_temporary_directory_is_no_obstacle(start: Start, tmp_path: Path) -> None:
    runs = tmp_path / ("long" * 30)
    runs.mkdir()
    assert start(TMPDIR=str(runs)).wait_until_ready().stop() == 0


def test_a_model_directory_cannot_bring_modules_along(
    start: Start, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evil = tmp_path / "evil"
    evil.mkdir()
    for path in checkpoint.iterdir():
        (evil / path.name).write_bytes(path.read_bytes())
    for name in ("torch", "zmq", "structlog", "toptwo", "json"):
        (evil / f"{name}.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    monkeypatch.chdir(evil)
    server = start(model=".", PYTHONPATH="").wait_until_ready()
    assert server.stop() == 0
    assert not (tmp_path / "canary").exists()


def test_the_engine_process_sees_no_key(start: Start) -> None:
    server = start("--api-key", "a-good-key", TOPTWO_API_KEY="two words").wait_until_ready()
    for path in ("environ", "cmdline"):
        assert b"two words" not in Path(f"/proc/{server.engine_pid}/{path}").read_bytes()
    assert "two words" not in server.out + server.err


def test_a_key_that_nobody_saw_is_not_kept(start: Start, tmp_path: Path) -> None:
    cache = str(tmp_path / "kept")
    failed = start("--kv-cache-gib", "0.000001", TOPTWO_CACHE_DIR=cache)
    assert failed.process.wait(30) == 1
    assert not (tmp_path / "kept" / "api-key").exists()
    assert start(TOPTWO_CACHE_DIR=cache).wait_until_ready().key


def test_a_misspelt_variable_is_told(start: Start) -> None:
    server = start(TOPTWO_MAX_NUM_SEQ="3").wait_until_ready()
    assert "TOPTWO_MAX_NUM_SEQ" in server.err


def test_a_restart_keeps_what_was_promised(start: Start) -> None:
    server = start("--kv-cache-gib", "0.01").wait_until_ready()
    promised = re.findall(r"(?m)^  (?:memory|limits).*$|^ +=.*$", server.out)
    os.kill(server.engine_pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while server.readiness() != 200 or server.err.count("engine died") != 1:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    answer = httpx2.post(
        f"{server.url}/chat/completions", json=body(False, 9000), headers=headers(server), timeout=30
    )
    assert "maximum context length is 8192 tokens" in answer.json()["error"]["message"]
    assert "context 8,192" in "".join(promised)


def test_the_created_key_is_shown_once_and_kept(start: Start, tmp_path: Path) -> None:
    cache = str(tmp_path / "kept")
    first = start(TOPTWO_CACHE_DIR=cache).wait_until_ready()
    key = first.key
    assert first.stop() == 0
    path = tmp_path / "kept" / "api-key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    second = start(TOPTWO_CACHE_DIR=cache).wait_until_ready()
    assert key not in second.out + second.err + first.err
    answer = httpx2.get(f"{second.url}/models", headers={"Authorization": f"Bearer {key}"})
    assert answer.status_code == 200


def test_configured_keys_replace_the_created_one_and_are_not_shown(start: Start) -> None:
    server = start("--api-key", "one-key", "--api-key", "two-key", TOPTWO_PORT="1").wait_until_ready()
    assert "one-key" not in server.out + server.err
    assert "api_key = (hidden)  from --api-key" in server.out
    for key, status in (("one-key", 200), ("two-key", 200), ("three-key", 401)):
        got = httpx2.get(f"{server.url}/models", headers={"Authorization": f"Bearer {key}"})
        assert got.status_code == status


def test_the_banner_says_where_settings_came_from(start: Start) -> None:
    server = start("--max-num-seqs", "3", TOPTWO_MAX_MODEL_LEN="128").wait_until_ready()
    assert re.search(r"max_num_seqs = 3  from --max-num-seqs", server.out)
    assert re.search(r"max_model_len = 128  from TOPTWO_MAX_MODEL_LEN", server.out)
    assert "context 128, 3 sequences at once" in server.out


def test_a_taken_port_is_told_at_once(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = start("--port", str(port))
        assert server.process.wait(20) == 1
    assert server.err.splitlines() == [
        f"toptwo: cannot listen on 127.0.0.1 port {port}: Address already in use; see --host and --port"
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "http"], "--port: Input should be a valid integer"),
        (["--device", "cuda"], "--device cuda: "),
        (["--device", "cuda", "--backend", "cpu"], "--backend cpu cannot go with --device cuda"),
        (["--tune"], "--tune: only a GPU's kernels have something to choose from"),
        (["--kv-dtype", "fp8"], "--kv-dtype fp8: only a GPU's kernels have it"),
        (["--quantization", "fp8"], "--quantization fp8: only a GPU's kernels have it"),
        (["--quantization", "int3"], "--quantization: Input should be 'auto', 'none', 'int8', 'int4' or"),
        (["--backend", "cuda"], "--backend: Input should be 'auto', 'cpu' or 'reference'"),
        (["--max-model-len", "9000"], "--max-model-len 9000 is over the model's 8192"),
        (["--kv-cache-gib", "0.000001"], "raise --kv-cache-gib"),
        (["--api-key", " "], "--api-key: Value error, a key is empty"),
    ],
)
def test_a_bad_setting_is_one_line_and_status_1(start: Start, arguments: list[str], words: str) -> None:
    server = start(*arguments)
    assert server.process.wait(30) == 1
    (line,) = server.err.splitlines()
    assert line.startswith("toptwo: ")
    assert words in line


@pytest.mark.parametrize("model", ["/no/such/dir", "plainword"])
def test_a_model_that_is_nowhere_is_named(start: Start, model: str) -> None:
    server = start(model=model)
    assert server.process.wait(30) == 1
    assert f"MODEL '{model}': no such directory, and not a hub id" in server.err


def test_a_hub_id_without_a_hub_is_one_line(start: Start) -> None:
    server = start(model="toptwo-tests/no-such-model", HF_HUB_OFFLINE="1")
    assert server.process.wait(60) == 1
    assert "MODEL 'toptwo-tests/no-such-model': the hub does not give it" in server.err
    assert "Traceback" not in server.err


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("model.safetensors", b"not a tensor in sight", "model.safetensors: not a safetensors file"),
        ("config.json", b'{"model_type": "gpt2"}', "config.json: model_type 'gpt2' is not supported"),
    ],
)
def test_a_broken_checkpoint_is_one_line_and_status_2(
    start: Start, tmp_path: Path, checkpoint: Path, name: str, content: bytes, words: str
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in checkpoint.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    (broken / name).write_bytes(content)
    server = start(model=str(broken))
    assert server.process.wait(60) == 2
    reasons = [line for line in server.err.splitlines() if not line.startswith("{")]
    assert len(reasons) == 1
    assert words in reasons[0]
