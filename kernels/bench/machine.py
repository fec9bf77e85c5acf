"""What this machine can do at most: the figures that every other benchmark is read beside.

Measured by the native backend's own threads where it was built, else by torch.
Run: python kernels/bench/machine.py
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from toptwo_kernels.cpu import native

REPEATS = 7
PROBE_BYTES = 1 << 30  # far more than any cache holds


@dataclass(frozen=True)
class Machine:
    """Medians. Bytes per second read from memory, and operations per second (a multiply-add is two)."""

    num_threads: int
    read_bandwidth: float
    fp32_peak: float
    int8_peak: float

    def __str__(self) -> str:
        return (
            f"machine: {self.num_threads} threads, reads {self.read_bandwidth / 1e9:.1f} GB/s, "
            f"float32 {self.fp32_peak / 1e9:.0f} GFLOP/s, int8 {self.int8_peak / 1e9:.0f} GOP/s "
            f"(medians of {REPEATS})"
        )


def measure_machine(num_threads: int | None = None) -> Machine:
    """All limits of the processors that this process may use."""
    threads = num_threads or len(os.sched_getaffinity(0))
    sets = native.instruction_sets()
    if not sets:
        return _measure_with_torch(threads)
    workers = native.require_native().Workers(threads, sets[-1], False)
    data = native.allocate(PROBE_BYTES)
    data.fill_(1)
    return Machine(
        threads,
        _median(lambda: workers.read_bandwidth(data.data_ptr(), PROBE_BYTES)),
        _median(lambda: workers.peak("fma")),
        _median(lambda: workers.peak("int8")),
    )


def _measure_with_torch(threads: int) -> Machine:
    torch.set_num_threads(threads)
    data = torch.ones(PROBE_BYTES // 4)
    a, b = torch.ones(2048, 2048), torch.ones(2048, 2048)
    product = 2 * 2048**3 / median_seconds(lambda: a @ b)
    return Machine(threads, PROBE_BYTES / median_seconds(data.sum), product, 0.0)


def _median(measure: Callable[[], float]) -> float:
    measure()
    return statistics.median(measure() for _ in range(REPEATS))


def median_seconds(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median duration of `work`, after a run that does not count."""
    work()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def describe_machine() -> str:
    """One line with all limits."""
    return str(measure_machine())


if __name__ == "__main__":
    print(describe_machine())
