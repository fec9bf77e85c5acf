"""Routing and experts of both backends, against sums written out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from native import normal, random_routing
from toptwo_kernels.ops import Activation, ExpertWeights, GroupScore, Ops, RouterSpec, RouterWeights, Routing

LOGITS = torch.tensor([[1.0, 3.0, 2.0, 0.0], [0.5, 0.1, 0.2, 0.9]])


def route(ops: Ops, logits_TE: Tensor, spec: RouterSpec, selection_bias_E: Tensor | None = None) -> Routing:
    """The choice by these very logits: the router is the identity."""
    matrix = ops.pack(torch.eye(spec.num_experts), "float32")
    return ops.route(logits_TE, RouterWeights(matrix, None, selection_bias_E), spec)


def pack(ops: Ops, gate_up_EFH: Tensor, down_EHF: Tensor) -> ExpertWeights:
    return ExpertWeights(ops.pack(gate_up_EFH, "float32", paired=True), ops.pack(down_EHF, "float32"))


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


def test_logits_have_a_bias(ops: Ops) -> None:
    router = RouterWeights(
        ops.pack(torch.eye(4), "float32"), logit_bias_E=torch.tensor([0.0, -3.0, 0.5, 2.0])
    )
    routing = ops.route(LOGITS, router, RouterSpec(4, 2))
    assert routing.ids_TK.tolist() == [[2, 3], [3, 2]]
    torch.testing.assert_close(routing.weights_TK[0], torch.tensor([2.5, 2.0]).softmax(0))


def test_a_selection_bias_chooses_but_does_not_weigh(ops: Ops) -> None:
    bias = torch.tensor([0.9, -0.9, 0.0, 0.0])
    routing = route(ops, LOGITS, RouterSpec(4, 2, score="sigmoid", renormalize=False), bias)
    assert routing.ids_TK.tolist() == [[0, 2], [0, 3]]
    torch.testing.assert_close(routing.weights_TK, LOGITS.sigmoid().gather(1, routing.ids_TK))


@pytest.mark.parametrize(("group_score", "chosen"), [("best", [0, 4, 5, 1]), ("best_two", [4, 5, 6, 7])])
def test_only_the_best_groups_are_chosen_from(ops: Ops, group_score: GroupScore, chosen: list[int]) -> None:
    logits = torch.tensor([[4.0, -3.0, 1.5, 1.4, 3.0, 2.9, 2.0, 2.0]])  # four groups of two
    spec = RouterSpec(8, 4, num_groups=4, top_groups=2, group_score=group_score, score="sigmoid")
    routing = route(ops, logits, spec)
    assert routing.ids_TK.tolist() == [chosen]
    weights = logits[0].sigmoid()[chosen]
    torch.testing.assert_close(routing.weights_TK[0], weights / weights.sum())


def test_groups_are_ranked_with_the_selection_bias_and_ties_go_to_the_lowest(ops: Ops) -> None:
    spec = RouterSpec(6, 1, num_groups=3, top_groups=1, score="sigmoid", renormalize=False)
    bias = torch.tensor([0.0, 0.0, 0.0, 0.25, 0.25, 0.0])
    routing = route(ops, torch.zeros(1, 6), spec, bias)
    assert routing.ids_TK.tolist() == [[3]]
    assert routing.weights_TK.tolist() == [[0.5]]


def mix_sparsely(logits: list[float], jitter: float) -> tuple[list[int], list[float]]:
    """Phi-3.5-MoE's rule (arXiv 2409.12136), in plain Python."""
    left, ids, weights = dict(enumerate(logits)), [], []
    for _ in range(2):
        best = min(left, key=lambda e: (-left[e], e))
        most = left[best]
        near = [x for x in left.values() if (most - x) / max(abs(x), most) <= 2 * jitter]
        ids.append(best)
        weights.append(1 / sum(math.exp(x - most) for x in near))
        del left[best]
    return ids, weights


@pytest.mark.parametrize("jitter", [0.01, 0.1, 0.4])
def test_sparsemixer_weighs_each_expert_among_its_near_ones(ops: Ops, jitter: float) -> None:
    logits = 3 * normal(300, 16) + 2
    logits[1] = -logits[0].abs()  # none is positive
    logits[2, 1:9] = 5.0  # equals
    routing = route(ops, logits, RouterSpec(16, 2, score="sparsemixer", jitter=jitter, scale=0.5))
    expected = [mix_sparsely(row, jitter) for row in logits.tolist()]
    assert routing.ids_TK.tolist() == [ids for ids, _ in expected]
    torch.testing.assert_close(routing.weights_TK, 0.5 * torch.tensor([weights for _, weights in expected]))
    assert (routing.weights_TK.sum(-1) > 0.55).any()  # each may have nearly all of its softmax


def test_dense_gating_chooses_all(ops: Ops) -> None:
    logits = normal(5, 40)
    routing = route(ops, logits, RouterSpec(40, 40))
    assert torch.equal(routing.ids_TK, logits.argsort(-1, descending=True))
    torch.testing.assert_close(routing.weights_TK, logits.softmax(-1).sort(-1, descending=True).values)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_groups": 3}, "cannot be cut so"),
        ({"num_groups": 4, "top_groups": 5}, "cannot be cut so"),
        ({"num_groups": 4, "top_groups": 1, "top_k": 3}, "do not hold 3"),
        ({"num_groups": 8, "top_groups": 8, "group_score": "best_two"}, "at least two"),
        ({"score": "sparsemixer", "top_k": 3}, "sparsemixer chooses two"),
    ],
)
def test_specs_that_make_no_sense_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RouterSpec(**{"num_experts": 8, "top_k": 2, **fields})


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
    got = ops.experts(x_TH, routing, pack(ops, gate_up, down))
    torch.testing.assert_close(got, token_by_token(x_TH, routing, gate_up, down), atol=1e-5, rtol=1e-5)


