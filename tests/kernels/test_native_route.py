"""The native router: the reference's choice, ties included, and some choice whatever the logits are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from native import INSTRUCTION_SETS, backend, normal
from toptwo_kernels import reference
from toptwo_kernels.ops import ExpertWeights, RouterSpec, RouterWeights, Routing
from toptwo_kernels.reference.route import choose

every_instruction_set = pytest.mark.parametrize("isa", INSTRUCTION_SETS)

SPECS = [
    RouterSpec(8, 2),
    RouterSpec(1, 1),
    RouterSpec(3, 3),
    RouterSpec(5, 2, over_selected=True, renormalize=False),
    RouterSpec(40, 8, renormalize=False, scale=2.5),
    RouterSpec(60, 4, score="sigmoid"),
    RouterSpec(12, 4, score="sigmoid", over_selected=True, renormalize=False),
    RouterSpec(64, 64),
    RouterSpec(512, 10),
    RouterSpec(160, 6, renormalize=False, scale=16.0, num_groups=8, top_groups=3),
    RouterSpec(256, 8, "sigmoid", scale=2.5, num_groups=8, top_groups=4, group_score="best_two"),
    RouterSpec(12, 3, num_groups=6, top_groups=6, group_score="best_two"),
    RouterSpec(9, 1, over_selected=True, num_groups=9, top_groups=2),
    RouterSpec(16, 2, score="sparsemixer"),
    RouterSpec(5, 2, score="sparsemixer", jitter=0.2, scale=0.5),
]


def route(isa: str, logits_E: Tensor, spec: RouterSpec) -> Routing:
    """The choice for these very logits: the router has one input, which is 1."""
    ops = backend(isa)
    router = RouterWeights(ops.pack(logits_E[:, None], "float32"))
    routing: Routing = ops.route(torch.ones(1, 1), router, spec)
    return routing


@every_instruction_set
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 300])
@pytest.mark.parametrize("biases", [(False, False), (True, False), (False, True), (True, True)], ids=str)
def test_the_references_choice(
    isa: str, spec: RouterSpec, num_tokens: int, biases: tuple[bool, bool]
) -> None:
    weight, x = normal(spec.num_experts, 50, seed=1) / 7, normal(num_tokens, 50, seed=2)
    given = [normal(spec.num_experts, seed=3 + i) if some else None for i, some in enumerate(biases)]
    got, expected = (
        ops.route(x, RouterWeights(ops.pack(weight, "float32"), *given), spec)
        for ops in (backend(isa), reference)
    )
    assert torch.equal(got.ids_TK, expected.ids_TK)
    torch.testing.assert_close(got.weights_TK, expected.weights_TK, atol=1e-6, rtol=3e-5)


@every_instruction_set
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_ties_go_to_the_lowest_expert_id(isa: str, spec: RouterSpec) -> None:
    generator = torch.Generator().manual_seed(0)
    for values in (1, 2, 3):  # how many different logits there are
        for _ in range(20):
            logits = torch.randint(0, values, (spec.num_experts,), generator=generator).float()
            got, expected = route(isa, logits, spec), choose(logits[None], spec)
            assert torch.equal(got.ids_TK, expected.ids_TK)
            torch.testing.assert_close(got.weights_TK, expected.weights_TK)


@every_instruction_set
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_some_expert_is_chosen_whatever_the_logits_are(isa: str, bad: float, spec: RouterSpec) -> None:
    """And the experts' work with that choice ends; a row of nonsense is the sampler's to refuse."""
    ops = backend(isa)
    gate_up = ops.pack(normal(spec.num_experts, 16, 8), "int8", paired=True)
    weights = ExpertWeights(gate_up, ops.pack(normal(spec.num_experts, 8, 8), "int8"))
    for where in ([0], [spec.num_experts - 1], range(spec.num_experts), range(spec.num_experts // 2)):
        logits = normal(spec.num_experts)
        logits[list(where)] = bad
        routing = route(isa, logits, spec)
        (ids,) = routing.ids_TK.tolist()
        assert len(set(ids)) == spec.top_k
        assert all(0 <= expert < spec.num_experts for expert in ids)
        assert ops.experts(normal(1, 8), routing, weights).shape == (1, 8)


@every_instruction_set
def test_nonsense_in_one_token_harms_no_other(isa: str) -> None:
    ops, spec = backend(isa), RouterSpec(5, 2)
    router = RouterWeights(ops.pack(normal(5, 33), "float32"))
    x = normal(9, 33, seed=1)
    expected = ops.route(x, router, spec)
    x[4, 7] = torch.nan
    got = ops.route(x, router, spec)
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(got.ids_TK[others], expected.ids_TK[others])
    assert torch.equal(got.weights_TK[others], expected.weights_TK[others])
    assert got.weights_TK[4].isnan().all()


def test_a_router_is_exact() -> None:
    ops = backend("scalar")
    with pytest.raises(ValueError, match="a router is float32, not int8"):
        ops.route(normal(1, 32), RouterWeights(ops.pack(normal(4, 32), "int8")), RouterSpec(4, 2))
