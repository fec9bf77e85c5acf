"""What this machine has for a model: memory, and how fast it is read. Knows no model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from toptwo.runtime.memory import available_memory
from toptwo_kernels.cpu import native

PROBE_BYTES = 512 << 20  # more than caches hold
REPEATS = 5


@dataclass(frozen=True)
class Machine:
    """memory_bytes, vram_bytes: what can be had now; None without a GPU. read_bandwidth is None where nothing
    could measure it, and not of this machine where a person gave it."""

    memory_bytes: int
    vram_bytes: int | None
    threads: int
    read_bandwidth_bytes_per_second: float | None
    bandwidth_is_measured: bool


def look_at_machine(threads: int, bandwidth: float | None) -> Machine:
    """bandwidth: in bytes per second, to be taken as it is instead of measuring."""
    memory = available_memory()
    vram = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None
    measured = None if bandwidth else measure_bandwidth(threads, memory)
    return Machine(memory, vram, threads, bandwidth or measured, bandwidth_is_measured=measured is not None)


def measure_bandwidth(threads: int, memory: int) -> float | None:
    """Bytes per second that the native backend's threads read; the best of a few runs, in under a second.

    The best, because the others are slow only where something else runs as well. memory: bytes that can be
    had. None where the native extension was not built.
    """
    instruction_sets = native.instruction_sets()
    if not instruction_sets:
        return None
    workers = native.require_native().Workers(threads, instruction_sets[-1], False)
    data = native.allocate(min(PROBE_BYTES, memory // 8))
    data.fill_(1)
    return max(float(workers.read_bandwidth(data.data_ptr(), data.nbytes)) for _ in range(REPEATS))
