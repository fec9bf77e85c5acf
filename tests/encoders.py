"""Writers of quantised weights, made from what is known of their formats, not from the code that reads them.

Each takes a matrix [out, in] and returns the tensors to store, by what follows the module's name, and the
numbers that they stand for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Encoder = Callable[[torch.Tensor], tuple[dict[str, torch.Tensor], torch.Tensor]]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def gptq(bits: int, group: int, *, version: int = 1, reordered: bool = False, g_idx: bool = True) -> Encoder:
    """reordered: which inputs share a group is random, as after sorting them by activation."""

    def encode(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        inputs = weight.shape[1]
        groups = np.arange(inputs) // group
        if reordered:
            groups = np.random.default_rng(inputs).permutation(groups)
        q, zero, scale, dense = _quantize(weight, bits, groups)
        zeros = pack(zero.T, bits)
        if version == 1:  # one less of each, in a subtraction of whole words
            zeros = zeros - np.uint32(0x11111111 if bits == 4 else 0x01010101)
        stored = {
            "qweight": _words(pack(q, bits).T),
            "qzeros": _words(zeros),
            "scales": torch.from_numpy(scale.T.copy()),
            "g_idx": torch.from_numpy(groups.astype(np.int32)),
        }
        return {key: value for key, value in stored.items() if g_idx or key != "g_idx"}, dense

    return encode


def awq(group: int) -> Encoder:
    def encode(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        q, zero, scale, dense = _quantize(weight, 4, np.arange(weight.shape[1]) // group)
        stored = {
            "qweight": _words(pack(q.T, 4, AWQ_ORDER)),
            "qzeros": _words(pack(zero.T, 4, AWQ_ORDER)),
            "scales": torch.from_numpy(scale.T.copy()),
        }
        return stored, dense

    return encode


def packed(bits: int, group: int | None, *, symmetric: bool = True, reordered: bool = False) -> Encoder:
    """compressed-tensors' pack-quantized; group None: a scale for each row."""

    def encode(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        inputs = weight.shape[1]
        groups = np.arange(inputs) // (group or inputs)
        if reordered:
            groups = np.random.default_rng(inputs).permutation(groups)
        q, zero, scale, dense = _quantize(weight, bits, groups, symmetric=symmetric)
        stored = {
            "weight_packed": _words(pack(q, bits)),
            "weight_scale": torch.from_numpy(scale).bfloat16(),
            "weight_shape": torch.tensor(weight.shape),
        }
        scale = stored["weight_scale"].float().numpy()
        dense = torch.from_numpy((q - zero[:, groups]).astype(np.float32) * scale[:, groups])
        if not symmetric:
            stored["weight_zero_point"] = _words(pack(zero.T, bits).T)
        if reordered:
            stored["weight_g_idx"] = torch.from_numpy(groups.astype(np.int32))
        return stored, dense

    return encode


def fp8(
    block: tuple[int, int] | None, suffix: str, scale_dtype: torch.dtype = torch.float32, dims: int = 2
) -> Encoder:
    """block: rows and columns that share a scale, None for all; dims: of the scale, where there is one."""

    def encode(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        rows, columns = weight.shape
        tall, wide = block or (rows, columns)
        scale = torch.empty(-(-rows // tall), -(-columns // wide))
        stored, dense = torch.empty(rows, columns), torch.empty(rows, columns)
        for r in range(scale.shape[0]):
            for c in range(scale.shape[1]):
                here = slice(r * tall, (r + 1) * tall), slice(c * wide, (c + 1) * wide)
                scale[r, c] = (weight[here].abs().max() / 448).to(scale_dtype).float()
                stored[here] = (weight[here] / scale[r, c]).to(torch.float8_e4m3fn).float()
                dense[here] = stored[here] * scale[r, c]
        shape = tuple(scale.shape) if dims == 2 else (-1,) if dims == 1 else ()
        return {
            "weight": stored.to(torch.float8_e4m3fn),
            suffix: scale.to(scale_dtype).reshape(shape),
        }, dense

    return encode


def int8(*, symmetric: bool = True) -> Encoder:
    """compressed-tensors' int-quantized, with a scale for each row."""

    def encode(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        q, zero, scale, dense = _quantize(weight, 8, np.zeros(weight.shape[1], int), symmetric=symmetric)
        stored = {
            "weight": torch.from_numpy((q - 128).astype(np.int8)),
            "weight_scale": torch.from_numpy(scale),
        }
        if not symmetric:
            stored["weight_zero_point"] = torch.from_numpy((zero - 128).astype(np.int8))
        return stored, dense

    return encode


def mxfp4(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """For stacks of any dimensions, whose last one is in blocks of 32."""
    values = np.array([*FP4, *(-value for value in FP4)], np.float32)
    blocks = weight.float().numpy().reshape(*weight.shape[:-1], -1, 32)
    exponent = np.ceil(np.log2(np.abs(blocks).max(-1) / 6.0))
    power = np.exp2(exponent)[..., None]
    codes = np.abs(blocks[..., None] / power[..., None] - values).argmin(-1)
    dense = (values[codes] * power).astype(np.float32).reshape(weight.shape)
    octets = codes[..., 0::2] + 16 * codes[..., 1::2]
    stored = {
        "blocks": torch.from_numpy(octets.astype(np.uint8)),
        "scales": torch.from_numpy((exponent + 127).astype(np.uint8)),
    }
    return stored, torch.from_numpy(dense)


def pack(values: NDArray[Any], bits: int, order: tuple[int, ...] | None = None) -> NDArray[np.uint32]:
    """Neighbours of the last dimension in one word, the first in the lowest bits, or as `order` has it."""
    per_word = 32 // bits
    words = np.zeros((*values.shape[:-1], values.shape[-1] // per_word), np.uint32)
    for place, which in enumerate(order or range(per_word)):
        words |= values[..., which::per_word].astype(np.uint32) << np.uint32(place * bits)
    return words


def _words(words: NDArray[np.uint32]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(words).view(np.int32))


def _quantize(
    weight: torch.Tensor, bits: int, groups: NDArray[Any], *, symmetric: bool = False
) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.float16], torch.Tensor]:
    """(integers [out, in] from 0, zeros [out, groups], scales, what they stand for), column by column."""
    w = weight.float().numpy()
    top, count = 2**bits - 1, int(groups.max()) + 1
    zero = np.full((len(w), count), 2 ** (bits - 1))
    scale = np.empty((len(w), count), np.float16)
    for g in range(count):
        part = w[:, groups == g]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        if symmetric:
            scale[:, g] = np.abs(part).max(1) / (2 ** (bits - 1) - 1)
        else:
            scale[:, g] = (high - low) / top
            zero[:, g] = np.clip(np.round(-low / scale[:, g].astype(np.float32)), 0, top)
    spread = scale[:, groups].astype(np.float32)
    q = np.clip(np.round(w / spread) + zero[:, groups], 0, top).astype(np.int64)
    dense = (q - zero[:, groups]).astype(np.float32) * spread
    return q, zero, scale, torch.from_numpy(dense)
