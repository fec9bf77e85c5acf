"""One step of a model as one function: computed operation by operation, or recorded once and replayed.

A backend that can record (see `toptwo_kernels.cpu.tape`) is given the model's forward pass once, at
load; from then on a step costs Python a single call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from toptwo.layers.context import StepContext
from toptwo.models.checkpoint import CausalLM
from toptwo_kernels.ops import KVCache, Ops, StepBatch

Step = Callable[[StepBatch], Tensor]
"""From the tokens of a step to the float32 logits [S, V] of the selected ones."""


def prepare_step(model: CausalLM, kv_cache: list[KVCache], ops: Ops, max_tokens: int) -> Step:
    """The step of `model` for at most `max_tokens` tokens at a time."""

    def forward(plan: object) -> Tensor:
        hidden_TH = model.forward(StepContext(plan, kv_cache))
        return model.logits(ops.select(hidden_TH, plan))

    record: Any = getattr(ops, "record", None)
    if record:
        step: Step = record(forward, max_tokens)
        return step
    return lambda batch: forward(ops.plan_step(batch)).float()
