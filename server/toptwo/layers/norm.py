"""Normalisation layers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from toptwo_kernels.ops import Ops


@dataclass(frozen=True)
class RMSNorm:
    """Root-mean-square norm over the hidden dimension."""

    weight_H: Tensor
    eps: float
    ops: Ops

    def __call__(self, x_TH: Tensor) -> Tensor:
        return self.ops.rms_norm(x_TH, self.weight_H, self.eps)


@dataclass(frozen=True)
class LayerNorm:
    """Norm over the hidden dimension that takes the mean away, and may add a bias."""

    weight_H: Tensor
    eps: float
    ops: Ops
    bias_H: Tensor | None = None

    def __call__(self, x_TH: Tensor) -> Tensor:
        return self.ops.layer_norm(x_TH, self.weight_H, self.eps, self.bias_H)
