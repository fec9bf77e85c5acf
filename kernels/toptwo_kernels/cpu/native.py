"""The native extension, if it was built, and the few numbers that both sides must agree on."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from toptwo_kernels.ops import Activation, ScoreFunction, WeightFormat

FORMATS: dict[WeightFormat, int] = {"float32": 0, "bfloat16": 1, "float16": 2, "int8": 3, "int4": 4}
# As Epilogue in csrc/kernels.h and RouterSpec::Score in csrc/program.h.
ACTIVATIONS: dict[Activation, int] = {"silu": 1, "gelu_tanh": 2, "clamped_swiglu": 3}
SCORES: dict[ScoreFunction, int] = {"softmax": 0, "sigmoid": 1, "sparsemixer": 2}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BLOCK_ROWS = 8  # rows of a weight that are interleaved
KV_BLOCK = 16  # tokens of a KV block: two vectors of scores
ALIGNMENT = 64
HUGE_PAGE = 2 << 20


def load_native() -> ModuleType | None:
    """The extension module; None when the package was installed without it."""
    try:
        from toptwo_kernels.cpu import _native
    except ImportError:
        return None
    return _native


def instruction_sets() -> list[str]:
    """Instruction sets that kernels were built for and this processor has; best last.

    Empty when the package was installed without its native extension.
    """
    native = load_native()
    return list(native.instruction_sets()) if native else []


def require_native() -> ModuleType:
    native = load_native()
    if native is None:
        raise ValueError("the native CPU backend was not built on this machine")
    return native


def allocate(num_bytes: int) -> Tensor:
    """Bytes aligned for vector loads; large ones in huge pages, which are read up to a fifth faster."""
    alignment = HUGE_PAGE if num_bytes >= HUGE_PAGE else ALIGNMENT
    room = torch.empty(num_bytes + alignment, dtype=torch.uint8)
    start = -room.data_ptr() % alignment
    part = room[start : start + num_bytes]
    if num_bytes >= HUGE_PAGE:
        require_native().advise(part.data_ptr(), num_bytes, "huge")
    return part


def checksum(data: Tensor) -> int:
    """64 bits over all bytes of a contiguous tensor. It finds damage, not forgery."""
    number: int = require_native().checksum(data.data_ptr(), data.nbytes)
    return number
