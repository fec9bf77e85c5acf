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
    text, patience = ("hello world " * 600, 0.15) if moment == "in the prompt" else ("hello", 1.0)
    crowd = 70 if moment == "while queued" else 1  # 64 run at once
    aborts = server.err.count("request aborted")
    async with httpx2.AsyncClient(base_url=server.url, headers=headers(server), timeout=60) as client:
        wanted = body(stream, 8000 if moment != "in the prompt" else 100, text)
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


async def test_after_the_drain_timeout_streams_are_cut(start: Start) -> None:
    server = start("--drain-timeout", "1").wait_until_ready()
    async with httpx2.AsyncClient(base_url=server.url, headers=headers(server), timeout=60) as client:
        call = asyncio.create_task(client.post("/chat/completions", json=body(True, 8000)))
        await asyncio.sleep(0.5)
        began = time.monotonic()
        os.killpg(server.process.pid, signal.SIGTERM)
        server.process.wait(10)
        assert time.monotonic() - began < 6
        await asyncio.gather(call, return_exceptions=True)


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
        (["--device", "cuda"], "--device cuda: this version runs on CPUs only"),
        (["--quantization", "int4"], "--quantization int4"),
        (["--max-model-len", "9000"], "--max-model-len 9000 is over the model's 8192"),
        (["--kv-cache-gib", "0.000001"], "raise --kv-cache-gib"),
        (["--api-key", " "], "--api-key: Value error, a key is empty"),
    ],
)
def test_a_bad_setting_is_one_line_and_status_1(start: Start, arguments: list[str], words: str) -> None:
    server = start(*arguments)
    assert server.process.wait(30) == 1
    lines = [line for line in server.err.splitlines() if line.startswith("toptwo: ")]
    assert words in lines[0]
    assert "Traceback" not in server.err


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


def test_a_broken_checkpoint_is_one_line(start: Start, tmp_path: Path, checkpoint: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in checkpoint.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    (broken / "model.safetensors").write_bytes(b"not a tensor in sight")
    server = start(model=str(broken))
    assert server.process.wait(60) == 1
    assert "model.safetensors: not a readable safetensors file" in server.err
    assert "the engine could not start" in server.err
    assert "Traceback" not in server.err
