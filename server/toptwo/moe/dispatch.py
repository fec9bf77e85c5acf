"""Bringing tokens to experts and results back. All experts are local for now.

Expert parallelism will send tokens to the ranks that own their experts here; routers and experts
will not notice.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from toptwo.moe.experts import Experts
from toptwo_kernels.ops import Routing


class Dispatcher(Protocol):
    """Runs the chosen experts on their tokens, wherever the experts live; returns [T, H]."""

    def __call__(self, x_TH: Tensor, routing: Routing, experts: Experts) -> Tensor: ...


def dispatch_locally(x_TH: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """Every expert is in this process: hand over all tokens at once."""
    return experts(x_TH, routing)
