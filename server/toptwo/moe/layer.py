"""The Mixture-of-Experts layer: route, dispatch, compute, combine.

Every token x is sent to the K experts that its router scores highest, and gets back the weighted
sum of what they make of it (arXiv 1701.06538):

    ids, weights = top_k(router(x))
    y = sum over k of weights[k] * expert[ids[k]](x)

Only the chosen experts are computed, each once for all of its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from toptwo.moe.dispatch import Dispatcher, dispatch_locally
from toptwo.moe.experts import Experts
from toptwo.moe.router import Router


@dataclass(frozen=True)
class MoELayer:
    """The architecture owns the router, parallelism the dispatcher, the device the experts.

    counts_E: how many tokens came to each expert since the layer was made.
    """

    router: Router
    experts: Experts
    dispatch: Dispatcher = dispatch_locally
    counts_E: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        counts_E = torch.zeros(self.router.spec.num_experts, dtype=torch.int64)
        object.__setattr__(self, "counts_E", counts_E)

    def __call__(self, x_TH: Tensor) -> Tensor:
        routing = replace(self.router(x_TH), counts_E=self.counts_E)
        return self.dispatch(x_TH, routing, self.experts)
