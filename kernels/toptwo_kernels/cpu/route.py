"""The router's product and choice."""

from __future__ import annotations

import torch
from torch import Tensor

from toptwo_kernels.cpu.tape import Tape
from toptwo_kernels.ops import Matrix, RouterSpec, Routing


def route(tape: Tape, x_TH: Tensor, router: Matrix, spec: RouterSpec) -> Routing:
    """See `ops.Ops.route`."""
    if router.format != "float32":
        raise ValueError(f"a router is float32, not {router.format}")
    ids = tape.empty(x_TH, spec.top_k, torch.int64)
    weights = tape.empty(x_TH, spec.top_k)
    shape = router.cols, router.data, spec.num_experts, spec.top_k
    rule = spec.score == "sigmoid", spec.over_selected, spec.renormalize, spec.scale
    tape.emit("route", x_TH, *shape, *rule, ids, weights, step=len(x_TH))
    return Routing(ids, weights)
