"""The router's product and choice."""

from __future__ import annotations

import torch
from torch import Tensor

from toptwo_kernels.cpu.native import SCORES
from toptwo_kernels.cpu.tape import Tape
from toptwo_kernels.ops import RouterSpec, RouterWeights, Routing


def route(tape: Tape, x_TH: Tensor, router: RouterWeights, spec: RouterSpec) -> Routing:
    """See `ops.Ops.route`."""
    matrix = router.matrix
    if matrix.format != "float32":
        raise ValueError(f"a router is float32, not {matrix.format}")
    ids = tape.empty(x_TH, spec.top_k, torch.int64)
    weights = tape.empty(x_TH, spec.top_k)
    shape = matrix.cols, matrix.data, spec.num_experts, spec.top_k
    rule = SCORES[spec.score], spec.over_selected, spec.renormalize, spec.scale
    groups = spec.num_groups, spec.top_groups, spec.group_score == "best_two"
    biases = router.logit_bias_E, router.selection_bias_E
    tape.emit("route", x_TH, *shape, *rule, *groups, spec.jitter, *biases, ids, weights, step=len(x_TH))
    return Routing(ids, weights)
