"""Attention over the paged KV cache: gather each row's context, pad, one batched product per group."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from toptwo_kernels.ops import AttentionSpec, KVCache, Rope
from toptwo_kernels.reference.kv_cache import write_kv
from toptwo_kernels.reference.plan import Group, Plan
from toptwo_kernels.reference.rope import apply_rope

MAX_SCORES = 1 << 26  # bounds the memory of a group: attention scores held at once


def attention(qkv_TX: Tensor, rope: Rope, kv: KVCache, plan: object, spec: AttentionSpec) -> Tensor:
    """See `ops.Ops.attention`."""
    step, shape = cast(Plan, plan), spec.shape
    counts = [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads]
    heads_TXD = qkv_TX.view(len(qkv_TX), -1, shape.head_dim)
    q_TND, k_TMD, v_TMD = torch.split(heads_TXD, counts, dim=1)
    q_TND = apply_rope(q_TND, step.batch.positions_T, rope)
    k_TMD = apply_rope(k_TMD, step.batch.positions_T, rope)
    write_kv((k_TMD, v_TMD), kv, step.batch.slots_T)
    out_TND = torch.empty_like(q_TND)
    for group in step.groups:
        k_GLMD, v_GLMD = (cache.flatten(0, 1)[group.slots_GL].to(qkv_TX.dtype) for cache in kv)
        attend_group(q_TND, k_GLMD, v_GLMD, group, spec, out_TND)
    return out_TND.flatten(1)


def attend_group(
    q_TND: Tensor, k_GLMD: Tensor, v_GLMD: Tensor, group: Group, spec: AttentionSpec, out_TND: Tensor
) -> None:
    """Fill in the results of the group's tokens; as many queries at once as memory is meant for."""
    num_rows, num_queries = group.tokens_GQ.shape
    queries_at_once = max(1, MAX_SCORES // (num_rows * q_TND.shape[1] * k_GLMD.shape[1]))
    for first in range(0, num_queries, queries_at_once):
        chosen = slice(first, first + queries_at_once)
        tokens_GQ = group.tokens_GQ[:, chosen]
        visible_GQL = _visible(group.seen_GQ[:, chosen], k_GLMD.shape[1], spec.window)
        out_TND[tokens_GQ] = _attend(q_TND[tokens_GQ], k_GLMD, v_GLMD, visible_GQL, spec)


def _visible(seen_GQ: Tensor, context: int, window: int | None) -> Tensor:
    """Which of the context's tokens each query may see."""
    at_L = torch.arange(context, device=seen_GQ.device)
    visible_GQL = at_L < seen_GQ[..., None]
    return visible_GQL if window is None else visible_GQL & (at_L >= seen_GQ[..., None] - window)


def _attend(
    q_GQND: Tensor, k_GLMD: Tensor, v_GLMD: Tensor, visible_GQL: Tensor, spec: AttentionSpec
) -> Tensor:
    groups, num_queries, num_heads, head_dim = q_GQND.shape
    num_kv_heads = k_GLMD.shape[2]
    # The heads that share a KV head become extra queries of it: PQ = (N / M) * Q.
    per_kv = num_heads // num_kv_heads
    q = q_GQND.reshape(groups, num_queries, num_kv_heads, per_kv, head_dim).permute(0, 2, 3, 1, 4)
    q_GMXD = q.reshape(groups, num_kv_heads, per_kv * num_queries, head_dim)
    scores = (q_GMXD @ k_GLMD.permute(0, 2, 3, 1)).float() * spec.scale
    if spec.soft_cap is not None:
        scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
    scores = scores.view(groups, num_kv_heads, per_kv, num_queries, -1)
    scores = scores.masked_fill(~visible_GQL[:, None, None], float("-inf"))
    probs = _softmax(scores, spec.sinks_N).to(v_GLMD.dtype).flatten(2, 3)
    out = (probs @ v_GLMD.permute(0, 2, 1, 3)).view(groups, num_kv_heads, per_kv, num_queries, -1)
    return out.permute(0, 3, 1, 2, 4).reshape(groups, num_queries, num_heads, -1)


def _softmax(scores_GMPQL: Tensor, sinks_N: Tensor | None) -> Tensor:
    """Softmax over the context and, where there is one, the sink of the head."""
    if sinks_N is None:
        return scores_GMPQL.softmax(-1)
    groups, num_kv_heads, per_kv, num_queries, _ = scores_GMPQL.shape
    sinks = sinks_N.float().view(1, num_kv_heads, per_kv, 1, 1).expand(groups, -1, -1, num_queries, -1)
    return torch.cat((scores_GMPQL, sinks), dim=-1).softmax(-1)[..., :-1]
