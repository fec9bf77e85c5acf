"""What this machine has to give, within the limits of a container; and giving pages back to it."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from pathlib import Path

from torch import Tensor


def release_pages(mapped: Tensor) -> None:
    """Drop a tensor's pages of a mapped file from this process; they are read again if they are used.

    Only for tensors that are views of a mapped file: other memory would lose its content.
    """
    if sys.platform != "linux":
        return
    start = -(-mapped.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (mapped.data_ptr() + mapped.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:
        libc = ctypes.CDLL(None)
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


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
