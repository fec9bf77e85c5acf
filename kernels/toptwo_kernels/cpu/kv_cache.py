"""The paged cache: room for it, and how it lies in memory.

Keys lie transposed within a block, [B, M, D, 16], so that a vector holds the same dimension of eight
tokens; values are [B, M, 16, D]. Latent vectors and the keys behind them lie as keys do, [B, 1, C + R, 16].
"""

from __future__ import annotations

import torch

from toptwo_kernels.cpu.native import KV_BLOCK
from toptwo_kernels.cpu.tape import Tape
from toptwo_kernels.ops import HeadShape, KVCache, KVShape


def allocate_kv(tape: Tape, num_blocks: int, block_size: int, shape: KVShape, dtype: torch.dtype) -> KVCache:
    """See `ops.Ops.allocate_kv`. Uninitialised: the system hands out pages as blocks are first used."""
    if block_size != KV_BLOCK:
        raise ValueError(f"the CPU backend has KV blocks of {KV_BLOCK} tokens, not {block_size}")
    if not isinstance(shape, HeadShape):
        return (torch.empty(num_blocks, 1, shape.kv_size, KV_BLOCK, dtype=dtype),)
    heads = (num_blocks, shape.num_kv_heads)
    k = torch.empty(*heads, shape.head_dim, KV_BLOCK, dtype=dtype)
    return k, torch.empty(*heads, KV_BLOCK, shape.head_dim, dtype=dtype)
