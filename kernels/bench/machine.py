"""What this machine can do at most: the figures that every other benchmark is read beside.

Run: python kernels/bench/machine.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

REPEATS = 7


def measure_read_bandwidth() -> float:
    """Bytes per second that all threads together read from memory: the sum of 1 GiB of float32."""
    data = torch.ones(1 << 28)
    return data.nbytes / _median_seconds(data.sum)


def measure_fp32_peak() -> float:
    """Floating-point operations per second of torch's float32 matrix product, 2048 cubed."""
    a, b = torch.ones(2048, 2048), torch.ones(2048, 2048)
    return 2 * 2048**3 / _median_seconds(lambda: a @ b)


def _median_seconds(work: Callable[[], object]) -> float:
    work()
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def describe_machine() -> str:
    """One line with both limits."""
    return (
        f"machine: {torch.get_num_threads()} threads, reads {measure_read_bandwidth() / 1e9:.1f} GB/s, "
        f"float32 product {measure_fp32_peak() / 1e9:.0f} GFLOP/s (medians of {REPEATS})"
    )


if __name__ == "__main__":
    print(describe_machine())
