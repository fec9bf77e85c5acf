"""The experts: E gated feed-forward networks with stacked weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from toptwo_kernels.ops import Activation, Matrix, Ops, Routing


@dataclass(frozen=True)
class Experts:
    """gate_up is a paired stack [E, 2F, H] with the gate rows first, down a stack [E, H, F]."""

    gate_up: Matrix
    down: Matrix
    activation: Activation
    ops: Ops

    def __call__(self, x_TH: Tensor, routing: Routing) -> Tensor:
        """Weighted sum of each token's chosen experts, [T, H]."""
        return self.ops.experts(x_TH, routing, self.gate_up, self.down, self.activation)
