"""How weights lie on the device.

Dense formats lie as they come, [E, O, I]. The others lie in blocks of inputs, made so that a shift and a mask
of 32-bit words give 32 consecutive inputs: word j of a block holds input j of each group of 32.

    int8   blocks of 128 inputs; byte g of a word is the magnitude of q of group g, and its sign in bit 7
    int4   blocks of 256 inputs; nibble g of a word is q of group g
    fp8    blocks of 128 inputs; byte g of a word is the e4m3 number of group g

Behind all words [E, O, blocks, 32] come the scales, in one buffer with them. They are bfloat16, as weights
are when they are multiplied. Those of int8 and int4 are in 64-bit words, the same word of all rows side by
side, [E, blocks, words, O]: in int8 the scales of four groups, in int4 the scales of two and what is added
behind each, -zero / 16 * scale. Those of fp8 are 32-bit words [E, O / 128, blocks], a scale times 2^120
twice. Paired weights are a stack of twice as many matrices, gates and ups in turn. The last block of a row
is filled up with zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from toptwo_kernels.cuda.device import Device
from toptwo_kernels.ops import GROUP, Matrix, WeightFormat
from toptwo_kernels.reference.quantization import FP8_BLOCK, quantize_fp8, quantize_weight

BLOCK_INPUTS: dict[WeightFormat, int] = {"int8": 128, "int4": 256, "fp8": 128}
_SCALE_WORDS = {"int8": 1, "int4": 4}  # 64-bit words per row and block
_FP8_BIAS = 2.0**120  # e4m3 numbers are read as if their exponents had bfloat16's bias
_LARGEST_FP8_SCALE = 128.0  # times the bias it would be infinite
_AT_ONCE = 1 << 24  # weights quantised at a time: bounds the memory of it


def pack(device: Device, weight_EOI: Tensor, weight_format: WeightFormat, *, paired: bool = False) -> Matrix:
    """See `ops.Ops.pack`. The weight may be on any device."""
    stack = weight_EOI if weight_EOI.dim() == 3 else weight_EOI.unsqueeze(0)
    count, rows, cols = stack.shape
    if paired and rows % 2:
        raise ValueError(f"a paired weight has an even number of rows, not {rows}")
    if weight_format not in BLOCK_INPUTS:
        data = stack.to(device.torch_device, getattr(torch, weight_format)).contiguous()
        return Matrix(data, weight_format, count, rows, cols, paired)
    size = sum(_part_bytes(weight_format, _stack_shape(count, rows, cols, paired)))
    data = torch.empty(size, dtype=torch.uint8, device=device.torch_device)
    matrix = Matrix(data, weight_format, count, rows, cols, paired)
    _fill(matrix, stack)
    return matrix


def parts(matrix: Matrix) -> tuple[Tensor, Tensor]:
    """What a kernel takes of a matrix: its words and its scales; dense ones have no scales."""
    if matrix.format not in BLOCK_INPUTS:
        return matrix.data, matrix.data
    shape = _stack_shape(matrix.num_matrices, matrix.rows, matrix.cols, matrix.paired)
    count, rows, cols = shape
    blocks = -(-cols // BLOCK_INPUTS[matrix.format])
    num_bytes, _ = _part_bytes(matrix.format, shape)
    words = matrix.data[:num_bytes].view(torch.int32).view(count, rows, blocks, GROUP)
    scales = matrix.data[num_bytes:]
    if matrix.format == "fp8":
        return words, scales.view(torch.int32).view(count, -1, blocks)
    return words, scales.view(torch.int64).view(count, blocks, _SCALE_WORDS[matrix.format], rows)


def _stack_shape(count: int, rows: int, cols: int, paired: bool) -> tuple[int, int, int]:
    return (2 * count, rows // 2, cols) if paired else (count, rows, cols)


def _part_bytes(weight_format: WeightFormat, shape: tuple[int, int, int]) -> tuple[int, int]:
    """Bytes of a stack's words and of its scales."""
    count, rows, cols = shape
    blocks = -(-cols // BLOCK_INPUTS[weight_format])
    words = 4 * count * rows * blocks * GROUP
    if weight_format == "fp8":
        return words, 4 * count * -(-rows // FP8_BLOCK) * blocks
    return words, 8 * count * blocks * _SCALE_WORDS[weight_format] * rows


def _fill(matrix: Matrix, stack: Tensor) -> None:
    words, scales = parts(matrix)
    count, rows, blocks, _ = words.shape
    inputs = blocks * BLOCK_INPUTS[matrix.format]
    rows_at_once = max(1, _AT_ONCE // (inputs * FP8_BLOCK)) * FP8_BLOCK
    for index, weight_OI in enumerate(stack.reshape(count, rows, matrix.cols)):
        for first in range(0, rows, rows_at_once):
            chosen = slice(first, first + rows_at_once)
            part = weight_OI[chosen].to(matrix.data.device, torch.float32)
            part = torch.nn.functional.pad(part, (0, inputs - matrix.cols))
            if matrix.format == "fp8":
                q, scale = quantize_fp8(part)
                if bool((scale >= _LARGEST_FP8_SCALE).any()):
                    raise ValueError(f"a weight of {float(part.abs().max()):g} is too large for fp8")
                scales[index, first // FP8_BLOCK :][: len(scale)] = _twice(scale * _FP8_BIAS)
                words[index, chosen] = _bytes_to_words(q.view(torch.uint8), blocks)
            else:
                words[index, chosen], scales[index, ..., chosen] = _quantize(part, matrix.format, blocks)


def _quantize(weight_OI: Tensor, weight_format: WeightFormat, blocks: int) -> tuple[Tensor, Tensor]:
    """Words [O, blocks, 32] and scales [blocks, words, O] of whole blocks."""
    quantized = quantize_weight(weight_OI, weight_format)
    # What is multiplied with zeros only is anything but 0, of which there would be no -128 times as much.
    scale = torch.where(quantized.scale == 0, 1.0, quantized.scale).bfloat16()
    if weight_format == "int8":
        q = (quantized.q.abs() + 128 * (quantized.q < 0)).to(torch.uint8)
    else:
        nibbles = quantized.q.to(torch.uint8).view(len(weight_OI), -1, 2, GROUP)
        q = nibbles[:, :, 0] | nibbles[:, :, 1] << 4
        scale = torch.cat((scale, (-quantized.zero / 16 * scale.float()).bfloat16()), dim=-1)
    scales = scale.view(len(weight_OI), blocks, -1).view(torch.int64)
    return _bytes_to_words(q, blocks), scales.permute(1, 2, 0)


def _twice(numbers: Tensor) -> Tensor:
    """In bfloat16, in both halves of 32 bits."""
    return numbers.bfloat16().unsqueeze(-1).repeat_interleave(2, -1).view(torch.int32).squeeze(-1)


def _bytes_to_words(q: Tensor, blocks: int) -> Tensor:
    """[O, ...] bytes of which 32 consecutive ones are a byte of 32 words, as words [O, blocks, 32]."""
    words = q.reshape(len(q), blocks, 4, GROUP).transpose(-1, -2).contiguous()
    return words.view(torch.int32).squeeze(-1)
