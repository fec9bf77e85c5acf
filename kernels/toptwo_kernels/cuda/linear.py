"""Dense products of all tokens of a step with one matrix, or with a matrix for each head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from toptwo_kernels.cuda.device import Device
from toptwo_kernels.cuda.packing import BLOCK_INPUTS, parts
from toptwo_kernels.cuda.product import multiply_slices, order_tiles, slice_inputs
from toptwo_kernels.cuda.tuning import Config, Key, bucket
from toptwo_kernels.ops import Matrix

FEW_TOKENS = 64  # up to here slices of the inputs are programs of their own
_ADDED_AT_ONCE = 1024


def linear(device: Device, x_TI: Tensor, weight: Matrix, bias_O: Tensor | None = None) -> Tensor:
    """See `ops.Ops.linear`. x is not rounded, whatever the weight's format."""
    return multiply_heads(device, x_TI, weight, bias_O, device.tuner.choose(key(weight, len(x_TI))))


def linear_per_head(device: Device, x_TX: Tensor, weight: Matrix) -> Tensor:
    """See `ops.Ops.linear_per_head`. x is not rounded, whatever the weight's format."""
    return multiply_heads(device, x_TX, weight, None, device.tuner.choose(key(weight, len(x_TX))))


def key(weight: Matrix, num_tokens: int) -> Key:
    """What the configuration of a product is chosen by."""
    return Key("linear", weight.format, weight.rows, weight.cols, bucket(num_tokens))


def multiply_heads(
    device: Device, x_TX: Tensor, weight: Matrix, bias_O: Tensor | None, config: Config
) -> Tensor:
    """[T, N (I + R)] to [T, N (O + R)], by N matrices."""
    num_tokens, num_heads = len(x_TX), weight.num_matrices
    rest = x_TX.shape[1] // num_heads - weight.cols
    slice_cols = slice_inputs(weight) if num_heads == 1 else weight.cols
    num_slices = triton.cdiv(weight.cols, slice_cols) if num_tokens <= FEW_TOKENS else 1
    split = num_slices > 1
    width = num_heads * (weight.rows + rest)
    out = torch.empty(
        (num_slices, num_tokens, width), dtype=torch.float32 if split else x_TX.dtype, device=x_TX.device
    )
    words, scales = parts(weight)
    blocks = triton.cdiv(num_tokens, config.block_tokens), triton.cdiv(weight.rows, config.block_rows)
    _multiply_heads[(blocks[0] * blocks[1], num_heads, num_slices)](
        x_TX,
        words,
        scales,
        None if split else bias_O,
        out,
        num_tokens,
        weight.rows,
        weight.cols,
        rest,
        slice_cols,
        FORMAT=weight.format,
        SPLIT=split,
        REST=triton.next_power_of_2(rest) if rest else 0,
        EVEN=weight.cols % BLOCK_INPUTS.get(weight.format, config.block_cols) == 0,
        PDL=device.pdl,
        launch_pdl=device.pdl,
        **config.launch(),
    )
    return _add_up(device, out, bias_O, x_TX.dtype) if split else out[0]


@triton.jit
def _multiply_heads(
    x: tl.tensor,
    words: tl.tensor,
    scales: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    num_tokens: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    rest: tl.tensor,
    slice_cols: tl.tensor,
    FORMAT: tl.constexpr,
    SPLIT: tl.constexpr,
    REST: tl.constexpr,
    EVEN: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_T: tl.constexpr,
) -> None:
    """A tile [BLOCK_O, BLOCK_T] of one head's outputs, or of a slice's share in them; x [T, N (cols + rest)],
    out [S, T, N (rows + rest)]."""
    block, tile = order_tiles(tl.cdiv(num_tokens, BLOCK_T), tl.cdiv(rows, BLOCK_O), GROUP_T)
    head, num_heads, slice_id = tl.program_id(1), tl.num_programs(1), tl.program_id(2)
    rows_O = tile * BLOCK_O + tl.arange(0, BLOCK_O)
    inside_O = tl.minimum(rows_O, rows - 1)
    if PDL:
        gdc_wait()
    tokens_T = block * BLOCK_T + tl.arange(0, BLOCK_T)
    live_T = tokens_T < num_tokens
    tokens_T = tl.where(live_T, tokens_T, 0).to(tl.int64)
    x_T = x + (tokens_T * num_heads + head) * (cols + rest)
    sums_OT = multiply_slices(
        x_T, words, scales, inside_O * 0 + head, inside_O, rows, cols, slice_id, slice_cols,
        SPLIT, FORMAT, EVEN, BLOCK_O, BLOCK_T, BLOCK_K,
    )  # fmt: skip
    if PDL:
        gdc_launch_dependents()  # not before: what comes next would crowd the processors that are free first
    if bias is not None:
        sums_OT += tl.load(bias + inside_O)[:, None]
    out_T = out + ((slice_id * num_tokens + tokens_T) * num_heads + head) * (rows + rest)
    mask_OT = (rows_O < rows)[:, None] & live_T[None, :]
    tl.store(out_T[None, :] + rows_O[:, None], sums_OT.to(out.dtype.element_ty), mask=mask_OT)
    if REST > 0 and tile == 0:
        at_R = tl.arange(0, REST)
        mask_TR = live_T[:, None] & (at_R < rest)[None, :]
        passed_TR = tl.load(x_T[:, None] + cols + at_R[None, :], mask=mask_TR)
        tl.store(out_T[:, None] + rows + at_R[None, :], passed_TR, mask=mask_TR)


def _add_up(device: Device, parts_STO: Tensor, bias_O: Tensor | None, dtype: torch.dtype) -> Tensor:
    num_slices, num_tokens, width = parts_STO.shape
    total_TO = torch.empty((num_tokens, width), dtype=dtype, device=parts_STO.device)
    _add_slices[(num_tokens, triton.cdiv(width, _ADDED_AT_ONCE))](
        *(parts_STO, bias_O, total_TO, width, num_slices, _ADDED_AT_ONCE, device.pdl), launch_pdl=device.pdl
    )
    return total_TO


@triton.jit
def _add_slices(
    parts: tl.tensor,
    bias: tl.tensor,
    total: tl.tensor,
    width: tl.tensor,
    SLICES: tl.constexpr,
    BLOCK_O: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """total [T, O] = the sum of parts [S, T, O] in order, and the bias."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token, num_tokens = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    at_O = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    inside_O = at_O < width
    sums_O = tl.zeros([BLOCK_O], tl.float32)
    for slice_id in tl.static_range(SLICES):
        sums_O += tl.load(parts + (slice_id * num_tokens + token) * width + at_O, mask=inside_O, other=0.0)
    if bias is not None:
        sums_O += tl.load(bias + at_O, mask=inside_O, other=0.0)
    tl.store(total + token * width + at_O, sums_O.to(total.dtype.element_ty), mask=inside_O)
