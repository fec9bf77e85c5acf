"""Dense projections."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from toptwo_kernels.ops import Matrix, Ops


@dataclass(frozen=True)
class Linear:
    """y = x @ weight.T, without bias."""

    weight: Matrix
    ops: Ops

    def __call__(self, x_TI: Tensor) -> Tensor:
        return self.ops.linear(x_TI, self.weight)
