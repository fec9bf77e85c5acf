"""Where a model comes from, and what a person is told when it does not come."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from rich.console import Console

from toptwo import source
from toptwo.errors import StartupError
from toptwo.settings import Settings
from toptwo.source import ModelSource, find_model


def find(**settings: Any) -> ModelSource:
    return find_model(Settings(**settings), Console())


def test_without_a_model_the_default_one_is_prepared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(source, "prepare_default_model", lambda *given: calls.append(given) or tmp_path)
    found = find(cache_dir=tmp_path, default_model_wheel=tmp_path / "w.whl")
    assert found == ModelSource("smol-moe-8x135m", tmp_path)
    assert calls[0][:2] == (tmp_path, tmp_path / "w.whl")


def test_a_directory_is_named_after_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my-moe").mkdir()
    assert find(model=str(tmp_path / "my-moe")) == ModelSource("my-moe", tmp_path / "my-moe")
    monkeypatch.chdir(tmp_path)
    assert find(model="./my-moe") == ModelSource("my-moe", tmp_path / "my-moe")
    assert find(model="my-moe", served_model_name="org/other").name == "org/other"


def test_a_hub_id_is_downloaded_without_anything_executable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {}

    def download(hub_id: str, allow_patterns: list[str]) -> str:
        asked.update(hub_id=hub_id, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find(model="org/some-moe") == ModelSource("org/some-moe", tmp_path)
    assert asked["hub_id"] == "org/some-moe"
    assert not [pattern for pattern in asked["patterns"] if pattern.endswith((".py", ".bin", "*"))]


def test_a_hub_id_without_the_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(StartupError, match=r"pip install 'toptwo\[hub\]'"):
        find(model="org/some-moe")


@pytest.mark.parametrize("model", ["/no/such", "../..x/../y", "a/b/c", "name", "org/na me", "~/nothing-here"])
def test_what_is_neither_is_named(model: str) -> None:
    with pytest.raises(StartupError, match="no such directory, and not a hub id"):
        find(model=model)
