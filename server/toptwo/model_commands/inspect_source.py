"""What `inspect` looks at: where a model is, and what its files' headers say.

Knows where models may lie and that nothing may be fetched, prepared or written for a look at one. No number
of a weight is read. Must not know what the figures are for.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from toptwo.default_model import cache
from toptwo.default_model.recipe import SMOL_MOE
from toptwo.errors import StartupError
from toptwo.gguf.config import config_of
from toptwo.gguf.files import parts_of, stem_of
from toptwo.gguf.header import read_gguf
from toptwo.models.checkpoint import ModelConfig, WeightSpec
from toptwo.models.registry import parse_config, read_config, read_json
from toptwo.runtime.checkpoints.gguf import GgufCheckpoint
from toptwo.runtime.checkpoints.header import read_header
from toptwo.runtime.checkpoints.open import open_checkpoint
from toptwo.runtime.checkpoints.safetensors_files import INDEX, PICKLES, weight_files
from toptwo.runtime.loader import check_weights
from toptwo.settings import Settings
from toptwo.source import HUB_ID, find_gguf


@dataclass(frozen=True)
class Subject:
    """A model by its name: a checkpoint directory, or the files of a GGUF model, in order."""

    name: str
    directory: Path
    gguf: Sequence[Path] = ()


@dataclass(frozen=True)
class Stored:
    """What is on disk. kind: "safetensors" or "gguf"; None without weight files. quantization: the config's
    quant_method. missing_files: those that an index lists and that are not there. bytes: of the files;
    bytes_by_format: of their tensors, by the names that the files have for number formats."""

    kind: str | None
    quantization: str | None
    files: int
    missing_files: int
    bytes: int
    bytes_by_format: Mapping[str, int]


@dataclass(frozen=True)
class Headers:
    """A model's config, every weight it has, and how it is stored."""

    config: ModelConfig
    specs: Sequence[WeightSpec]
    stored: Stored


def find_subject(settings: Settings) -> Subject:
    """The model as `serve` would find it, without fetching or preparing anything. Raises StartupError."""
    if settings.model is None:
        directory = settings.cache_dir / SMOL_MOE.directory_name
        if not cache.is_complete(directory):
            raise StartupError(f"the default model {SMOL_MOE.name} is not in {directory}; serve prepares it")
        return Subject(SMOL_MOE.name, directory)
    local = Path(os.path.expanduser(settings.model))  # noqa: PTH111  (it never raises)
    if file := find_gguf(local):
        return Subject(stem_of(file), file.parent, parts_of(file.absolute()))
    if local.is_dir():
        return Subject(local.resolve().name, local.resolve())
    if settings.model.endswith(".gguf"):
        raise StartupError(f"MODEL {settings.model!r}: no such file")
    if not HUB_ID.fullmatch(settings.model):
        raise StartupError(f"MODEL {settings.model!r}: no such directory, and not a hub id like org/name")
    return Subject(settings.model, _find_downloaded(settings.model))


def _find_downloaded(hub_id: str) -> Path:
    try:
        import huggingface_hub
    except ImportError:
        raise StartupError(
            f"MODEL {hub_id!r}: no such directory; to find it among downloads from the hub, "
            "install the extra: pip install 'toptwo[hub]'"
        ) from None
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, local_files_only=True))
    except Exception:  # the hub's client raises a zoo of types; with files at hand alone, all mean the same
        raise StartupError(
            f"MODEL {hub_id!r}: no such directory, and not among this machine's downloads from the hub; "
            "inspect downloads nothing"
        ) from None


def read_headers(subject: Subject) -> Headers:
    """Everything that headers say, checked as for serving. Raises CheckpointError."""
    if subject.gguf:
        gguf = read_gguf(subject.gguf)
        architecture, config = parse_config(config_of(gguf), gguf.path)
        specs = architecture.weight_map(config)
        with GgufCheckpoint(gguf.path, subject.gguf, specs) as checkpoint:
            check_weights(checkpoint, specs, architecture.ignored_tensors(config))
        return Headers(config, specs, _describe("gguf", None, subject.gguf))
    directory = subject.directory
    architecture, config = read_config(directory)
    specs, method = architecture.weight_map(config), _quantization(directory)
    if not _has_weights(directory):
        return Headers(config, specs, _describe(None, method, ()))
    if listed := _incomplete(directory):
        return Headers(config, specs, _describe("safetensors", method, listed))
    with open_checkpoint(directory, specs) as checkpoint:
        check_weights(checkpoint, specs, architecture.ignored_tensors(config))
        kind = "gguf" if checkpoint.paths[0].suffix == ".gguf" else "safetensors"
        paths = [path for path in checkpoint.paths if path.suffix == f".{kind}"]
    return Headers(config, specs, _describe(kind, method, paths))


def _quantization(directory: Path) -> str | None:
    section = read_json(directory).get("quantization_config")
    method = section.get("quant_method") if isinstance(section, Mapping) else None
    return method if isinstance(method, str) else None


def _has_weights(directory: Path) -> bool:
    suffixes = {".safetensors", ".gguf", *PICKLES}
    return any(path.suffix in suffixes or path.name == INDEX for path in directory.iterdir())


def _incomplete(directory: Path) -> list[Path]:
    """All files that an index lists, if not all of them are there; else none."""
    if not (directory / INDEX).exists():
        return []
    listed, _ = weight_files(directory)
    return [] if all(path.exists() for path in listed) else listed


def _describe(kind: str | None, quantization: str | None, listed: Sequence[Path]) -> Stored:
    paths = [path for path in listed if path.exists()]
    by_format: Counter[str] = Counter()
    for name, size in _gguf_sizes(paths) if kind == "gguf" else _safetensors_sizes(paths):
        by_format[name] += size
    size = sum(path.stat().st_size for path in paths)
    return Stored(
        kind, quantization, len(paths), len(listed) - len(paths), size, dict(by_format.most_common())
    )


def _gguf_sizes(paths: Sequence[Path]) -> Iterable[tuple[str, int]]:
    return ((tensor.kind.name, tensor.size) for tensor in read_gguf(paths).tensors.values())


def _safetensors_sizes(paths: Sequence[Path]) -> Iterable[tuple[str, int]]:
    for path in paths:
        for tensor in read_header(path).values():
            yield tensor.dtype, tensor.end - tensor.start