def test_all_tokens_on_one_expert_and_experts_without_tokens(ops: Ops) -> None:
    torch.manual_seed(0)
    x_TH, gate_up, down = torch.randn(5, 8), torch.randn(6, 8, 8), torch.randn(6, 8, 4)
    routing = Routing(torch.full((5, 1), 4), torch.ones(5, 1))
    gate_up[[0, 1, 2, 3, 5]] = torch.nan  # must never be touched
    got = ops.experts(x_TH, routing, pack(ops, gate_up, down))
    torch.testing.assert_close(got, token_by_token(x_TH, routing, gate_up, down), atol=1e-5, rtol=1e-5)


def test_identical_experts_make_routing_irrelevant(ops: Ops) -> None:
    torch.manual_seed(0)
    x_TH = torch.randn(9, 16)
    gate_up, down = torch.randn(1, 24, 16).expand(8, -1, -1), torch.randn(1, 16, 12).expand(8, -1, -1)
    weights = pack(ops, gate_up, down)
    first = Routing(torch.zeros(9, 1, dtype=torch.int64), torch.ones(9, 1))
    dense = ops.experts(x_TH, first, weights)
    for seed in range(5):
        logits = torch.randn(9, 8, generator=torch.Generator().manual_seed(seed))
        routed = ops.experts(x_TH, route(ops, logits, RouterSpec(8, 2)), weights)
        torch.testing.assert_close(routed, dense, atol=1e-5, rtol=1e-5)


# --- Activations and biases -----------------------------------------------------------------------

ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)


def activate(activation: Activation, gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """By their definitions; see `ops.Activation`."""
    if activation == "silu":
        return gate / (1 + (-gate).exp()) * up
    if activation == "gelu_tanh":
        inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
        return 0.5 * gate * (1 + inner.tanh()) * up
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate / (1 + (-1.702 * gate).exp()) * (up + 1)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_any_number(ops: Ops, activation: Activation) -> None:
    """One input, which is the gate; ups are their bias."""
    x = torch.cat((torch.linspace(-120, 120, 4001), torch.tensor([0.0, 1e-30, -1e-30, 1e4, -1e4])))[:, None]
    routing = Routing(torch.zeros(len(x), 1, dtype=torch.int64), torch.ones(len(x), 1))
    gate_up = ops.pack(torch.tensor([[[1.0], [0.0]]]), "float32", paired=True)
    for up in (1.0, -0.25, 9.0, -30.0):
        weights = ExpertWeights(
            gate_up, ops.pack(torch.ones(1, 1, 1), "float32"), activation, torch.tensor([[0.0, up]])
        )
        got = ops.experts(x, routing, weights)
        expected = activate(activation, x.double(), torch.tensor(up).double(), 7.0)
        torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=2e-6 * abs(up))
        nan = ops.experts(
            torch.full((1, 1), torch.nan), Routing(routing.ids_TK[:1], routing.weights_TK[:1]), weights
        )
        assert nan.isnan().all()


@pytest.mark.parametrize("num_tokens", [1, 2, 33])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("ffn", [1, 8, 13, 20])
def test_biases_belong_to_experts(ops: Ops, num_tokens: int, activation: Activation, ffn: int) -> None:
    """Those of experts that nobody chose are never touched."""
    hidden, limit = 21, 1.5
    x, routing = normal(num_tokens, hidden, seed=num_tokens), random_routing(num_tokens, [0, 2, 3, 5], 2)
    gate_up, down = normal(6, 2 * ffn, hidden, seed=1) / 4, normal(6, hidden, ffn, seed=2) / 4
    gate_up_bias, down_bias = normal(6, 2 * ffn, seed=3), normal(6, hidden, seed=4)
    gate_up_bias[[1, 4]], down_bias[[1, 4]] = torch.nan, torch.nan
    expected = torch.zeros(num_tokens, hidden, dtype=torch.float64)
    for token in range(num_tokens):
        for expert, weight in zip(routing.ids_TK[token].tolist(), routing.weights_TK[token], strict=True):
            gate, up = (gate_up[expert].double() @ x[token].double() + gate_up_bias[expert]).chunk(2)
            joined = activate(activation, gate, up, limit)
            expected[token] += weight * (down[expert].double() @ joined + down_bias[expert])
    weights = replace(
        pack(ops, gate_up, down),
        activation=activation,
        gate_up_bias_EF=gate_up_bias,
        down_bias_EH=down_bias,
        limit=limit,
    )
    torch.testing.assert_close(ops.experts(x, routing, weights).double(), expected, atol=1e-5, rtol=1e-5)


def test_what_comes_to_each_expert_is_counted(ops: Ops) -> None:
    weights = pack(ops, normal(6, 16, 8), normal(6, 8, 8, seed=1))
    counts_E = torch.tensor([1 << 40, 0, 0, 0, 0, 7])
    for num_tokens, seed in ((1, 0), (33, 1)):
        x, routing = normal(num_tokens, 8), random_routing(num_tokens, [0, 2, 3, 5], 3, seed=seed)
        expected_E = counts_E + torch.bincount(routing.ids_TK.flatten(), minlength=6)
        counted = ops.experts(x, replace(routing, counts_E=counts_E), weights)
        assert torch.equal(counts_E, expected_E)
        assert torch.equal(counted, ops.experts(x, routing, weights))
    assert int(counts_E.sum()) == (1 << 40) + 7 + 34 * 3
