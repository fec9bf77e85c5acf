"""Token embeddings."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from toptwo.layers.context import StepContext
from toptwo_kernels.ops import Matrix, Ops


@dataclass(frozen=True)
class Embedding:
    """Row lookup in the [V, H] table."""

    table: Matrix
    ops: Ops

    def __call__(self, step: StepContext) -> Tensor:
        return self.ops.embed(self.table, step.plan)


@dataclass(frozen=True)
class ScaledEmbedding:
    """Row lookup, times a factor."""

    table: Matrix
    factor: float
    ops: Ops

    def __call__(self, step: StepContext) -> Tensor:
        return self.ops.scale(self.ops.embed(self.table, step.plan), self.factor)
