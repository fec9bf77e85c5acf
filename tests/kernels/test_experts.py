"""Routing and experts of both backends, against sums written out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from toptwo_kernels.ops import Matrix, Ops, RouterSpec, Routing

LOGITS = torch.tensor([[1.0, 3.0, 2.0, 0.0], [0.5, 0.1, 0.2, 0.9]])


def route(ops: Ops, logits_TE: Tensor, spec: RouterSpec) -> Routing:
    """The choice by these very logits: the router is the identity."""
    return ops.route(logits_TE, ops.pack(torch.eye(spec.num_experts), "float32"), spec)


def pack(ops: Ops, gate_up_EFH: Tensor, down_EHF: Tensor) -> tuple[Matrix, Matrix]:
    return ops.pack(gate_up_EFH, "float32", paired=True), ops.pack(down_EHF, "float32")


def test_softmax_over_all_then_renormalised(ops: Ops) -> None:
    routing = route(ops, LOGITS, RouterSpec(4, 2))
    assert routing.ids_TK.tolist() == [[1, 2], [3, 0]]
    first = torch.tensor([3.0, 2.0]).softmax(0)  # the same as softmax over the chosen logits
    torch.testing.assert_close(routing.weights_TK[0], first)


def test_softmax_over_the_chosen_is_the_same_as_renormalising(ops: Ops) -> None:
    over_all = route(ops, LOGITS, RouterSpec(4, 3))
    over_chosen = route(ops, LOGITS, RouterSpec(4, 3, over_selected=True, renormalize=False))
    assert torch.equal(over_all.ids_TK, over_chosen.ids_TK)
    torch.testing.assert_close(over_all.weights_TK, over_chosen.weights_TK)


def test_without_renormalising_the_weights_are_the_softmax_itself(ops: Ops) -> None:
    routing = route(ops, LOGITS, RouterSpec(4, 2, renormalize=False, scale=2.5))
    torch.testing.assert_close(routing.weights_TK[0], 2.5 * LOGITS[0].softmax(0)[[1, 2]])


def test_sigmoid_scores(ops: Ops) -> None:
    routing = route(ops, LOGITS, RouterSpec(4, 1, score="sigmoid", renormalize=False))
    torch.testing.assert_close(routing.weights_TK[:, 0], LOGITS.max(-1).values.sigmoid())


def test_ties_go_to_the_lowest_expert_id(ops: Ops) -> None:
    routing = route(ops, torch.zeros(3, 40), RouterSpec(40, 4))
    assert routing.ids_TK.tolist() == [[0, 1, 2, 3]] * 3


@pytest.mark.parametrize("top_k", [0, 5])
def test_top_k_must_be_among_the_experts(top_k: int) -> None:
    with pytest.raises(ValueError, match="top_k"):
        RouterSpec(4, top_k)


def token_by_token(x_TH: Tensor, routing: Routing, gate_up_EFH: Tensor, down_EHF: Tensor) -> Tensor:
    """The definition of a Mixture-of-Experts layer, one token and one expert at a time."""
    rows = []
    for x_H, ids, weights in zip(x_TH, routing.ids_TK.tolist(), routing.weights_TK, strict=True):
        total = torch.zeros_like(x_H)
        for expert, weight in zip(ids, weights, strict=True):
            gate, up = (gate_up_EFH[expert] @ x_H).chunk(2)
            total += weight * (down_EHF[expert] @ (gate * gate.sigmoid() * up))
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("num_tokens", [1, 2, 33])
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (8, 2), (8, 1), (40, 8), (60, 4), (4, 4)])
def test_experts_compute_the_definition(ops: Ops, num_tokens: int, num_experts: int, top_k: int) -> None:
    torch.manual_seed(num_tokens)
    x_TH = torch.randn(num_tokens, 24)
    gate_up, down = torch.randn(num_experts, 2 * 16, 24) / 5, torch.randn(num_experts, 24, 16) / 4
    routing = route(ops, torch.randn(num_tokens, num_experts), RouterSpec(num_experts, top_k))
    got = ops.experts(x_TH, routing, *pack(ops, gate_up, down), "silu")
    torch.testing.assert_close(got, token_by_token(x_TH, routing, gate_up, down), atol=1e-5, rtol=1e-5)


def test_all_tokens_on_one_expert_and_experts_without_tokens(ops: Ops) -> None:
    torch.manual_seed(0)
    x_TH, gate_up, down = torch.randn(5, 8), torch.randn(6, 8, 8), torch.randn(6, 8, 4)
    routing = Routing(torch.full((5, 1), 4), torch.ones(5, 1))
    gate_up[[0, 1, 2, 3, 5]] = torch.nan  # must never be touched
    got = ops.experts(x_TH, routing, *pack(ops, gate_up, down), "silu")
    torch.testing.assert_close(got, token_by_token(x_TH, routing, gate_up, down), atol=1e-5, rtol=1e-5)


def test_identical_experts_make_routing_irrelevant(ops: Ops) -> None:
    torch.manual_seed(0)
    x_TH = torch.randn(9, 16)
    gate_up, down = torch.randn(1, 24, 16).expand(8, -1, -1), torch.randn(1, 16, 12).expand(8, -1, -1)
    weights = pack(ops, gate_up, down)
    first = Routing(torch.zeros(9, 1, dtype=torch.int64), torch.ones(9, 1))
    dense = ops.experts(x_TH, first, *weights, "silu")
    for seed in range(5):
        logits = torch.randn(9, 8, generator=torch.Generator().manual_seed(seed))
        routed = ops.experts(x_TH, route(ops, logits, RouterSpec(8, 2)), *weights, "silu")
        torch.testing.assert_close(routed, dense, atol=1e-5, rtol=1e-5)
