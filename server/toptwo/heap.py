"""What glibc keeps of the memory that a process frees, and how to have it give that back.

Other C libraries have none of these calls, and keep less by themselves.
"""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # malloc.h
LARGE_BYTES = 128 * 1024  # glibc's own first value
MOST_ARENAS = 2


def keep_heap_small() -> None:
    """Let large blocks go back to the system as soon as they are freed, for as long as the process lives.

    glibc lets the size from which it does so grow to 32 MB with the blocks that it sees freed; bodies and
    texts below that then come to lie among small objects that stay, and the holes that they leave are kept.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is None:
        return
    set_option(M_MMAP_THRESHOLD, LARGE_BYTES)
    set_option(M_TRIM_THRESHOLD, LARGE_BYTES)
    set_option(M_ARENA_MAX, MOST_ARENAS)


def give_memory_back() -> None:
    """Return to the system what was freed. glibc keeps it, by the hundred megabytes, for the thread that
    once needed it, and offers no limit to set that holds for threads that are there."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
