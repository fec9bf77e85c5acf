"""The experts themselves: gather, two products per expert, combine."""

from __future__ import annotations

import torch
from torch import Tensor

from toptwo_kernels.ops import Activation, Matrix, Routing
from toptwo_kernels.reference.linear import product


def experts(x_TH: Tensor, routing: Routing, gate_up: Matrix, down: Matrix, activation: Activation) -> Tensor:
    """See `ops.Ops.experts`. A pair is one (token, slot); pairs are grouped by expert."""
    if activation != "silu":
        raise ValueError(f"unknown activation {activation!r}")
    num_tokens, top_k = routing.ids_TK.shape
    pair_experts = routing.ids_TK.flatten()
    # Stable, so that the tokens of an expert stay in step order.
    pairs_by_expert = torch.argsort(pair_experts, stable=True)
    counts = torch.bincount(pair_experts, minlength=gate_up.num_matrices).tolist()

    out_PH = x_TH.new_empty(num_tokens * top_k, x_TH.shape[1])
    for expert, pairs in enumerate(torch.split(pairs_by_expert, counts)):
        if len(pairs):
            gate, up = product(x_TH[pairs // top_k], gate_up, expert).chunk(2, dim=-1)
            out_PH[pairs] = product(torch.nn.functional.silu(gate) * up, down, expert)

    slots_TKH = out_PH.view(num_tokens, top_k, -1).float() * routing.weights_TK.unsqueeze(-1)
    total = slots_TKH[:, 0]
    for slot in range(1, top_k):  # a fixed order of addition, whatever else is in the batch
        total = total + slots_TKH[:, slot]
    return total.to(x_TH.dtype)
