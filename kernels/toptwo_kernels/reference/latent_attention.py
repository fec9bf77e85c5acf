"""Attention over latent vectors: one KV head for all query heads, whose values are part of its keys."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from toptwo_kernels.ops import AttentionSpec, HeadShape, KVCache, LatentSpec, Rope
from toptwo_kernels.reference.attention import attend_group
from toptwo_kernels.reference.kv_cache import write_kv
from toptwo_kernels.reference.plan import Plan
from toptwo_kernels.reference.rope import apply_rope


def latent_attention(
    q_TX: Tensor, kv_TX: Tensor, rope: Rope, kv: KVCache, plan: object, spec: LatentSpec
) -> Tensor:
    """See `ops.Ops.latent_attention`."""
    step, shape = cast(Plan, plan), spec.shape
    q_TND = _turn_end(
        q_TX.view(len(q_TX), shape.num_heads, -1), step.batch.positions_T, rope, shape.latent_dim
    )
    kv_T1D = _turn_end(kv_TX.unsqueeze(1), step.batch.positions_T, rope, shape.latent_dim)
    write_kv((kv_T1D,), kv, step.batch.slots_T)
    heads = AttentionSpec(HeadShape(shape.num_heads, 1, shape.kv_size), spec.scale)
    out_TNC = q_TND.new_empty(len(q_TX), shape.num_heads, shape.latent_dim)
    for group in step.groups:
        k_GL1D = kv[0].flatten(0, 1)[group.slots_GL].to(q_TX.dtype)
        attend_group(q_TND, k_GL1D, k_GL1D[..., : shape.latent_dim], group, heads, out_TNC)
    return out_TNC.flatten(1)


def _turn_end(x_TND: Tensor, positions_T: Tensor, rope: Rope, start: int) -> Tensor:
    """x with the dimensions from `start` on turned."""
    turned = apply_rope(x_TND[..., start:], positions_T, rope)
    return torch.cat((x_TND[..., :start], turned), dim=-1)
