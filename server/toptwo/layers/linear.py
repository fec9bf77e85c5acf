"""Dense projections."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from toptwo_kernels.ops import Matrix, Ops


@dataclass(frozen=True)
class Linear:
    """y = x @ weight.T + bias."""

    weight: Matrix
    ops: Ops
    bias: Tensor | None = None

    def __call__(self, x_TI: Tensor) -> Tensor:
        return self.ops.linear(x_TI, self.weight, self.bias)


@dataclass(frozen=True)
class ScaledLinear:
    """y = (x @ weight.T) * factor: heads whose logits are scaled."""

    weight: Matrix
    factor: float
    ops: Ops

    def __call__(self, x_TI: Tensor) -> Tensor:
        return self.ops.scale(self.ops.linear(x_TI, self.weight), self.factor)
