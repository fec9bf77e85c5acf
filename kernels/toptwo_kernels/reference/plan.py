"""How the rows of a step are grouped for attention: index arithmetic, made once for all layers.

Rows with the same number of queries share a group, so that all decoding rows of a step are one batched
product over contexts padded to the longest.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from toptwo_kernels.ops import StepBatch

MAX_GATHERED_TOKENS = 65_536  # bounds the memory of a group: context tokens gathered at once


@dataclass(frozen=True)
class Group:
    """G rows of Q queries each over contexts padded to L: who they are, and what they may see.

    seen_GQ: how many tokens of its context a query may see, itself included.
    """

    tokens_GQ: Tensor
    slots_GL: Tensor
    seen_GQ: Tensor


@dataclass(frozen=True)
class Plan:
    """A step's tokens, and how their rows are grouped."""

    batch: StepBatch
    groups: list[Group]


def plan_step(batch: StepBatch) -> object:
    """See `ops.Ops.plan_step`."""
    starts = batch.query_starts_R1.tolist()
    contexts = batch.context_lens_R.tolist()
    queries = [end - start for start, end in itertools.pairwise(starts)]
    # By query count, then context length: little padding, and groups are quick to cut.
    order = sorted(range(len(queries)), key=lambda row: (queries[row], contexts[row]))
    groups: list[Group] = []
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


def _plan_group(rows: list[int], batch: StepBatch) -> Group:
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
    seen_GQ = (contexts_G - num_queries + 1)[:, None] + queries_Q
    # Padding is invisible, but it is multiplied by its zero weight all the same: let it read the
    # row's own first token, never memory that may hold anything (0 * NaN is NaN).
    slots_GL = torch.where(context_L < contexts_G[:, None], slots_GL, slots_GL[:, :1])
    return Group(tokens_GQ, slots_GL, seen_GQ)
