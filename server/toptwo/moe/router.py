"""The router: from a token's hidden state to the experts it is sent to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from toptwo_kernels.ops import Ops, RouterSpec, RouterWeights, Routing


@dataclass(frozen=True)
class Router:
    """Logits by one linear map [E, H] in float32, choice by the `RouterSpec`."""

    weights: RouterWeights
    spec: RouterSpec
    ops: Ops

    def __call__(self, x_TH: Tensor) -> Routing:
        return self.ops.route(x_TH, self.weights, self.spec)
