"""Operations on single numbers of the residual stream, projections and logits."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from toptwo_kernels.cuda.device import Device

_BLOCK = 1024


def add(device: Device, x_TH: Tensor, y_TH: Tensor) -> Tensor:
    """See `ops.Ops.add`. y is overwritten."""
    return _replace(device, y_TH, x_TH, 0.0, "add")


def scale(device: Device, x_TH: Tensor, factor: float) -> Tensor:
    """See `ops.Ops.scale`. x is overwritten."""
    return _replace(device, x_TH, x_TH, factor, "scale")


def clamp(device: Device, x_TH: Tensor, limit: float) -> Tensor:
    """See `ops.Ops.clamp`. x is overwritten; NaN stays."""
    return _replace(device, x_TH, x_TH, limit, "clamp")


def _replace(device: Device, x: Tensor, y: Tensor, number: float, operation: str) -> Tensor:
    grid = (triton.cdiv(x.numel(), _BLOCK),)
    _compute[grid](
        *(x, y, x.numel(), float(number), operation, _BLOCK, device.pdl), num_warps=4, launch_pdl=device.pdl
    )
    return x


@triton.jit
def _compute(
    x_X: tl.tensor,
    y_X: tl.tensor,
    size: tl.tensor,
    number: tl.tensor,
    OPERATION: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Replaces x, flat, by x + y, by x * number, or by x within -number and number."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    given = tl.load(x_X + at, mask=inside)
    x = given.to(tl.float32)
    if OPERATION == "add":
        x += tl.load(y_X + at, mask=inside).to(tl.float32)
    elif OPERATION == "scale":
        x *= number
    else:
        x = tl.where(x > number, number, tl.where(x < -number, -number, x))
    tl.store(x_X + at, x.to(given.dtype), mask=inside)
