"""Fused RoPE, KV write and attention over the paged cache.

Keys lie transposed within a block, [B, M, D, 16], so that a vector holds the same dimension of eight
tokens; values are [B, M, 16, D].
"""

from __future__ import annotations

import torch
from torch import Tensor

from toptwo_kernels.cpu.native import DTYPES, KV_BLOCK
from toptwo_kernels.cpu.tape import StepArrays, Tape
from toptwo_kernels.ops import HeadShape, KVCache, Rope, StepBatch


def allocate_kv(
    tape: Tape, num_blocks: int, block_size: int, shape: HeadShape, dtype: torch.dtype
) -> KVCache:
    """See `ops.Ops.allocate_kv`. Uninitialised: the system hands out pages as blocks are first used."""
    if block_size != KV_BLOCK:
        raise ValueError(f"the CPU backend has KV blocks of {KV_BLOCK} tokens, not {block_size}")
    heads = (num_blocks, shape.num_kv_heads)
    k = torch.empty(*heads, shape.head_dim, KV_BLOCK, dtype=dtype)
    return k, torch.empty(*heads, KV_BLOCK, shape.head_dim, dtype=dtype)


def plan_step(tape: Tape, batch: StepBatch) -> object:
    """See `ops.Ops.plan_step`."""
    return StepArrays(batch)


def attention(
    tape: Tape, qkv_TX: Tensor, rope: Rope, kv: KVCache, plan: object, shape: HeadShape, scale: float
) -> Tensor:
    """See `ops.Ops.attention`."""
    if shape.head_dim % 8:
        raise ValueError(f"the CPU backend needs a head dimension that 8 divides, not {shape.head_dim}")
    out = tape.empty(qkv_TX, shape.num_heads * shape.head_dim)
    k, v = kv
    heads = shape.num_heads, shape.num_kv_heads, shape.head_dim
    tape.emit(
        "attention", qkv_TX, rope.cos_LD, rope.sin_LD, k, v, DTYPES[k.dtype], *heads, scale, out, step=plan
    )
    return out
