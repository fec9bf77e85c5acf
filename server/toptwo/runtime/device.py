"""What the machine offers, and the frozen config that `auto` settings resolve to."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from toptwo.errors import StartupError
from toptwo.models.checkpoint import ModelConfig
from toptwo.runtime.kv_cache import BLOCK_SIZE, kv_bytes_per_token
from toptwo.settings import Settings

GIB = 1 << 30
# Share of the memory left after the weights that an automatic KV cache may take.
KV_MEMORY_SHARE = 0.4


@dataclass(frozen=True)
class RuntimeConfig:
    """Every choice made; nothing in it is `auto`. Sizes in tokens unless the name says otherwise."""

    device: str
    dtype: torch.dtype
    quantization: str
    backend: str
    num_threads: int
    max_model_len: int
    max_num_seqs: int
    max_step_tokens: int
    block_size: int
    num_blocks: int
    kv_cache_bytes: int
    prefix_caching: bool


def resolve_dtype(settings: Settings) -> torch.dtype:
    """float32 unless asked otherwise: the CPU's fastest and most exact format in torch."""
    names = {"auto": torch.float32, "float32": torch.float32}
    names |= {"bfloat16": torch.bfloat16, "float16": torch.float16}
    return names[settings.dtype]


def resolve(
    settings: Settings, model: ModelConfig, weight_bytes: int, memory: int | None = None
) -> RuntimeConfig:
    """The config that will run. `memory`: bytes available, by default what the system says.

    Raises StartupError for what cannot fit.
    """
    dtype = resolve_dtype(settings)
    free = (available_memory() if memory is None else memory) - weight_bytes
    if free < 0:
        raise StartupError(
            f"the weights need {weight_bytes / GIB:.1f} GiB as {dtype} and "
            f"{(free + weight_bytes) / GIB:.1f} GiB of memory are available"
        )
    max_len, num_blocks = _plan_memory(settings, model, dtype, free)
    return RuntimeConfig(
        device="cpu",
        dtype=dtype,
        quantization="none",
        backend="reference",
        num_threads=settings.threads or available_cpus(),
        max_model_len=max_len,
        max_num_seqs=settings.max_num_seqs,
        max_step_tokens=settings.max_step_tokens,
        block_size=BLOCK_SIZE,
        num_blocks=num_blocks,
        kv_cache_bytes=num_blocks * BLOCK_SIZE * kv_bytes_per_token(model, dtype),
        prefix_caching=not settings.no_prefix_caching,
    )


def _plan_memory(settings: Settings, model: ModelConfig, dtype: torch.dtype, memory: int) -> tuple[int, int]:
    """(max_model_len, num_blocks): at least one full-length sequence always fits."""
    longest = model.max_position
    wanted = settings.max_model_len or longest
    if wanted > longest:
        raise StartupError(f"--max-model-len {wanted} is over the model's {longest} positions")
    block_bytes = BLOCK_SIZE * kv_bytes_per_token(model, dtype)
    if settings.kv_cache_gib is not None:
        budget = int(settings.kv_cache_gib * GIB)
    else:
        budget = int(memory * KV_MEMORY_SHARE)
    num_blocks = min(budget // block_bytes, settings.max_num_seqs * _blocks(wanted))
    if num_blocks * block_bytes > memory:
        raise StartupError(
            f"--kv-cache-gib {settings.kv_cache_gib:g}: {num_blocks * block_bytes / GIB:.1f} GiB would be "
            f"used and {memory / GIB:.1f} GiB are left beside the weights"
        )
    if num_blocks >= _blocks(wanted):
        return wanted, num_blocks
    if settings.max_model_len is None and num_blocks > 0:
        return num_blocks * BLOCK_SIZE, num_blocks  # a shorter context that fits
    need = _blocks(wanted) * block_bytes / GIB
    raise StartupError(
        f"the KV cache of one sequence of {wanted} tokens needs {need:.2f} GiB and "
        f"{budget / GIB:.2f} GiB are planned for it; raise --kv-cache-gib or lower --max-model-len"
    )


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_SIZE)


def available_cpus() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that can be had without swapping, within this container's limit if there is one.

    root: where /proc and /sys are; another place in tests.
    """
    system = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = root / "proc/meminfo"
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        system = int(fields["MemAvailable"].split()[0]) * 1024
    version_2, version_1 = root / "sys/fs/cgroup", root / "sys/fs/cgroup/memory"
    for limit, used, statistics in (
        (version_2 / "memory.max", version_2 / "memory.current", version_2 / "memory.stat"),
        (
            version_1 / "memory.limit_in_bytes",
            version_1 / "memory.usage_in_bytes",
            version_1 / "memory.stat",
        ),
    ):
        most, now = _read_number(limit), _read_number(used)
        if most is not None and now is not None:
            system = min(system, most - now + _reclaimable(statistics))
    return system


def _reclaimable(statistics: Path) -> int:
    """Bytes of file cache that count as used by the group and are given back on demand."""
    try:
        fields = dict(line.split() for line in statistics.read_text().splitlines())
        return int(fields.get("total_inactive_file", fields.get("inactive_file", 0)))
    except (OSError, ValueError):
        return 0


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such controller, or the word "max"
        return None
