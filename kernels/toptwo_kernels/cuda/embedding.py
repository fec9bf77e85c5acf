"""Rows in, rows out: token embeddings, and the choice of tokens whose logits are wanted."""

from __future__ import annotations

from typing import cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from toptwo_kernels.cuda.device import Device
from toptwo_kernels.cuda.packing import BLOCK_INPUTS, parts
from toptwo_kernels.cuda.plan import Plan
from toptwo_kernels.ops import GROUP, Matrix

_BLOCK = 1024
_FP8_UNBIASED = tl.constexpr(2.0**-120)  # see packing


def embed(device: Device, table: Matrix, plan: object) -> Tensor:
    """See `ops.Ops.embed`. A quantised table gives bfloat16, any other one its own dtype."""
    ids_T = cast(Plan, plan).ids_T
    if table.format not in BLOCK_INPUTS:
        return _gather(device, table.data[0], ids_T)
    words, scales = parts(table)
    out_TH = torch.empty(len(ids_T), table.cols, dtype=torch.bfloat16, device=device.torch_device)
    _decode_rows[(len(ids_T), words.shape[2])](
        *(words, scales, ids_T, out_TH, table.rows, table.cols),
        *(table.format, BLOCK_INPUTS[table.format], GROUP, device.pdl),
        num_warps=1,
        launch_pdl=device.pdl,
    )
    return out_TH


def select(device: Device, x_TH: Tensor, plan: object) -> Tensor:
    """See `ops.Ops.select`."""
    return _gather(device, x_TH, cast(Plan, plan).selected_S)


def _gather(device: Device, rows_XH: Tensor, indices_S: Tensor) -> Tensor:
    width = rows_XH.shape[1]
    out_SH = torch.empty(len(indices_S), width, dtype=rows_XH.dtype, device=device.torch_device)
    _copy_rows[(len(indices_S), triton.cdiv(width, _BLOCK))](
        *(rows_XH, indices_S, out_SH, width, _BLOCK, device.pdl), num_warps=4, launch_pdl=device.pdl
    )
    return out_SH


@triton.jit
def _copy_rows(
    rows_XH: tl.tensor,
    indices_S: tl.tensor,
    out_SH: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Program (s, b): block b of row s of the output."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    index = tl.load(indices_S + row).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    tl.store(
        out_SH + row * width + columns, tl.load(rows_XH + index * width + columns, mask=inside), mask=inside
    )


@triton.jit
def _decode_rows(
    words: tl.tensor,
    scales: tl.tensor,
    ids_T: tl.tensor,
    out_TH: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    FORMAT: tl.constexpr,
    BLOCK: tl.constexpr,
    WORDS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Program (t, b): block b of the table's row of token t, from the layout that `packing` describes."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token, num_blocks = tl.load(ids_T + row).to(tl.int64), tl.num_programs(1)
    groups, inputs = tl.arange(0, BLOCK // WORDS)[:, None], tl.arange(0, WORDS)[None, :]
    word = tl.load(words + (token * num_blocks + block) * WORDS + inputs)
    if FORMAT == "fp8":
        scale = _bfloat16(tl.load(scales + (token // BLOCK) * num_blocks + block)) * _FP8_UNBIASED
        byte = (word >> (8 * groups)).to(tl.uint8)
        value = byte.to(tl.float8e4nv, bitcast=True).to(tl.float32) * scale
    elif FORMAT == "int8":
        scale = _bfloat16(tl.load(scales + block.to(tl.int64) * num_rows + token) >> (16 * groups))
        byte = (word >> (8 * groups)) & 255
        value = tl.where(byte < 128, byte, 128 - byte).to(tl.float32) * scale
    else:
        place = scales + block.to(tl.int64) * 4 * num_rows + token
        bits = tl.load(place + (groups // 2) * num_rows) >> (32 * (groups % 2))
        number = ((word >> (4 * groups)) & 15).to(tl.float32)
        value = number * _bfloat16(bits) + _bfloat16(bits >> 16)
    columns = block * BLOCK + groups * WORDS + inputs
    tl.store(out_TH + row * width + columns, value.to(tl.bfloat16), mask=columns < width)


@triton.jit
def _bfloat16(bits: tl.tensor) -> tl.tensor:
    """The number in the lowest 16 bits, as float32."""
    return ((bits & 0xFFFF) << 16).to(tl.int32).to(tl.float32, bitcast=True)
