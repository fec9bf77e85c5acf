"""Dense products, and the quantised formats in their plainest form."""

from __future__ import annotations

import torch
from torch import Tensor

from toptwo_kernels.ops import QUANTIZED, Matrix, WeightFormat
from toptwo_kernels.reference.quantization import (
    dequantize,
    dequantize_fp8,
    quantize_fp8,
    quantize_rows,
    quantize_weight,
)


def pack(weight_EOI: Tensor, weight_format: WeightFormat, *, paired: bool = False) -> Matrix:
    """See `ops.Ops.pack`. The layout is the dense one; quantised weights are kept as what they stand for."""
    data = weight_EOI if weight_EOI.dim() == 3 else weight_EOI.unsqueeze(0)
    if weight_format in QUANTIZED:
        data = dequantize(quantize_weight(data.float(), weight_format))
    elif weight_format == "fp8":
        halves = data.float().reshape(len(data) * (2 if paired else 1), -1, data.shape[-1])
        data = dequantize_fp8(*quantize_fp8(halves)).view(data.shape)
    else:
        data = data.to(getattr(torch, weight_format))
    count, rows, cols = data.shape
    return Matrix(data, weight_format, count, rows, cols, paired)


def linear(x_TI: Tensor, weight: Matrix, bias_O: Tensor | None = None) -> Tensor:
    """See `ops.Ops.linear`."""
    return product(x_TI, weight, 0, None if bias_O is None else bias_O.unsqueeze(0))


def linear_per_head(x_TX: Tensor, weight: Matrix) -> Tensor:
    """See `ops.Ops.linear_per_head`."""
    heads_TNX = x_TX.view(len(x_TX), weight.num_matrices, -1)
    outputs = [product(heads_TNX[:, n, : weight.cols], weight, n) for n in range(weight.num_matrices)]
    return torch.cat((torch.stack(outputs, dim=1), heads_TNX[..., weight.cols :]), dim=-1).flatten(1)


def product(x_TI: Tensor, weight: Matrix, index: int, bias_EO: Tensor | None = None) -> Tensor:
    """x @ weight[index].T + bias[index], with x rounded as the format asks."""
    if weight.format in QUANTIZED:
        x_TI = quantize_rows(x_TI.float(), weight.format)
    dense = weight.data[index]
    bias = None if bias_EO is None else bias_EO[index].to(dense.dtype)
    return torch.nn.functional.linear(x_TI.to(dense.dtype), dense, bias).to(x_TI.dtype)
