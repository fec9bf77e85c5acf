"""The experts themselves: gather, two products per expert, combine."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from toptwo_kernels.ops import ExpertWeights, Routing
from toptwo_kernels.reference.linear import product

CLAMPED_SLOPE = 1.702  # of the sigmoid in "clamped_swiglu"


def experts(x_TH: Tensor, routing: Routing, weights: ExpertWeights) -> Tensor:
    """See `ops.Ops.experts`. A pair is one (token, slot); pairs are grouped by expert."""
    num_tokens, top_k = routing.ids_TK.shape
    pair_experts = routing.ids_TK.flatten()
    # Stable, so that the tokens of an expert stay in step order.
    pairs_by_expert = torch.argsort(pair_experts, stable=True)
    counts_E = torch.bincount(pair_experts, minlength=weights.gate_up.num_matrices)
    if routing.counts_E is not None:
        routing.counts_E.add_(counts_E)

    out_PH = x_TH.new_empty(num_tokens * top_k, x_TH.shape[1])
    for expert, pairs in enumerate(torch.split(pairs_by_expert, counts_E.tolist())):
        if len(pairs):
            gate_up = product(x_TH[pairs // top_k], weights.gate_up, expert, weights.gate_up_bias_EF)
            gate, up = gate_up.chunk(2, dim=-1)
            out_PH[pairs] = product(activate(gate, up, weights), weights.down, expert, weights.down_bias_EH)

    slots_TKH = out_PH.view(num_tokens, top_k, -1).float() * routing.weights_TK.unsqueeze(-1)
    total = slots_TKH[:, 0]
    for slot in range(1, top_k):  # a fixed order of addition, whatever else is in the batch
        total = total + slots_TKH[:, slot]
    return total.to(x_TH.dtype)


def activate(gate: Tensor, up: Tensor, weights: ExpertWeights) -> Tensor:
    """The two halves joined; see `ops.Activation`."""
    if weights.activation == "silu":
        return functional.silu(gate) * up
    if weights.activation == "gelu_tanh":
        return functional.gelu(gate, approximate="tanh") * up
    gate = gate.clamp(max=weights.limit)
    up = up.clamp(-weights.limit, weights.limit)
    return gate * torch.sigmoid(CLAMPED_SLOPE * gate) * (up + 1)
