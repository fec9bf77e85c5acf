"""Shared experts: what every token visits besides the experts it chose (arXiv 2401.06066)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from toptwo.moe.experts import Experts
from toptwo.moe.layer import MoELayer
from toptwo.moe.router import Router
from toptwo_kernels.ops import Ops


@dataclass(frozen=True)
class SharedMoELayer:
    """The chosen experts' output plus that of the shared ones."""

    moe: MoELayer
    shared: Callable[[Tensor], Tensor]
    ops: Ops

    def __call__(self, x_TH: Tensor) -> Tensor:
        return self.ops.add(self.moe(x_TH), self.shared(x_TH))


@dataclass(frozen=True)
class GatedExpert:
    """A single expert whose weight is its own sigmoid gate (Qwen2-MoE): a router with nothing to choose."""

    gate: Router
    expert: Experts

    def __call__(self, x_TH: Tensor) -> Tensor:
        return self.expert(x_TH, self.gate(x_TH))
