"""A model's weights in the backend's layout: packed from the checkpoint once, then mapped from disk."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from toptwo.models.checkpoint import ModelConfig, Weights, WeightSpec
from toptwo.runtime.checkpoints.open import open_checkpoint
from toptwo.runtime.checkpoints.protocol import Checkpoint
from toptwo.runtime.device import RuntimeConfig
from toptwo.runtime.formats import format_of
from toptwo.runtime.loader import load_weights
from toptwo.runtime.packed_file import PackedWriter, read_packed
from toptwo_kernels import cpu
from toptwo_kernels.ops import Matrix, Ops

Progress = Callable[[int, int], None]

_SUMMED_AT_ONCE = 1 << 26  # bytes; each needs sixteen while it is summed up


@dataclass(frozen=True)
class WeightSource:
    """A checkpoint, what of it is wanted, and where packed weights may go if not beside it."""

    directory: Path
    model: ModelConfig
    specs: Sequence[WeightSpec]
    ignored: Sequence[str]
    cache_dir: Path


def prepare_weights(
    source: WeightSource, config: RuntimeConfig, ops: Ops, on_progress: Progress
) -> tuple[Weights, str]:
    """Every weight of the model, and a name for their content. on_progress is told how many of how many
    are ready.

    Raises CheckpointError for a checkpoint that is not what it should be.
    """
    with open_checkpoint(source.directory, source.specs) as checkpoint:
        if config.backend != "cpu" or config.quantization == "none":
            weights = _pack(checkpoint, source, config, ops, on_progress)
            return weights, _identify(_checksums(weights))
        fingerprint = _fingerprint(checkpoint, source, config.quantization)
        path = _packed_path(source, config.quantization)
        packed = read_packed(path, fingerprint)
        if packed:
            on_progress(len(source.specs), len(source.specs))
            return Weights(packed.matrices, packed.vectors), _identify(packed.checksums)
        with PackedWriter(path, fingerprint) as writer:
            weights = _pack(checkpoint, source, config, ops, on_progress, writer)
            writer.finish()
        return weights, _identify(_checksums(weights))


def _pack(
    checkpoint: Checkpoint,
    source: WeightSource,
    config: RuntimeConfig,
    ops: Ops,
    on_progress: Progress,
    writer: PackedWriter | None = None,
) -> Weights:
    matrices: dict[str, Matrix] = {}
    vectors: dict[str, Tensor] = {}

    def keep(spec: WeightSpec, tensor: Tensor) -> None:
        weight: Matrix | Tensor
        if spec.role == "vector":
            weight = vectors[spec.name] = tensor.float().to(config.torch_device)
        else:
            weight_format = format_of(spec.role, config.quantization, config.dtype)
            weight = matrices[spec.name] = ops.pack(tensor, weight_format, paired=spec.role == "paired")
        if writer:
            writer.add(spec.name, weight)
        on_progress(len(matrices) + len(vectors), len(source.specs))

    load_weights(checkpoint, source.specs, source.ignored, keep)
    return Weights(matrices, vectors)


def _identify(checksums: Mapping[str, int]) -> str:
    """A name for the content of all weights, whichever file it came from."""
    return hashlib.sha256(repr(sorted(checksums.items())).encode()).hexdigest()[:16]


def _checksums(weights: Weights) -> dict[str, int]:
    """Of every weight's bytes, as the backend holds them."""
    tensors = {name: matrix.data for name, matrix in weights.matrices.items()} | dict(weights.vectors)
    return {name: _checksum(tensor.contiguous()) for name, tensor in tensors.items()}


def _checksum(tensor: Tensor) -> int:
    if tensor.is_cuda:
        return _sum_on_device(tensor)
    if cpu.instruction_sets():
        return cpu.checksum(tensor)
    return zlib.crc32(tensor.flatten().view(torch.uint8).numpy().data)


def _sum_on_device(tensor: Tensor) -> int:
    """Every byte times an odd number that its place decides, modulo 2^64: as fast as the card reads."""
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    parts = torch.split(tensor.flatten().view(torch.uint8), _SUMMED_AT_ONCE)
    for index, part in enumerate(parts):
        places = torch.arange(len(part), device=tensor.device)
        total += (part * (2 * places + 1)).sum() * (2 * index + 1)
    return int(total)


def _packed_path(source: WeightSource, quantization: str) -> Path:
    """Beside the checkpoint, or in the cache directory where that may not be written."""
    name = f"toptwo-packed-{quantization}.bin"
    if os.access(source.directory, os.W_OK):
        return source.directory / name
    digest = hashlib.sha256(os.fsencode(source.directory.resolve())).hexdigest()[:16]
    return source.cache_dir / "packed" / digest / name


def _fingerprint(checkpoint: Checkpoint, source: WeightSource, quantization: str) -> str:
    """Changes when a weight file or what is made of it does, which the model's config may decide."""
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in checkpoint.paths]
    return hashlib.sha256(repr((stats, source.model, source.specs, quantization)).encode()).hexdigest()
