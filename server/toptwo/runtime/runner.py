"""Runs a StepPlan: the runtime's side of waist 2.

Everything a step needs from the past is here (KV cache, token and block tables); the plan brings
only what is new. Knows nothing of requests, queues or clients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

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


class Fetched:
    """Numbers on their way from the GPU, or numbers that are here."""

    def __init__(self, numbers: Tensor) -> None:
        self._here = numbers
        self._arrived: torch.cuda.Event | None = None
        if numbers.is_cuda:
            self._here = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._here.copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.current_stream().record_event()

    def tolist(self) -> list[int]:
        """The numbers; waits for them."""
        if self._arrived:
            self._arrived.synchronize()
        numbers: list[int] = self._here.tolist()
        return numbers


class Runner:
    """The step of one model, and the slots of its running sequences. counts: see `moe.counts`.

    on_gpu: steps run by themselves once they are launched.
    """

    def __init__(
        self,
        step: Step,
        table: SlotTable,
        ops: Ops,
        grammars: GrammarStates,
        counts: Mapping[int, Tensor],
        *,
        on_gpu: bool = False,
    ) -> None:
        self._step = step
        self._table = table
        self._ops = ops
        self.grammars = grammars
        self._counts = counts
        self._on_gpu = on_gpu

    def execute(self, plan: StepPlan) -> StepResult:
        """Compute the plan's rows, store their KV, draw the next tokens."""
        return self.launch(plan)()

    @property
    def overlaps(self) -> bool:
        """See `engine.Runner.overlaps`."""
        return self._on_gpu

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Callable[[], StepResult]:
        """See `engine.Runner.launch`."""
        logits_SV, batch = self.compute_logits(plan)
        sampling = [s for s in batch.selections if s.row.sample]
        rows, tokens_R = [s.row for s in sampling], torch.empty(0, dtype=torch.int64)
        logits_RV = logits_SV
        if sampling:
            if len(sampling) < len(logits_SV):
                logits_RV = logits_SV[[s.last for s in sampling]]
            tokens_R = sample_rows(logits_RV, rows, self._table, self._ops, self.grammars)
        # Logits live until the next step: what is said of them is said now, if anything is.
        logprobs = self._describe_tokens(logits_RV, sampling, tokens_R)
        scores = {s.index: self._score(logits_SV, s) for s in batch.selections if s.row.score}
        fetched = Fetched(tokens_R)
        draws = [self._table.begin_draw(row.slot, tokens_R, at) for at, row in enumerate(rows)]

        def finish() -> StepResult:
            token_ids = [-1] * len(plan.rows)
            for selection, draw, token in zip(sampling, draws, fetched.tolist(), strict=True):
                token_ids[selection.index] = token
                if self._table.end_draw(selection.row.slot, draw) and token >= 0:
                    self._remember(selection.row, token)
            return StepResult(plan.step, token_ids, logprobs, scores)

        return finish

    @torch.inference_mode()
    def compute_logits(self, plan: StepPlan) -> tuple[Tensor, Batch]:
        """Logits [S, V] of the selected tokens, valid until the next step, and the batch they came from."""
        for new in plan.admitted:
            self._table.admit(new)
            self.grammars.admit(new)
        batch = build_batch(plan, self._table)
        return self._step(batch.tokens), batch

    def expert_tokens(self) -> dict[int, list[int]]:
        """By layer, how many tokens came to each expert so far."""
        return {layer: counts_E.tolist() for layer, counts_E in self._counts.items()}

    def _describe_tokens(
        self, logits_RV: Tensor, sampling: list[Selection], tokens_R: Tensor
    ) -> dict[int, TokenLogprobs]:
        """By row of the plan, the reports on drawn tokens that were asked for."""
        logprobs: dict[int, TokenLogprobs] = {}
        for at, selection in enumerate(sampling):
            wanted = self._table.logprobs[selection.row.slot].output
            if wanted is not None and (token := int(tokens_R[at])) >= 0:
                of_row = logits_RV[at : at + 1].log_softmax(-1)
                logprobs[selection.index] = describe(of_row, [token], wanted)[0]
        return logprobs

    def _remember(self, row: Row, token: int) -> None:
        end = row.start + row.num_tokens
        if end < self._table.tokens.shape[1]:  # a full context takes no further token
            self._table.tokens[row.slot, end] = token
        self.grammars.advance(row.slot, token)

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
