"""`toptwo serve X.gguf`: which file is meant, and the directory in the cache that stands for it."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gguf_files.loading import assert_same_model
from llama_cpp import Options, write_gguf
from tiny import FAMILIES
from toptwo.default_model import cache
from toptwo.errors import CheckpointError, StartupError
from toptwo.settings import Settings
from toptwo.source import ModelSource, find_model


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("original")
    FAMILIES["mixtral"].write(directory)
    return directory


@pytest.fixture
def file(original: Path, tmp_path: Path) -> Path:
    write_gguf(original, path := tmp_path / "Tiny-Q8.gguf")
    return path


def find(model: Path, told: io.StringIO | None = None, **settings: Any) -> ModelSource:
    place = next(parent for parent in [model, *model.parents] if parent.name.startswith("test_"))
    given = Settings(model=str(model), cache_dir=place / "cache", **settings)
    return find_model(given, Console(file=told or io.StringIO(), width=1000))


def kept(directory: Path) -> list[str]:
    """What is in the cache but for locks."""
    return sorted(path.name for path in (directory / "cache" / "gguf").iterdir() if path.suffix != ".lock")


def test_a_file_becomes_a_directory_in_the_cache(file: Path, original: Path, tmp_path: Path) -> None:
    found = find(file)
    assert found.name == "Tiny-Q8"
    assert found.directory.parent == tmp_path / "cache" / "gguf"
    assert kept(tmp_path) == [found.directory.name]
    assert (found.directory / "model.gguf").readlink() == file
    assert_same_model(original, found.directory)
    assert find(file, served_model_name="org/other").name == "org/other"


def test_it_is_made_once_and_again_when_the_file_changes(file: Path, tmp_path: Path) -> None:
    first = find(file).directory
    made = (first / "config.json").stat().st_mtime_ns
    assert find(file).directory == first
    assert (first / "config.json").stat().st_mtime_ns == made
    (first / "toptwo-packed-int8.bin").write_bytes(b"large")
    os.utime(file, ns=(1, 1))
    second = find(file).directory
    assert second != first
    assert kept(tmp_path) == [second.name]  # the old one, and what was packed in it, is gone
    (second / "tokenizer.json").unlink()
    assert find(file).directory == second
    assert (second / "tokenizer.json").exists()


def test_another_file_has_another_directory(file: Path, tmp_path: Path) -> None:
    shutil.copy(file, other := tmp_path / "other.gguf")
    assert find(file).directory != find(other).directory
    assert len(kept(tmp_path)) == 2


def test_parts_are_one_model_whichever_is_named(original: Path, tmp_path: Path) -> None:
    write_gguf(original, tmp_path / "big.gguf", Options(split_max_tensors=12))
    parts = sorted(tmp_path.glob("big-*.gguf"))
    assert len(parts) == 3
    found = {find(part) for part in parts} | {find(tmp_path)}
    assert [each.name for each in found] == ["big"]
    directory = found.pop().directory
    names = [f"model-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    assert sorted(path.name for path in directory.glob("*.gguf")) == names
    assert_same_model(original, directory)
    parts[1].unlink()
    with pytest.raises(StartupError, match=r"big-00002-of-00003\.gguf: not there; .* is one of 3 parts"):
        find(parts[0])


def test_a_directory_with_one_model_is_that_model(file: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")  # which repositories of GGUF files often hold
    assert find(tmp_path) == find(file)
    shutil.copy(file, tmp_path / "other.gguf")
    with pytest.raises(StartupError, match=r"several models, name one of them: Tiny-Q8\.gguf, other\.gguf"):
        find(tmp_path)


def test_weights_in_safetensors_come_first(file: Path, original: Path, tmp_path: Path) -> None:
    shutil.copytree(original, directory := tmp_path / "both")
    shutil.copy(file, directory)
    assert find(directory) == ModelSource("both", directory)


def test_a_prepared_directory_is_a_model_directory(file: Path) -> None:
    prepared = find(file).directory
    assert find(prepared) == ModelSource(prepared.name, prepared)


def test_a_file_by_any_name_is_read(file: Path, tmp_path: Path) -> None:
    file.rename(blob := tmp_path / "sha256-0123")
    assert find(blob).name == "sha256-0123"


def test_what_is_no_model_is_named_and_leaves_nothing(file: Path, tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"MODEL '.*nothing\.gguf': no such file"):
        find(tmp_path / "nothing.gguf")
    (tmp_path / "text.txt").write_text("hello, I am no model")
    with pytest.raises(CheckpointError, match=r"text\.txt: not a GGUF file"):
        find(tmp_path / "text.txt")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"Tiny-Q8\.gguf: .* it is cut short") as caught:
        find(file)
    assert caught.value.exit_code == 2
    assert kept(tmp_path) == []


def test_a_vocabulary_beyond_the_embedding_is_named(original: Path, tmp_path: Path) -> None:
    tokens = [f"t{i}" for i in range(321)]
    more = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [1] * 321}
    write_gguf(original, tmp_path / "a.gguf", Options(metadata=more))
    with pytest.raises(CheckpointError, match=r"tokens has 321 entries for the 320 rows of the embedding"):
        find(tmp_path / "a.gguf")


def test_a_person_is_told_of_a_guess(original: Path, tmp_path: Path) -> None:
    write_gguf(original, tmp_path / "a.gguf", Options(pre=None))
    find(tmp_path / "a.gguf", told := io.StringIO())
    assert "warning: " in told.getvalue()
    assert "does not say how text is cut before merging (tokenizer.ggml.pre)" in told.getvalue()
    find(tmp_path / "a.gguf", told := io.StringIO())
    assert told.getvalue() == ""


def test_a_cache_that_cannot_be_written_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "publish", fail)
    with pytest.raises(StartupError, match=r"Tiny-Q8\.gguf could not be prepared: the disk of .* is full"):
        find(file)


def test_words_are_what_the_file_says(file: Path) -> None:
    directory = find(file).directory
    assert json.loads((directory / "generation_config.json").read_text())["eos_token_id"] == [0, 2]
    config = json.loads((directory / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert config["chat_template"].startswith("{% for m in messages %}")


def test_an_engine_that_reads_a_file_needs_no_words() -> None:
    program = (
        "import sys\n"
        "for name in ('tokenizers', 'jinja2', 'fastapi'): sys.modules[name] = None\n"
        "import toptwo.runtime.checkpoints.gguf\n"
        "print('imported')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "imported\n", done.stderr
