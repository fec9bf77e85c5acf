"""Which instruction set to compute with: the best that this processor has and that computes rightly.

Kernels for a set that the developers' machines lack are compiled but were never run there. So the choice
is checked where it is made: a small product of every format must agree with portable code.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from toptwo_kernels.cpu.linear import linear, pack
from toptwo_kernels.cpu.native import FORMATS, instruction_sets
from toptwo_kernels.cpu.tape import Tape

log = logging.getLogger(__name__)
TOLERANCE = 1e-4


def choose_instruction_set() -> str:
    """The best set that passes the check. Raises ValueError when there is no native backend."""
    available = instruction_sets()
    if not available:
        raise ValueError("the native CPU backend was not built on this machine")
    expected = _compute("scalar")
    for name in reversed(available):
        if name == "scalar" or torch.allclose(_compute(name), expected, rtol=TOLERANCE, atol=TOLERANCE):
            return name
        log.warning("the kernels for %s compute wrongly on this processor and are not used", name)
    return "scalar"


def _compute(instruction_set: str) -> Tensor:
    """Products of five rows with 20 x 96 weights in every format."""
    tape = Tape(1, instruction_set, pinned=False)
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(rows, 96, generator=generator) for rows in (20, 5))
    return torch.cat([linear(tape, x, pack(tape, weight, name)) for name in FORMATS])
