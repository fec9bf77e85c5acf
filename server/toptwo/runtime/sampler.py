"""Choosing the next tokens of a step.

Randomness is counter-based: the draw of a token is a function of (seed, position) alone, so that it
is the same whichever requests share the step, and after a preemption.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from toptwo.messages import Row, SamplingParams
from toptwo.runtime.batch import SlotTable
from toptwo.runtime.constraints import GrammarStates
from toptwo_kernels.ops import Ops, SamplingBatch

_DRAWS_AT_ONCE = 64  # positions


def sample_rows(
    logits_RV: Tensor, rows: list[Row], table: SlotTable, ops: Ops, grammars: GrammarStates | None = None
) -> Tensor:
    """The next token [R] of every row, whose logits are given in the same order and are left as they are."""
    params = [table.sampling[row.slot] for row in rows]
    ends = [row.start + row.num_tokens for row in rows]
    logits_RV = _restrict(logits_RV, rows, table, grammars)
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
    return ops.sample(logits_RV, batch)


def draw_uniform(seed: int, position: int) -> float:
    """The uniform in [0, 1) for the token at `position`: Philox4x64-10 (Salmon et al., SC'11)."""
    first, index = divmod(position, _DRAWS_AT_ONCE)
    return float(_draw_uniforms(seed, first * _DRAWS_AT_ONCE)[index])


@lru_cache(maxsize=1024)  # far more sequences than run at once by default
def _draw_uniforms(seed: int, start: int) -> npt.NDArray[np.float64]:
    """Those of the positions from `start` on: making a generator costs more than many draws."""
    generator = np.random.Philox(key=seed & (2**64 - 1), counter=start)
    # A position's number is the first of the four that its counter gives; its upper 53 bits become a double.
    words = generator.random_raw(4 * _DRAWS_AT_ONCE)[::4]
    uniforms: npt.NDArray[np.float64] = np.multiply(words >> np.uint64(11), 2.0**-53, dtype=np.float64)
    return uniforms


def _restrict(logits_RV: Tensor, rows: list[Row], table: SlotTable, grammars: GrammarStates | None) -> Tensor:
    """Logits with biases added, and with -inf for tokens that may not come yet or break a grammar."""
    changed = logits_RV
    for index, row in enumerate(rows):
        params = table.sampling[row.slot]
        num_generated = row.start + row.num_tokens - table.num_prompt_tokens[row.slot]
        too_early = table.stop_token_ids[row.slot] if num_generated < params.min_tokens else []
        has_grammar = grammars is not None and grammars.has(row.slot)
        if not (params.logit_bias or too_early or has_grammar):
            continue
        if changed is logits_RV:
            changed = logits_RV.float().clone()
        logits_V = changed[index]
        if params.logit_bias:
            bias = torch.tensor(list(params.logit_bias.values()), device=logits_V.device)
            logits_V[list(params.logit_bias)] += bias
        if too_early:
            logits_V[too_early] = -torch.inf
        if grammars is not None and has_grammar:
            logits_V[~grammars.allowed(row.slot)] = -torch.inf
    return changed


def _has_penalty(params: SamplingParams) -> bool:
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0)


def _tokens(table: SlotTable, slot: int, end: int, *, prompt: bool) -> Tensor:
    start = 0 if prompt else table.num_prompt_tokens[slot]
    return torch.from_numpy(table.tokens[slot, start:end])
