"""Weights in the interleaved layout of csrc/layout.h, and products with them."""

from __future__ import annotations

import torch
from torch import Tensor

from toptwo_kernels.cpu.native import BLOCK_ROWS, DTYPES, FORMATS, allocate
from toptwo_kernels.cpu.tape import Tape
from toptwo_kernels.ops import Matrix, WeightFormat


def packed_rows(rows: int, paired: bool) -> int:
    """Rows of the packed layout: gates and ups are filled up to whole blocks, which alternate."""
    return 2 * (-(-(rows // 2) // BLOCK_ROWS) * BLOCK_ROWS) if paired else rows


def pack(tape: Tape, weight_EOI: Tensor, weight_format: WeightFormat, *, paired: bool = False) -> Matrix:
    """See `ops.Ops.pack`."""
    if weight_format not in FORMATS:
        raise ValueError(f"the CPU backend has no weights in {weight_format}, only in {', '.join(FORMATS)}")
    stack = weight_EOI if weight_EOI.dim() == 3 else weight_EOI.unsqueeze(0)
    count, rows, cols = stack.shape
    if paired and rows % 2:
        raise ValueError(f"a paired weight has an even number of rows, not {rows}")
    source = stack.contiguous()
    target_rows = packed_rows(rows, paired)
    size = tape.native.matrix_bytes(FORMATS[weight_format], target_rows, cols)
    data = allocate(count * size)
    target = FORMATS[weight_format], target_rows, cols, count, data.data_ptr()
    tape.workers.pack(source.data_ptr(), DTYPES[source.dtype], rows, paired, *target)
    return Matrix(data, weight_format, count, rows, cols, paired)


def unpack(tape: Tape, matrix: Matrix) -> Tensor:
    """The float32 weight [E, O, I] that a packed one stands for."""
    rows = packed_rows(matrix.rows, matrix.paired)
    dense = torch.empty(matrix.num_matrices, rows, matrix.cols)
    for data, target in zip(matrix.data.chunk(matrix.num_matrices), dense, strict=True):
        tape.workers.unpack(FORMATS[matrix.format], rows, matrix.cols, data.data_ptr(), target.data_ptr())
    if not matrix.paired:
        return dense
    half = matrix.rows // 2
    # [E, block, gate or up, row of the block, I]
    blocks = dense.view(matrix.num_matrices, -1, 2, BLOCK_ROWS, matrix.cols).transpose(1, 2).flatten(2, 3)
    return blocks[:, :, :half].flatten(1, 2)


def linear(tape: Tape, x_TI: Tensor, weight: Matrix, bias_O: Tensor | None = None) -> Tensor:
    """See `ops.Ops.linear`."""
    return _product(tape, x_TI, weight, 1, bias_O)


def linear_per_head(tape: Tape, x_TX: Tensor, weight: Matrix) -> Tensor:
    """See `ops.Ops.linear_per_head`."""
    return _product(tape, x_TX, weight, weight.num_matrices, None)


def _product(tape: Tape, x_TX: Tensor, weight: Matrix, num_heads: int, bias_O: Tensor | None) -> Tensor:
    """One matrix for each head of x; columns behind those that it takes are passed on."""
    rest = x_TX.shape[1] // num_heads - weight.cols
    out = tape.empty(x_TX, num_heads * (weight.rows + rest))
    matrix = FORMATS[weight.format], weight.rows, weight.cols, weight.data
    extent = tape.extent_of(x_TX)
    tape.emit("linear", x_TX, *matrix, num_heads, rest, bias_O, out, extent, step=len(x_TX))
    return out
