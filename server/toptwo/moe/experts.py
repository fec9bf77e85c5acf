"""The experts: E gated feed-forward networks with stacked weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from toptwo_kernels.ops import ExpertWeights, Ops, Routing


@dataclass(frozen=True)
class Experts:
    """All experts of a layer."""

    weights: ExpertWeights
    ops: Ops

    def __call__(self, x_TH: Tensor, routing: Routing) -> Tensor:
        """Weighted sum of each token's chosen experts, [T, H]."""
        return self.ops.experts(x_TH, routing, self.weights)
