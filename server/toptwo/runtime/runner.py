"""Runs a StepPlan: the runtime's side of waist 2.

Everything a step needs from the past is here (KV cache, token and block tables); the plan brings
only what is new. Knows nothing of requests, queues or clients.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from toptwo.messages import Row, StepPlan, StepResult, TokenLogprobs
from toptwo.runtime.batch import Batch, Selection, SlotTable, build_batch
from toptwo.runtime.constraints import GrammarStates
from toptwo.runtime.graphs import Step
from toptwo.runtime.logprobs import describe
from toptwo.runtime.sampler import sample_rows
from toptwo_kernels.ops import Ops

_POSITIONS_AT_ONCE = 32  # scored together: each is a row as long as the vocabulary


class Runner:
    """The step of one model, and the slots of its running sequences. counts: see `moe.counts`."""

    def __init__(
        self,
        step: Step,
        table: SlotTable,
        ops: Ops,
        grammars: GrammarStates,
        counts: Mapping[int, Tensor],
    ) -> None:
        self._step = step
        self._table = table
        self._ops = ops
        self._grammars = grammars
        self._counts = counts

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Compute the plan's rows, store their KV, draw the next tokens."""
        logits_SV, batch = self.compute_logits(plan)
        token_ids = [-1] * len(plan.rows)
        logprobs: dict[int, TokenLogprobs] = {}
        sampling = [s for s in batch.selections if s.row.sample]
        if sampling:
            logits_RV = (
                logits_SV if len(sampling) == len(logits_SV) else logits_SV[[s.last for s in sampling]]
            )
            rows = [s.row for s in sampling]
            tokens = sample_rows(logits_RV, rows, self._table, self._ops, self._grammars)
            for at, (selection, token) in enumerate(zip(sampling, tokens, strict=True)):
                token_ids[selection.index] = token
                wanted = self._table.logprobs[selection.row.slot].output
                if token >= 0 and wanted is not None:
                    of_row = logits_RV[at : at + 1].log_softmax(-1)
                    logprobs[selection.index] = describe(of_row, [token], wanted)[0]
                if token >= 0:
                    self._remember(selection.row, token)
        scores = {s.index: self._score(logits_SV, s) for s in batch.selections if s.row.score}
        return StepResult(plan.step, token_ids, logprobs, scores)

    @torch.inference_mode()
    def compute_logits(self, plan: StepPlan) -> tuple[Tensor, Batch]:
        """Logits [S, V] of the selected tokens, valid until the next step, and the batch they came from."""
        for new in plan.admitted:
            self._table.admit(new)
            self._grammars.admit(new)
        batch = build_batch(plan, self._table)
        return self._step(batch.tokens), batch

    def expert_tokens(self) -> dict[int, list[int]]:
        """By layer, how many tokens came to each expert so far."""
        return {layer: counts_E.tolist() for layer, counts_E in self._counts.items()}

    def _remember(self, row: Row, token: int) -> None:
        end = row.start + row.num_tokens
        if end < self._table.tokens.shape[1]:  # a full context takes no further token
            self._table.tokens[row.slot, end] = token
        self._grammars.advance(row.slot, token)

    def _score(self, logits_SV: Tensor, selection: Selection) -> list[TokenLogprobs]:
        """The prompt tokens behind each of the row's positions."""
        row, slot = selection.row, selection.row.slot
        end = min(row.start + row.num_tokens + 1, self._table.num_prompt_tokens[slot])
        following = self._table.tokens[slot, row.start + 1 : end].tolist()
        wanted = self._table.logprobs[slot].prompt or 0
        scores: list[TokenLogprobs] = []
        for first in range(0, len(following), _POSITIONS_AT_ONCE):
            part = following[first : first + _POSITIONS_AT_ONCE]
            at = selection.first + first
            scores += describe(logits_SV[at : at + len(part)].log_softmax(-1), part, wanted)
        return scores
