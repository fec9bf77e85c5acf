"""From a GGUF file to an answer: a real server, and what `toptwo model export` wrote, read back."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import torch
from gguf import GGMLQuantizationType as Format
from rich.console import Console
from tokenizers import Tokenizer

import tiny
from gguf_files.loading import load, stand_for
from llama_cpp import Options, write_gguf
from server_process import ServerProcess
from toptwo.model_commands.export import export


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("original") / "tiny-moe"
    tiny.write_chat_mixtral(directory)
    return directory


@pytest.fixture(scope="module")
def exported(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "Tiny.gguf"
    export(str(original), path, "bf16", False, Console(file=io.StringIO()))
    return path


def test_an_export_comes_back(original: Path, exported: Path) -> None:
    directory = stand_for(exported)
    (own_config, own), (config, found) = load(original), load(directory)
    assert config == own_config
    assert found.keys() == own.keys()
    for name, weight in own.items():
        exact = weight.dim() == 1 or name.endswith("router")
        assert torch.equal(found[name].float(), weight if exact else weight.bfloat16().float()), name
    theirs, ours = (Tokenizer.from_file(str(place / "tokenizer.json")) for place in (original, directory))
    for text in ("hello world", "naïve 🦙\n\n  x", "<|im_start|>user\nhi<|im_end|>"):
        assert ours.encode(text).ids == theirs.encode(text).ids
    named, own_named = (
        json.loads((place / "tokenizer_config.json").read_text()) for place in (directory, original)
    )
    for key in ("chat_template", "bos_token", "eos_token"):
        assert named[key] == own_named[key]


def test_a_file_can_be_exported_again(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOPTWO_CACHE_DIR", str(tmp_path / "cache"))
    export(str(exported), tmp_path / "again.gguf", "bf16", False, Console(file=io.StringIO()))
    (_, first), (_, again) = load(stand_for(exported)), load(stand_for(tmp_path / "again.gguf"))
    for name, weight in first.items():
        assert torch.equal(again[name], weight), name


@pytest.fixture
def server(original: Path, exported: Path, tmp_path: Path) -> Iterator[ServerProcess]:
    process = ServerProcess(tmp_path / "server", [str(exported), "--backend", "reference", "--threads", "1"])
    try:
        yield process.wait_until_ready()
    finally:
        process.kill()


def test_a_file_is_served(server: ServerProcess, original: Path, exported: Path) -> None:
    client = openai.OpenAI(base_url=server.url, api_key=server.key)
    assert [model.id for model in client.models.list()] == ["Tiny"]
    answer = client.chat.completions.create(
        model="Tiny", messages=[{"role": "user", "content": "hello"}], max_tokens=8, temperature=0
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    directory = next((server.directory / "cache" / "gguf").glob("*/model.gguf")).parent
    assert directory.joinpath("model.gguf").resolve() == exported


def test_a_damaged_file_ends_the_start_with_status_2(original: Path, tmp_path: Path) -> None:
    write_gguf(original, path := tmp_path / "bad.gguf", Options(kind=lambda *_: Format.Q8_0))
    path.write_bytes(path.read_bytes()[:-100])
    process = ServerProcess(tmp_path / "server", [str(path), "--backend", "reference"])
    try:
        assert process.process.wait(60) == 2
        (line,) = process.err.splitlines()
        assert "bad.gguf: " in line
        assert line.endswith("it is cut short")
    finally:
        process.kill()
