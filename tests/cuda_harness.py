"""What tests of the CUDA backend share: where its kernels run, and what counts as equal.

Without a CUDA device they run in Triton's interpreter, on tensors in main memory. Triton reads that choice as
it is imported, so this module comes first.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    assert "triton" not in sys.modules, "Triton was imported before the tests could choose its interpreter"
    os.environ["TRITON_INTERPRET"] = "1"

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    import triton_interpreter

    triton_interpreter.mend()

GUARD = 512  # bytes, which keeps tensors as aligned as torch's own
FLOAT_POISON, INTEGER_POISON = 0xFF, 0x5A  # bytes: NaN in every float format; no id, slot or count


def assert_close(got: Tensor, expected: Tensor, relative: float) -> None:
    """Fails unless |got - expected| <= relative |expected|, over all numbers; NaN is close to nothing."""
    assert got.shape == expected.shape, f"{tuple(got.shape)} is not {tuple(expected.shape)}"
    got, expected = got.cpu().double(), expected.cpu().double()
    error, size = float((got - expected).norm()), float(expected.norm())
    assert error <= relative * size, f"off by {error / size if size else error:.3g}, not {relative:.3g}"


@dataclass
class GuardedMemory:
    """A stand-in for torch.empty: what it gives is poisoned, and lies between bands that nobody may touch.

    A number that an operation forgot to write, or that a kernel read beside a tensor, is NaN in the end.
    """

    real: Any = torch.empty
    blocks: list[tuple[Tensor, int]] = field(default_factory=list)

    def empty(self, *size: Any, dtype: Any = None, device: Any = None, **others: Any) -> Tensor:
        if not size or others or str(device) == "meta":
            tensor: Tensor = self.real(*size, dtype=dtype, device=device, **others)
            return tensor
        shape = torch.Size(size if isinstance(size[0], int) else size[0])
        dtype = dtype or torch.get_default_dtype()
        poison = FLOAT_POISON if dtype.is_floating_point else INTEGER_POISON
        num_bytes = shape.numel() * dtype.itemsize
        block = self.real(num_bytes + 2 * GUARD, dtype=torch.uint8, device=device).fill_(poison)
        self.blocks.append((block, poison))
        return block[GUARD : GUARD + num_bytes].view(dtype).view(shape)

    def empty_like(self, like: Tensor, *, dtype: Any = None, device: Any = None) -> Tensor:
        return self.empty(like.shape, dtype=dtype or like.dtype, device=device or like.device)

    def check(self) -> None:
        for block, poison in self.blocks:
            touched = torch.cat((block[:GUARD], block[-GUARD:])) != poison
            assert not touched.any(), f"{int(touched.sum())} bytes beside a tensor were written"
