"""The router: the reference's choice, ties included, and some choice whatever the logits are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cuda_harness import assert_close
from toptwo_kernels.cuda.device import Device
from toptwo_kernels.cuda.packing import pack
from toptwo_kernels.cuda.route import route
from toptwo_kernels.ops import RouterSpec, RouterWeights, Routing
from toptwo_kernels.reference.route import choose

Normal = Callable[..., Tensor]

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
    RouterSpec(384, 32, score="sigmoid"),
    RouterSpec(160, 6, renormalize=False, scale=16.0, num_groups=8, top_groups=3),
    RouterSpec(256, 8, "sigmoid", scale=2.5, num_groups=8, top_groups=4, group_score="best_two"),
    RouterSpec(12, 3, num_groups=6, top_groups=6, group_score="best_two"),
    RouterSpec(9, 1, over_selected=True, num_groups=9, top_groups=2),
    RouterSpec(16, 2, score="sparsemixer"),
    RouterSpec(5, 2, score="sparsemixer", jitter=0.2, scale=0.5),
]
every_spec = pytest.mark.parametrize("spec", SPECS, ids=str)


def route_logits(device: Device, logits_TE: Tensor, spec: RouterSpec, *bias: Tensor | None) -> Routing:
    """The choice for these very logits: token t has input t alone, and that is 1."""
    matrix = pack(device, logits_TE.float().T.contiguous(), "float32")
    x_TH = torch.eye(len(logits_TE), device=device.torch_device)
    return route(device, x_TH, RouterWeights(matrix, None, *bias), spec)


def assert_same(got: Routing, expected: Routing) -> None:
    assert torch.equal(got.ids_TK.cpu(), expected.ids_TK.int().cpu())
    assert got.weights_TK.dtype == torch.float32
    torch.testing.assert_close(got.weights_TK.cpu(), expected.weights_TK.cpu(), atol=1e-6, rtol=3e-5)


@every_spec
@pytest.mark.parametrize("biased", [False, True])
def test_the_references_choice(
    device: Device, generator: torch.Generator, spec: RouterSpec, biased: bool
) -> None:
    """Logits far enough from each other that no rounding can exchange two experts."""
    num_tokens = 5
    steps = torch.stack([torch.randperm(spec.num_experts, generator=generator) for _ in range(num_tokens)])
    logits_TE = (steps - spec.num_experts / 2) / 64
    bias_E = torch.randperm(spec.num_experts, generator=generator) / 4096 if biased else None
    got = route_logits(device, logits_TE, spec, None if bias_E is None else bias_E.to(device.torch_device))
    assert_same(got, choose(logits_TE, spec, bias_E))


@every_spec
def test_ties_go_to_the_lowest_expert_id(
    device: Device, generator: torch.Generator, spec: RouterSpec
) -> None:
    shape = (2, spec.num_experts)
    # One, two, and three different logits; 0 and -0 are equal.
    logits_TE = torch.cat([torch.randint(-1, most, shape, generator=generator) for most in range(3)]).float()
    negative = torch.rand(logits_TE.shape, generator=generator) < 0.5
    logits_TE = torch.where((logits_TE == 0) & negative, -0.0, logits_TE)
    assert_same(route_logits(device, logits_TE, spec), choose(logits_TE, spec))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("num_experts", "width"), [(8, 1), (8, 4096), (60, 1100), (128, 2048)])
def test_the_logits(device: Device, normal: Normal, dtype: torch.dtype, num_experts: int, width: int) -> None:
    """Seen through dense gating, whose weights are a softmax of all."""
    x, matrix, bias = (
        normal(7, width, dtype=dtype),
        normal(num_experts, width) / width**0.5,
        normal(num_experts),
    )
    router = RouterWeights(pack(device, matrix, "float32"), bias)
    got = route(device, x, router, RouterSpec(num_experts, num_experts))
    logits = x.double() @ matrix.double().T + bias.double()
    expected = logits.softmax(-1).gather(1, got.ids_TK.long())
    assert_close(got.weights_TK, expected, 2e-6)
    assert (got.weights_TK.diff(dim=1) <= 0).all()


@every_spec
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_some_expert_is_chosen_whatever_the_logits_are(device: Device, spec: RouterSpec, bad: float) -> None:
    num_experts = spec.num_experts
    for where in ([0], [num_experts - 1], range(num_experts), range(num_experts // 2)):
        logits_E = torch.arange(num_experts) / num_experts
        logits_E[list(where)] = bad
        router = RouterWeights(
            pack(device, torch.zeros(num_experts, 1), "float32"), logits_E.to(device.torch_device)
        )
        got = route(device, torch.ones(1, 1, device=device.torch_device), router, spec)
        ids = got.ids_TK[0].tolist()
        assert len(set(ids)) == spec.top_k
        assert 0 <= min(ids) <= max(ids) < num_experts
        if spec.score != "sparsemixer":
            assert torch.equal(got.ids_TK.cpu(), choose(logits_E[None], spec).ids_TK.int())


@pytest.fixture
def padded(device: Device) -> Device:
    return replace(device, num_live=torch.tensor([2], dtype=torch.int32, device=device.torch_device))


@every_spec
def test_padding_has_no_experts(padded: Device, device: Device, normal: Normal, spec: RouterSpec) -> None:
    x, matrix = normal(4, 48, dtype=torch.bfloat16), normal(spec.num_experts, 48)
    router = RouterWeights(pack(device, matrix, "float32"))
    got, whole = route(padded, x, router, spec), route(device, x, router, spec)
    assert torch.equal(got.ids_TK[:2], whole.ids_TK[:2])
    assert torch.equal(got.weights_TK[:2], whole.weights_TK[:2])
    assert (got.ids_TK[2:] == -1).all()
    assert (got.weights_TK[2:] == 0).all()


@pytest.mark.parametrize("spec", [SPECS[0], SPECS[5]], ids=str)
def test_a_token_does_not_know_the_others(device: Device, normal: Normal, spec: RouterSpec) -> None:
    """So few tokens that a program takes a small block of them, and so many that it takes a large one."""
    num_tokens = 16 * device.num_processors + 3
    x, matrix = normal(num_tokens, 1300, dtype=torch.bfloat16), normal(spec.num_experts, 1300) / 36
    router = RouterWeights(pack(device, matrix, "float32"))
    whole = route(device, x, router, spec)
    for chosen in (slice(0, 1), slice(5, 22), slice(num_tokens - 1, None)):
        part = route(device, x[chosen].clone(), router, spec)
        assert torch.equal(part.ids_TK, whole.ids_TK[chosen])
        assert torch.equal(part.weights_TK, whole.weights_TK[chosen])
