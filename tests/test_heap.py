"""What a process keeps of large blocks that it freed, with small ones between them that stay."""

from __future__ import annotations

import subprocess
import sys

import pytest

HOLES_MB = 50
PROGRAM = f"""
import psutil
from toptwo.heap import {{call}}
{{before}}
resident = psutil.Process().memory_info
first = resident().rss
large = b"x" * (20 << 20)
del large  # from here on, glibc would by itself keep blocks of up to 20 MB
blocks = [(b"x" * (1 << 20), b"y" * 20_000) for _ in range({HOLES_MB})]
blocks = [small for _, small in blocks]
{{after}}
print((resident().rss - first) / (1 << 20))
"""


def kept_mb(call: str, before: str = "", after: str = "") -> float:
    code = PROGRAM.format(call=call, before=before, after=after)
    return float(
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=60).stdout
    )


def test_large_blocks_are_kept_by_itself() -> None:
    assert kept_mb("keep_heap_small") > 0.8 * HOLES_MB  # or the other tests here show nothing


def test_a_small_heap_keeps_none() -> None:
    assert kept_mb("keep_heap_small", before="keep_heap_small()") < 0.1 * HOLES_MB


def test_memory_is_given_back() -> None:
    assert kept_mb("give_memory_back", after="give_memory_back()") < 0.1 * HOLES_MB


@pytest.mark.parametrize("call", ["keep_heap_small", "give_memory_back"])
def test_other_c_libraries_have_no_such_calls(call: str) -> None:
    kept_mb(call, before=f"import ctypes; ctypes.CDLL = lambda name: object()\n{call}()")
