"""Choosing the next tokens of a step.

Randomness is counter-based: the draw of a token is a function of (seed, position) alone, so that it
is the same whichever requests share the step, and after a preemption.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from toptwo.messages import Row, SamplingParams
from toptwo.runtime.batch import SlotTable
from toptwo_kernels.ops import Ops, SamplingBatch


def sample_rows(logits_RV: Tensor, rows: list[Row], table: SlotTable, ops: Ops) -> list[int]:
    """The next token of every row, whose logits are given in the same order."""
    params = [table.sampling[row.slot] for row in rows]
    ends = [row.start + row.num_tokens for row in rows]
    penalized = [index for index, p in enumerate(params) if _has_penalty(p)]
    uniforms = [
        draw_uniform(p.seed, end) if p.temperature > 0 else 0.0 for p, end in zip(params, ends, strict=True)
    ]
    filters = [(p.temperature, p.top_k, p.top_p, p.min_p, u) for p, u in zip(params, uniforms, strict=True)]
    batch = SamplingBatch(
        filters_R5=torch.tensor(filters, dtype=torch.float64),
        penalty_rows=penalized,
        presence=[params[i].presence_penalty for i in penalized],
        frequency=[params[i].frequency_penalty for i in penalized],
        repetition=[params[i].repetition_penalty for i in penalized],
        generated_tokens=[_tokens(table, rows[i].slot, ends[i], prompt=False) for i in penalized],
        context_tokens=[_tokens(table, rows[i].slot, ends[i], prompt=True) for i in penalized],
    )
    ids: list[int] = ops.sample(logits_RV, batch).tolist()
    return ids


def draw_uniform(seed: int, position: int) -> float:
    """The uniform in [0, 1) for the token at `position`: Philox4x64-10 (Salmon et al., SC'11)."""
    generator = np.random.Philox(key=seed & (2**64 - 1), counter=position)
    return float(np.random.Generator(generator).random())


def _has_penalty(params: SamplingParams) -> bool:
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0)


def _tokens(table: SlotTable, slot: int, end: int, *, prompt: bool) -> Tensor:
    start = 0 if prompt else table.num_prompt_tokens[slot]
    return torch.from_numpy(table.tokens[slot, start:end])
