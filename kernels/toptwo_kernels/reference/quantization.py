"""The quantised formats, defined: how weights and activations are rounded.

int8: q * scale, q in [-127, 127]. int4: (q - zero / 16) * scale, q in [0, 15], zero in [0, 255]: a zero
point in sixteenths of a step costs a byte per group and lets a group keep its own range. Scales are
float16. Groups are 32 consecutive inputs of a row; a shorter last one is filled with zeros.
fp8: e4m3 times a float32 scale, which blocks of 128 rows by 128 inputs share (arXiv 2412.19437); blocks at
the end of rows or columns are smaller.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from toptwo_kernels.ops import GROUP, WeightFormat

# Largest magnitude of a rounded activation, by the format of the weights it meets.
LEVELS: dict[WeightFormat, float] = {"int8": 4095.0, "int4": 127.0}
# int8 tries to give the group's largest weight each of these numbers of steps. Weights that were quantised
# before lie on a grid, which one of the scales often meets.
INT8_STEPS = range(127, 95, -1)
# int4 tries ranges in 15 steps that are narrower than the group's own, by each pair of these factors on its
# two ends: clipping the extremes buys precision for the rest.
CLIPS = (1.0, 0.94, 0.88, 0.82, 0.76)
# And the group's own range in each of these numbers of steps, for weights that were quantised to four bits
# before: the part of their grid that a group has is one of these, or every second, fourth or eighth point of
# one, and comes back exactly.
INT4_STEPS = range(14, 7, -1)
FP8_BLOCK = 128  # rows and inputs that share a scale
FP8_LARGEST = 448.0


@dataclass(frozen=True)
class Quantized:
    """Values in groups: q [..., G, 32], scale and zero [..., G, 1]; `size` inputs of a row are real."""

    q: Tensor
    scale: Tensor
    zero: Tensor
    size: int


def quantize_weight(weight: Tensor, weight_format: WeightFormat) -> Quantized:
    """Round a weight [..., I]."""
    groups, size = _in_groups(weight), weight.shape[-1]
    return _to_int8(groups, size) if weight_format == "int8" else _to_int4(groups, size)


def _in_groups(values: Tensor) -> Tensor:
    """[..., G, 32], the last group filled up with zeros."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[-1] % GROUP))
    return padded.view(*padded.shape[:-1], -1, GROUP)


def dequantize(quantized: Quantized) -> Tensor:
    """The float32 weight that the rounded one stands for."""
    steps = 16 * quantized.q - quantized.zero
    return (steps * (quantized.scale / 16)).flatten(-2)[..., : quantized.size].contiguous()


def _to_int8(groups: Tensor, size: int) -> Quantized:
    most = groups.abs().amax(-1, keepdim=True)
    best, best_scale = torch.full_like(most, torch.inf), torch.zeros_like(most)
    for steps in INT8_STEPS:
        scale = (most / steps).half().float()
        error = (_round_int8(groups, scale) * scale - groups).square().sum(-1, keepdim=True)
        better = (error < best) & (scale > 0)
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale, best_scale)
    return Quantized(_round_int8(groups, best_scale), best_scale, torch.zeros_like(most), size)


def _round_int8(groups: Tensor, scale: Tensor) -> Tensor:
    return (groups * _inverse(scale)).round().clamp(-127, 127)


def _to_int4(groups: Tensor, size: int) -> Quantized:
    low = groups.amin(-1, keepdim=True).clamp(max=0)
    high = groups.amax(-1, keepdim=True).clamp(min=0)
    best = torch.full_like(low, torch.inf)
    best_scale, best_zero = torch.zeros_like(low), torch.zeros_like(low)
    clipped = ((low * a, high * b, 15) for a, b in itertools.product(CLIPS, CLIPS))
    for start, end, steps in itertools.chain(clipped, ((low, high, steps) for steps in INT4_STEPS)):
        scale = ((end - start) / steps).half().float()
        zero = (-start * _inverse(scale) * 16).round().clamp(0, 255)
        q = _round_int4(groups, scale, zero)
        error = ((q - zero / 16) * scale - groups).square().sum(-1, keepdim=True)
        better = (error < best) & (scale > 0)
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return Quantized(_round_int4(groups, best_scale, best_zero), best_scale, best_zero, size)


def _round_int4(groups: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return (groups * _inverse(scale) + zero / 16).round().clamp(0, 15)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, 1 / scale, 0.0)


def quantize_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight [..., O, I] as float8_e4m3fn, and the scales of its blocks, as many as there are."""
    rows, cols = weight.shape[-2:]
    padded = torch.nn.functional.pad(weight, (0, -cols % FP8_BLOCK, 0, -rows % FP8_BLOCK))
    down, across = padded.shape[-2] // FP8_BLOCK, padded.shape[-1] // FP8_BLOCK
    blocks = padded.view(*weight.shape[:-2], down, FP8_BLOCK, across, FP8_BLOCK)
    scale = blocks.abs().amax((-3, -1)) / FP8_LARGEST
    # Rounding the scale can put the largest weight just beyond what the format holds.
    scaled = (weight * _inverse(_spread(scale, rows, cols))).clamp(-FP8_LARGEST, FP8_LARGEST)
    return scaled.to(torch.float8_e4m3fn), scale


def dequantize_fp8(q: Tensor, scale: Tensor) -> Tensor:
    """The float32 weight [..., O, I] that the rounded one stands for."""
    return q.float() * _spread(scale, *q.shape[-2:])


def _spread(scale: Tensor, rows: int, cols: int) -> Tensor:
    """The scale of every weight [..., rows, cols]."""
    by_row = scale.repeat_interleave(FP8_BLOCK, -2)[..., :rows, :]
    return by_row.repeat_interleave(FP8_BLOCK, -1)[..., :cols]


def quantize_rows(x_TI: Tensor, weights: WeightFormat) -> Tensor:
    """Activations rounded as weights of a format want them, as float32 again.

    A float32 scale per group of 32, and 13 bits beside int8 weights, 8 bits beside int4.
    """
    # As a tensor: torch divides a Python number by a tensor in two roundings.
    levels = torch.tensor(LEVELS[weights])
    groups = _in_groups(x_TI)
    most = groups.abs().amax(-1, keepdim=True)
    q = (groups * torch.where(most > 1e-30, levels / most, 0.0)).round()
    return (q * (most / levels)).flatten(-2)[..., : x_TI.shape[-1]]
