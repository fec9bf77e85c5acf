"""The paged cache: room for it, and how tokens are stored."""

from __future__ import annotations

import torch
from torch import Tensor

from toptwo_kernels.ops import HeadShape, KVCache, KVShape


def allocate_kv(num_blocks: int, block_size: int, shape: KVShape, dtype: torch.dtype) -> KVCache:
    """See `ops.Ops.allocate_kv`: keys and values [B, S, M, D], or latents with their keys [B, S, 1, C + R].

    Left uninitialised, so that the system hands out pages as blocks are first used.
    """
    if isinstance(shape, HeadShape):
        size = num_blocks, block_size, shape.num_kv_heads, shape.head_dim
        return torch.empty(size, dtype=dtype), torch.empty(size, dtype=dtype)
    return (torch.empty(num_blocks, block_size, 1, shape.kv_size, dtype=dtype),)


def write_kv(parts: tuple[Tensor, ...], kv: KVCache, slots_T: Tensor) -> None:
    """Store one part [T, M, D] in each tensor of the cache; a slot is block * block_size + offset."""
    for cache, values in zip(kv, parts, strict=True):
        cache.flatten(0, 1).index_copy_(0, slots_T, values.to(cache.dtype))
