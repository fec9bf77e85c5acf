"""Runs a StepPlan: the runtime's side of waist 2.

Everything a step needs from the past is here (KV cache, token and block tables); the plan brings
only what is new. Knows nothing of requests, queues or clients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from toptwo.messages import StepPlan, StepResult
from toptwo.runtime.batch import Batch, SlotTable, build_batch
from toptwo.runtime.graphs import Step
from toptwo.runtime.sampler import sample_rows
from toptwo_kernels.ops import Ops


class Runner:
    """The step of one model, and the slots of its running sequences."""

    def __init__(self, step: Step, table: SlotTable, ops: Ops) -> None:
        self._step = step
        self._table = table
        self._ops = ops

    def execute(self, plan: StepPlan) -> StepResult:
        """Compute the plan's rows, store their KV, draw the next tokens."""
        logits_RV, batch = self.compute_logits(plan)
        drawn = iter(self._sample(logits_RV, batch))
        return StepResult(plan.step, [next(drawn) if row.sample else -1 for row in plan.rows])

    @torch.inference_mode()
    def compute_logits(self, plan: StepPlan) -> tuple[Tensor, Batch]:
        """Logits [R, V] of the rows that sample, valid until the next step, and the batch they came from."""
        for new in plan.admitted:
            self._table.admit(new)
        batch = build_batch(plan, self._table)
        return self._step(batch.tokens), batch

    @torch.inference_mode()
    def _sample(self, logits_RV: Tensor, batch: Batch) -> list[int]:
        if not batch.sampling_rows:
            return []
        tokens = sample_rows(logits_RV, batch.sampling_rows, self._table, self._ops)
        for row, token in zip(batch.sampling_rows, tokens, strict=True):
            end = row.start + row.num_tokens
            if token >= 0 and end < self._table.tokens.shape[1]:  # a full context takes no further token
                self._table.tokens[row.slot, end] = token
        return tokens
