"""What this GPU can do at most: the figures that GPU benchmarks are read beside.

Run: python kernels/bench/card.py
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

REPEATS = 20
READ_BYTES = 8 << 30  # far more than the second-level cache holds
SIDE = 8192  # of the matrices whose product is timed


@dataclass(frozen=True)
class Card:
    """Medians: bytes per second read, bytes per second copied (read plus written), and bf16 operations per
    second of the library's matrix product on random numbers (a multiply-add is two)."""

    name: str
    versions: str
    read_bandwidth: float
    copy_bandwidth: float
    bf16_peak: float

    def __str__(self) -> str:
        return (
            f"{self.name}, {self.versions}: reads {self.read_bandwidth / 1e12:.2f} TB/s, copies "
            f"{self.copy_bandwidth / 1e12:.2f} TB/s, bf16 products {self.bf16_peak / 1e12:.0f} TFLOP/s "
            f"(medians of {REPEATS})"
        )


def measure_card() -> Card:
    """All limits of the first GPU."""
    import triton

    data = torch.ones(READ_BYTES // 4, device="cuda")
    read = READ_BYTES / median_seconds(lambda: torch.max(data))
    half = data.view(torch.uint8).split(READ_BYTES // 2)
    copied = READ_BYTES / median_seconds(lambda: half[0].copy_(half[1]))
    a, b = (torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = 2 * SIDE**3 / median_seconds(lambda: a @ b)
    versions = f"torch {torch.__version__}, Triton {triton.__version__}"
    return Card(torch.cuda.get_device_name(0), versions, read, copied, product)


def median_seconds(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median duration of `work` on the GPU, after three runs that do not count."""
    for _ in range(3):
        work()
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)
    ]
    for start, end in events:
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


if __name__ == "__main__":
    print(measure_card())
