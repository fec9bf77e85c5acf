"""Normalisation: one program per row, or per slice of one, in float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from toptwo_kernels.cuda.device import Device


def rms_norm(device: Device, x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """See `ops.Ops.rms_norm`. The product with the weight is taken in x's dtype, as Llama does."""
    out_TH = torch.empty_like(x_TH)
    block, num_warps = _block_of(len(weight_H))
    _normalize_slices[(len(x_TH), 1)](
        *(x_TH, weight_H, out_TH, x_TH.shape[1], 0, len(weight_H), eps, block, device.pdl),
        num_warps=num_warps,
        launch_pdl=device.pdl,
    )
    return out_TH


def norm_slices(device: Device, x_TX: Tensor, weight_W: Tensor, eps: float, first: int, count: int) -> Tensor:
    """See `ops.Ops.norm_slices`. x is overwritten."""
    block, num_warps = _block_of(len(weight_W))
    _normalize_slices[(len(x_TX), count)](
        *(x_TX, weight_W, x_TX, x_TX.shape[1], first, len(weight_W), eps, block, device.pdl),
        num_warps=num_warps,
        launch_pdl=device.pdl,
    )
    return x_TX


def layer_norm(
    device: Device, x_TH: Tensor, weight_H: Tensor, eps: float, bias_H: Tensor | None = None
) -> Tensor:
    """See `ops.Ops.layer_norm`."""
    out_TH = torch.empty_like(x_TH)
    block, num_warps = _block_of(len(weight_H))
    _normalize_by_mean[(len(x_TH),)](
        *(x_TH, weight_H, bias_H, out_TH, len(weight_H), eps, block, device.pdl),
        num_warps=num_warps,
        launch_pdl=device.pdl,
    )
    return out_TH


def _block_of(width: int) -> tuple[int, int]:
    """How many numbers a program holds, and its warps: eight numbers to a thread, as one load brings."""
    block = triton.next_power_of_2(width)
    return block, min(16, max(1, block // 256))


@triton.jit
def _normalize_slices(
    x_TX: tl.tensor,
    weight_W: tl.tensor,
    out_TX: tl.tensor,
    row_size: tl.tensor,
    first: tl.tensor,
    width: tl.tensor,
    eps: tl.tensor,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Program (t, c): the slice of `width` columns number c, from column `first` on, of row t."""
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    weight = tl.load(weight_W + columns, mask=inside, other=0.0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    start = tl.program_id(0).to(tl.int64) * row_size + first + tl.program_id(1) * width
    given = tl.load(x_TX + start + columns, mask=inside, other=0.0)
    x = given.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x) / width + eps)
    normed = (x * scale).to(given.dtype).to(tl.float32) * weight.to(given.dtype).to(tl.float32)
    tl.store(out_TX + start + columns, normed.to(given.dtype), mask=inside)


@triton.jit
def _normalize_by_mean(
    x_TH: tl.tensor,
    weight_H: tl.tensor,
    bias_H: tl.tensor,
    out_TH: tl.tensor,
    width: tl.tensor,
    eps: tl.tensor,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Program t: row t. bias_H may be None."""
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    weight = tl.load(weight_H + columns, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    start = tl.program_id(0).to(tl.int64) * width
    given = tl.load(x_TH + start + columns, mask=inside, other=0.0)
    x = given.to(tl.float32)
    distance = tl.where(inside, x - tl.sum(x) / width, 0.0)
    normed = distance * tl.rsqrt(tl.sum(distance * distance) / width + eps) * weight
    if bias_H is not None:
        normed += tl.load(bias_H + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_TH + start + columns, normed.to(given.dtype), mask=inside)
