"""Kernels as cards get them: the interpreter says nothing of what compilers and assemblers accept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}  # of a program, as in tests/cuda_without_card.py


@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_a_step_of_mixtral_compiles_and_fits(capability: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(TESTS / "cuda_without_card.py"), str(capability)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    kernels = [json.loads(line) for line in ended.stdout.splitlines()]
    assert len({kernel["name"] for kernel in kernels}) > 12
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_BYTES[capability], kernel
    units = {unit for kernel in kernels for unit in kernel["units"]}
    assert units == ({"mma.sync"} if capability < 90 else {"mma.sync", "wgmma.mma_async"})
