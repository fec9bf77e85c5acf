"""The router: from a token's hidden state to the experts it is sent to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from toptwo_kernels.ops import Ops, RouterSpec, Routing


@dataclass(frozen=True)
class Router:
    """Logits by one linear map, choice by the `RouterSpec`."""

    weight_EH: Tensor
    spec: RouterSpec
    ops: Ops

    def __call__(self, x_TH: Tensor) -> Routing:
        return self.ops.route(self.ops.linear(x_TH, self.weight_EH), self.spec)
