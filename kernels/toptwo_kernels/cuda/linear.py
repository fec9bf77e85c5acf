"""Dense products of all tokens of a step with one matrix, or with a matrix for each head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from toptwo_kernels.cuda.device import Device
from toptwo_kernels.cuda.packing import BLOCK_INPUTS, parts
from toptwo_kernels.cuda.product import bytes_ahead, fetch_ahead, multiply, order_tiles
from toptwo_kernels.cuda.tuning import Config, Key, bucket
from toptwo_kernels.ops import Matrix

FEW_TOKENS = 64  # up to here reading weights is what takes time


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
    width = num_heads * (weight.rows + rest)
    out = torch.empty((num_tokens, width), dtype=x_TX.dtype, device=x_TX.device)
    words, scales = parts(weight)
    blocks = triton.cdiv(num_tokens, config.block_tokens), triton.cdiv(weight.rows, config.block_rows)
    _multiply_heads[(blocks[0] * blocks[1], num_heads)](
        x_TX,
        words,
        scales,
        bias_O,
        out,
        num_tokens,
        weight.rows,
        weight.cols,
        rest,
        words.stride(1),
        bytes_ahead(device, words, num_heads * weight.rows) if num_tokens <= FEW_TOKENS else 0,
        FORMAT=weight.format,
        REST=triton.next_power_of_2(rest) if rest else 0,
        EVEN=weight.cols % BLOCK_INPUTS.get(weight.format, config.block_cols) == 0,
        PDL=device.pdl,
        launch_pdl=device.pdl,
        **config.launch(),
    )
    return out


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
    row_size: tl.tensor,
    ahead: tl.tensor,
    FORMAT: tl.constexpr,
    REST: tl.constexpr,
    EVEN: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_T: tl.constexpr,
) -> None:
    """A tile [BLOCK_O, BLOCK_T] of one head's outputs; x [T, N (cols + rest)], out [T, N (rows + rest)]."""
    block, tile = order_tiles(tl.cdiv(num_tokens, BLOCK_T), tl.cdiv(rows, BLOCK_O), GROUP_T)
    head, num_heads = tl.program_id(1), tl.num_programs(1)
    rows_O = tile * BLOCK_O + tl.arange(0, BLOCK_O)
    inside_O = tl.minimum(rows_O, rows - 1)
    if PDL:
        if ahead > 0:
            fetch_ahead(words, head, inside_O, rows, row_size, ahead)
        gdc_launch_dependents()
        gdc_wait()
    tokens_T = block * BLOCK_T + tl.arange(0, BLOCK_T)
    live_T = tokens_T < num_tokens
    tokens_T = tl.where(live_T, tokens_T, 0).to(tl.int64)
    x_T = x + (tokens_T * num_heads + head) * (cols + rest)
    sums_OT, _ = multiply(
        x_T, words, scales, head, inside_O, rows, cols, FORMAT, False, EVEN, BLOCK_O, BLOCK_T, BLOCK_K
    )
    if bias is not None:
        sums_OT += tl.load(bias + inside_O)[:, None]
    out_T = out + (tokens_T * num_heads + head) * (rows + rest)
    mask_OT = (rows_O < rows)[:, None] & live_T[None, :]
    tl.store(out_T[None, :] + rows_O[:, None], sums_OT.to(out.dtype.element_ty), mask=mask_OT)
    if REST > 0 and tile == 0:
        at_R = tl.arange(0, REST)
        mask_TR = live_T[:, None] & (at_R < rest)[None, :]
        passed_TR = tl.load(x_T[:, None] + cols + at_R[None, :], mask=mask_TR)
        tl.store(out_T[:, None] + rows + at_R[None, :], passed_TR, mask=mask_TR)
