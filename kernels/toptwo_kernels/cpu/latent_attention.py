"""Fused RoPE, cache write and attention over latent vectors."""

from __future__ import annotations

from torch import Tensor

from toptwo_kernels.cpu.native import DTYPES
from toptwo_kernels.cpu.tape import Tape
from toptwo_kernels.ops import KVCache, LatentSpec, Rope


def latent_attention(
    tape: Tape, q_TX: Tensor, kv_TX: Tensor, rope: Rope, kv: KVCache, plan: object, spec: LatentSpec
) -> Tensor:
    """See `ops.Ops.latent_attention`."""
    shape = spec.shape
    if shape.latent_dim % 8 or shape.rope_dim % 8:
        given = f"{shape.latent_dim} and {shape.rope_dim}"
        raise ValueError(f"the CPU backend needs latent and rope dimensions that 8 divides, not {given}")
    out = tape.empty(q_TX, shape.num_heads * shape.latent_dim)
    (cache,) = kv
    angles = rope.cos_LD, rope.sin_LD, rope.cos_LD.shape[1]
    sizes = shape.num_heads, shape.latent_dim, shape.rope_dim, spec.scale
    tape.emit("latent_attention", q_TX, kv_TX, *angles, cache, DTYPES[cache.dtype], *sizes, out, step=plan)
    return out
