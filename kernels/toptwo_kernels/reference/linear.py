"""Dense products, and the quantised formats in their plainest form."""

from __future__ import annotations

import torch
from torch import Tensor

from toptwo_kernels.ops import QUANTIZED, Matrix, WeightFormat
from toptwo_kernels.reference.quantization import dequantize, quantize_rows, quantize_weight


def pack(weight_EOI: Tensor, weight_format: WeightFormat, *, paired: bool = False) -> Matrix:
    """See `ops.Ops.pack`. The layout is the dense one; quantised weights are kept as what they stand for."""
    data = weight_EOI if weight_EOI.dim() == 3 else weight_EOI.unsqueeze(0)
    if weight_format in QUANTIZED:
        data = dequantize(quantize_weight(data.float(), weight_format))
    else:
        data = data.to(getattr(torch, weight_format))
    count, rows, cols = data.shape
    return Matrix(data, weight_format, count, rows, cols, paired)


def linear(x_TI: Tensor, weight: Matrix) -> Tensor:
    """See `ops.Ops.linear`."""
    return product(x_TI, weight, 0)


def product(x_TI: Tensor, weight: Matrix, index: int) -> Tensor:
    """x @ weight[index].T, with x rounded as the format asks."""
    if weight.format in QUANTIZED:
        x_TI = quantize_rows(x_TI.float(), weight.format)
    dense = weight.data[index]
    return torch.nn.functional.linear(x_TI.to(dense.dtype), dense).to(x_TI.dtype)
