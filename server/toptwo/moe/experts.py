"""The experts: E gated feed-forward networks with stacked weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from toptwo_kernels.ops import Activation, Ops, Routing


@dataclass(frozen=True)
class Experts:
    """gate_up_EFH is [E, 2F, H] with the gate rows first, down_EHF is [E, H, F]."""

    gate_up_EFH: Tensor
    down_EHF: Tensor
    activation: Activation
    ops: Ops

    def __call__(self, x_TH: Tensor, routing: Routing) -> Tensor:
        """Weighted sum of each token's chosen experts, [T, H]."""
        return self.ops.experts(x_TH, routing, self.gate_up_EFH, self.down_EHF, self.activation)
