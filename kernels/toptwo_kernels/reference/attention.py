"""Attention over the paged KV cache: gather each row's context, pad, one batched product per group.

Rows with the same number of queries share a group, so that all decoding rows of a step are one
batched product. The plan of a step is index arithmetic only and is made once for all layers.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from toptwo_kernels.ops import HeadShape, KVCache, Rope, StepBatch
from toptwo_kernels.reference.rope import apply_rope

# Both bound the memory of a group: context tokens gathered at once, and attention scores held at once.
MAX_GATHERED_TOKENS = 65_536
MAX_SCORES = 1 << 26


@dataclass(frozen=True)
class _Group:
    """G rows of Q queries each over contexts padded to L: who they are and what they may see."""

    tokens_GQ: Tensor
    slots_GL: Tensor
    visible_GQL: Tensor


@dataclass(frozen=True)
class Plan:
    """A step's tokens, and how their rows are grouped."""

    batch: StepBatch
    groups: list[_Group]


def allocate_kv(num_blocks: int, block_size: int, shape: HeadShape, dtype: torch.dtype) -> KVCache:
    """See `ops.Ops.allocate_kv`; both are [B, S, M, D].

    Left uninitialised, so that the system hands out pages as blocks are first used.
    """
    size = (num_blocks, block_size, shape.num_kv_heads, shape.head_dim)
    return torch.empty(size, dtype=dtype), torch.empty(size, dtype=dtype)


def attention(
    qkv_TX: Tensor, rope: Rope, kv: KVCache, plan: object, shape: HeadShape, scale: float
) -> Tensor:
    """See `ops.Ops.attention`."""
    step = cast(Plan, plan)
    counts = [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads]
    heads_TXD = qkv_TX.view(len(qkv_TX), -1, shape.head_dim)
    q_TND, k_TMD, v_TMD = torch.split(heads_TXD, counts, dim=1)
    q_TND = apply_rope(q_TND, step.batch.positions_T, rope)
    k_TMD = apply_rope(k_TMD, step.batch.positions_T, rope)
    write_kv(k_TMD, v_TMD, kv, step.batch.slots_T)
    return attend(q_TND, kv, step.groups, scale).flatten(1)


def write_kv(k_TMD: Tensor, v_TMD: Tensor, kv: KVCache, slots_T: Tensor) -> None:
    """Store keys and values; a slot is block * block_size + offset."""
    for cache, values in zip(kv, (k_TMD, v_TMD), strict=True):
        cache.flatten(0, 1).index_copy_(0, slots_T, values.to(cache.dtype))


def plan_step(batch: StepBatch) -> object:
    """See `ops.Ops.plan_step`."""
    starts = batch.query_starts_R1.tolist()
    contexts = batch.context_lens_R.tolist()
    queries = [end - start for start, end in itertools.pairwise(starts)]
    # By query count, then context length: little padding, and groups are quick to cut.
    order = sorted(range(len(queries)), key=lambda row: (queries[row], contexts[row]))
    groups: list[_Group] = []
    for _, same in itertools.groupby(order, key=lambda row: queries[row]):
        groups += [_plan_group(rows, batch) for rows in _cut(list(same), contexts)]
    return Plan(batch, groups)


def _cut(rows: list[int], contexts: list[int]) -> list[list[int]]:
    """Split rows, sorted by context length, so that no group gathers too many padded tokens."""
    parts: list[list[int]] = [[]]
    for row in rows:
        if parts[-1] and (len(parts[-1]) + 1) * contexts[row] > MAX_GATHERED_TOKENS:
            parts.append([])
        parts[-1].append(row)
    return parts


def _plan_group(rows: list[int], batch: StepBatch) -> _Group:
    index = torch.tensor(rows, device=batch.context_lens_R.device)
    contexts_G = batch.context_lens_R[index]
    starts_G = batch.query_starts_R1[index]
    num_queries = int(batch.query_starts_R1[rows[0] + 1] - batch.query_starts_R1[rows[0]])
    queries_Q = torch.arange(num_queries, device=index.device)
    context_L = torch.arange(int(contexts_G.max()), device=index.device)

    tokens_GQ = starts_G[:, None] + queries_Q
    blocks_GL = batch.block_tables_RB[index][:, context_L // batch.block_size]
    slots_GL = blocks_GL * batch.block_size + context_L % batch.block_size
    # The last query sees the whole context, the one before it one token less, and so on.
    last_seen_GQ = (contexts_G - num_queries)[:, None] + queries_Q
    visible_GQL = context_L <= last_seen_GQ[..., None]
    # Padding is invisible, but it is multiplied by its zero weight all the same: let it read the
    # row's own first token, never memory that may hold anything (0 * NaN is NaN).
    slots_GL = torch.where(context_L < contexts_G[:, None], slots_GL, slots_GL[:, :1])
    return _Group(tokens_GQ, slots_GL, visible_GQL)


def attend(q_TND: Tensor, kv: KVCache, groups: list[_Group], scale: float) -> Tensor:
    """Attention of already turned queries over the cache; returns [T, N, D]."""
    k_cache, v_cache = kv
    out_TND = torch.empty_like(q_TND)
    for group in groups:
        q_GQND = q_TND[group.tokens_GQ]
        k_GLMD = k_cache.flatten(0, 1)[group.slots_GL].to(q_TND.dtype)
        v_GLMD = v_cache.flatten(0, 1)[group.slots_GL].to(q_TND.dtype)
        num_rows, num_queries, num_heads, _ = q_GQND.shape
        queries_at_once = max(1, MAX_SCORES // (num_rows * num_heads * k_GLMD.shape[1]))
        for first in range(0, num_queries, queries_at_once):
            chosen = slice(first, first + queries_at_once)
            out = _attend(q_GQND[:, chosen], k_GLMD, v_GLMD, group.visible_GQL[:, chosen], scale)
            out_TND[group.tokens_GQ[:, chosen]] = out
    return out_TND


def _attend(q_GQND: Tensor, k_GLMD: Tensor, v_GLMD: Tensor, visible_GQL: Tensor, scale: float) -> Tensor:
    groups, num_queries, num_heads, head_dim = q_GQND.shape
    num_kv_heads = k_GLMD.shape[2]
    # The heads that share a KV head become extra queries of it: PQ = (N / M) * Q.
    per_kv = num_heads // num_kv_heads
    q = q_GQND.reshape(groups, num_queries, num_kv_heads, per_kv, head_dim).permute(0, 2, 3, 1, 4)
    q_GMXD = q.reshape(groups, num_kv_heads, per_kv * num_queries, head_dim)
    scores = (q_GMXD @ k_GLMD.permute(0, 2, 3, 1)).float() * scale
    scores = scores.view(groups, num_kv_heads, per_kv, num_queries, -1)
    scores = scores.masked_fill(~visible_GQL[:, None, None], float("-inf"))
    probs = scores.softmax(-1).to(v_GLMD.dtype).flatten(2, 3)
    out = (probs @ v_GLMD.permute(0, 2, 1, 3)).view(groups, num_kv_heads, per_kv, num_queries, head_dim)
    return out.permute(0, 3, 1, 2, 4).reshape(groups, num_queries, num_heads, head_dim)
