"""Arithmetic that quantised formats share: small integers out of larger ones, and grids back to numbers.

Knows tensors; which format stores what in which order is the business of the formats' own modules.
"""

from __future__ import annotations

import torch
from torch import Tensor


def split_nibbles(packed: Tensor) -> Tensor:
    """uint8 [..., N] to uint8 [..., 2N]: of each byte the low four bits, then the high ones."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def unpack(words: Tensor, bits: int) -> Tensor:
    """int32 [..., N] to uint8 [..., N * 32 / bits], the lowest bits of each word first; bits: 4 or 8."""
    octets = words.contiguous().view(torch.uint8)  # of a little-endian machine, like the file
    return split_nibbles(octets) if bits == 4 else octets


def scale_blocks(weight: Tensor, scale: Tensor, zero: Tensor | None, block: tuple[int, int]) -> Tensor:
    """(weight - zero) * scale as float32 [..., R, C], where blocks of rows and columns share zero and scale.

    weight: [..., R, C] of any number format. scale and zero: [..., ceil(R / block[0]), ceil(C / block[1])];
    zero None is 0. float32 because it holds products of small integers or eight-bit floats and half-precision
    scales exactly, which neither of the halves does.
    """
    numbers = torch.empty(weight.shape, dtype=torch.float32).copy_(weight)
    rows, columns = numbers.shape[-2:]
    tall, wide = block
    full = columns // wide  # blocks; the last one may be narrower
    scale = scale.float().repeat_interleave(tall, -2)[..., :rows, :, None]
    zero = None if zero is None else zero.float().repeat_interleave(tall, -2)[..., :rows, :, None]
    parts = [(numbers[..., : full * wide].view(*numbers.shape[:-1], full, wide), slice(0, full))]
    if columns % wide:
        parts.append((numbers[..., None, full * wide :], slice(full, None)))
    for part, blocks in parts:  # in place: these are views of `numbers`
        if zero is not None:
            part.sub_(zero[..., blocks, :])
        part.mul_(scale[..., blocks, :])
    return numbers


def scale_groups(weight: Tensor, scale: Tensor, zero: Tensor, size: int, g_idx: Tensor | None) -> Tensor:
    """As `scale_blocks` for [R, C], where groups of `size` columns share zero and scale, or those with the
    same g_idx [C]. Raises ValueError for a group that is not there.
    """
    in_order = torch.arange(weight.shape[-1]) // size
    # Where the order of columns was not changed, some exporters write zeros.
    if g_idx is None or not g_idx.any() or torch.equal(g_idx, in_order.to(g_idx.dtype)):
        return scale_blocks(weight, scale, zero, (1, size))
    if g_idx.min() < 0 or g_idx.max() >= scale.shape[-1]:
        raise ValueError(
            f"g_idx names groups {int(g_idx.min())} to {int(g_idx.max())}, and there are {scale.shape[-1]}"
        )
    numbers = weight.float().sub_(zero.float().index_select(-1, g_idx))
    return numbers.mul_(scale.float().index_select(-1, g_idx))
