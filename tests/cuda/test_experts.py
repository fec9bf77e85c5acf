"""Experts against sums written out in float64, and bit by bit against themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor

from cuda_harness import assert_close
from toptwo_kernels import reference
from toptwo_kernels.cuda import experts as module
from toptwo_kernels.cuda.align import align
from toptwo_kernels.cuda.device import Device
from toptwo_kernels.cuda.experts import experts
from toptwo_kernels.cuda.packing import BLOCK_INPUTS, pack
from toptwo_kernels.cuda.product import slice_inputs
from toptwo_kernels.cuda.tuning import candidates
from toptwo_kernels.ops import Activation, ExpertWeights, Routing, WeightFormat
from toptwo_kernels.reference.experts import activate

Normal = Callable[..., Tensor]
Route = Callable[[int, int, int], Routing]

FORMATS: tuple[WeightFormat, ...] = ("bfloat16", "float32", "int8", "int4", "fp8")
every_format = pytest.mark.parametrize("weight_format", FORMATS)
few_and_many = pytest.mark.parametrize("few", [module.FEW_PAIRS, 0], ids=["few", "many"])


class Layer:
    """Experts in float64 and packed."""

    def __init__(
        self,
        device: Device,
        normal: Normal,
        sizes: tuple[int, int, int],
        weight_format: WeightFormat = "bfloat16",
        activation: Activation = "silu",
        biased: bool = False,
    ) -> None:
        count, hidden, width = sizes
        gate_up, down = (
            normal(count, 2 * width, hidden) / hidden**0.5,
            normal(count, hidden, width) / width**0.5,
        )
        self.gate_up = reference.pack(gate_up.cpu(), weight_format, paired=True).data.double()
        self.down = reference.pack(down.cpu(), weight_format).data.double()
        biases = (normal(count, 2 * width), normal(count, hidden)) if biased else (None, None)
        self.weights = ExpertWeights(
            pack(device, gate_up, weight_format, paired=True),
            pack(device, down, weight_format),
            activation,
            *biases,
            limit=1.5,
        )

    def pair(self, x_H: Tensor, expert: int) -> Tensor:
        weights = self.weights
        gate_up = self.gate_up[expert] @ x_H
        if weights.gate_up_bias_EF is not None:
            gate_up = gate_up + weights.gate_up_bias_EF[expert].cpu().double()
        gate, up = gate_up.chunk(2)
        out = self.down[expert] @ activate(gate, up, weights)
        return out if weights.down_bias_EH is None else out + weights.down_bias_EH[expert].cpu().double()

    def __call__(self, x_TH: Tensor, routing: Routing) -> Tensor:
        """Token by token, slot by slot."""
        x = x_TH.cpu().double()
        total = torch.zeros_like(x)
        for token, ids in enumerate(routing.ids_TK.tolist()):
            for slot, expert in enumerate(ids):
                if expert >= 0:
                    total[token] += self.pair(x[token], expert) * float(routing.weights_TK[token, slot])
        return total


@pytest.fixture
def route(device: Device, generator: torch.Generator) -> Route:
    """route(tokens, experts, top_k): distinct experts for every token, counted from 100."""

    def choose(tokens: int, count: int, top_k: int) -> Routing:
        ids = torch.rand(tokens, count, generator=generator).argsort(1)[:, :top_k].to(torch.int32)
        weights = 0.1 + torch.rand(tokens, top_k, generator=generator)
        where = device.torch_device
        return Routing(ids.contiguous().to(where), weights.to(where), torch.full((count,), 100, device=where))

    return choose


def expected_counts(routing: Routing, num_experts: int) -> Tensor:
    ids = routing.ids_TK.flatten()
    return 100 + torch.bincount(ids[ids >= 0].cpu().long(), minlength=num_experts)


@few_and_many
@pytest.mark.parametrize(
    ("weight_format", "count", "top_k", "tokens"),
    [("bfloat16", 3, 1, 1), ("bfloat16", 60, 4, 5), *((name, 8, 2, 7) for name in FORMATS)],
)
def test_chosen_experts_are_summed(
    device: Device, normal: Normal, route: Route, monkeypatch: pytest.MonkeyPatch,
    few: int, weight_format: WeightFormat, count: int, top_k: int, tokens: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(module, "FEW_PAIRS", few)
    layer = Layer(device, normal, (count, 96, 72), weight_format)
    dtype = torch.float32 if weight_format == "float32" else torch.bfloat16
    x, routing = normal(tokens, 96, dtype=dtype), route(tokens, count, top_k)
    got = experts(device, x, routing, layer.weights)
    assert got.dtype == dtype
    assert_close(got, layer(x, routing), 1e-5 if dtype == torch.float32 else 2e-2)
    assert torch.equal(routing.counts_E.cpu(), expected_counts(routing, count))


@few_and_many
@pytest.mark.parametrize("activation", get_args(Activation))
def test_activations_and_biases(
    device: Device,
    normal: Normal,
    route: Route,
    monkeypatch: pytest.MonkeyPatch,
    few: int,
    activation: Activation,
) -> None:
    monkeypatch.setattr(module, "FEW_PAIRS", few)
    layer = Layer(device, normal, (4, 64, 80), "float32", activation, biased=True)
    x, routing = 3 * normal(7, 64), route(7, 4, 2)
    assert_close(experts(device, x, routing, layer.weights), layer(x, routing), 1e-5)


@few_and_many
def test_all_tokens_may_come_to_one_expert(
    device: Device, normal: Normal, route: Route, monkeypatch: pytest.MonkeyPatch, few: int
) -> None:
    monkeypatch.setattr(module, "FEW_PAIRS", few)
    layer = Layer(device, normal, (60, 64, 64))
    x, routing = normal(50, 64, dtype=torch.bfloat16), route(50, 60, 1)
    routing.ids_TK.fill_(37)
    assert_close(experts(device, x, routing, layer.weights), layer(x, routing), 2e-2)
    assert torch.equal(routing.counts_E.cpu(), expected_counts(routing, 60))


@few_and_many
@pytest.mark.parametrize("weight_format", ["bfloat16", "float32"])
def test_experts_of_many_tokens(
    device: Device, normal: Normal, route: Route, monkeypatch: pytest.MonkeyPatch,
    few: int, weight_format: WeightFormat,
) -> None:  # fmt: skip
    monkeypatch.setattr(module, "FEW_PAIRS", few)
    layer = Layer(device, normal, (2, 64, 64), weight_format)
    dtype = torch.float32 if weight_format == "float32" else torch.bfloat16
    x, routing = normal(70, 64, dtype=dtype), route(70, 2, 1)
    routing.ids_TK[20:] = 1
    assert_close(experts(device, x, routing, layer.weights), layer(x, routing), 2e-2)


@few_and_many
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_padding_adds_nothing(
    device: Device,
    normal: Normal,
    route: Route,
    monkeypatch: pytest.MonkeyPatch,
    few: int,
    dtype: torch.dtype,
) -> None:
    monkeypatch.setattr(module, "FEW_PAIRS", few)
    layer = Layer(device, normal, (8, 64, 64))
    x, chosen = normal(6, 64, dtype=torch.bfloat16), route(6, 8, 2)
    routing = Routing(chosen.ids_TK.to(dtype), chosen.weights_TK, chosen.counts_E)
    routing.ids_TK[4:] = -1
    routing.ids_TK[1, 0] = -1
    routing.weights_TK[4:] = torch.nan
    x[4:] = torch.nan
    got = experts(device, x, routing, layer.weights)
    assert_close(got[:4], layer(x[:4], Routing(routing.ids_TK[:4], routing.weights_TK[:4])), 2e-2)
    assert not got[4:].any()
    assert torch.equal(routing.counts_E.cpu(), expected_counts(routing, 8))


def test_nothing_but_padding(device: Device, normal: Normal, route: Route) -> None:
    layer = Layer(device, normal, (8, 64, 64))
    x, routing = normal(2, 64, dtype=torch.bfloat16), route(2, 8, 2)
    routing.ids_TK.fill_(-1)
    assert not experts(device, x, routing, layer.weights).any()
    assert torch.equal(routing.counts_E.cpu(), torch.full((8,), 100))


@every_format
def test_a_token_has_the_same_bits_alone_and_among_many(
    device: Device, normal: Normal, route: Route, monkeypatch: pytest.MonkeyPatch, weight_format: WeightFormat
) -> None:
    sizes, tokens = ((4, 64, 72), 9) if device.interpreted else ((8, 640, 320), 700)
    layer = Layer(device, normal, sizes, weight_format)
    dtype = torch.float32 if weight_format == "float32" else torch.bfloat16
    x, routing = normal(tokens, sizes[1], dtype=dtype), route(tokens, sizes[0], 2)
    monkeypatch.setattr(module, "FEW_PAIRS", 0)
    together = experts(device, x, routing, layer.weights)
    monkeypatch.undo()
    for some in (slice(0, 1), slice(tokens - 1, tokens), slice(2, 7)):
        part = Routing(routing.ids_TK[some].contiguous(), routing.weights_TK[some].contiguous())
        alone = experts(device, x[some].contiguous(), part, layer.weights)
        assert torch.equal(alone, together[some]), some


@pytest.mark.parametrize("weight_format", BLOCK_INPUTS)
def test_slices_of_the_second_product_are_added_in_order(
    device: Device, normal: Normal, route: Route, weight_format: WeightFormat
) -> None:
    """A program for each slice, one for all of them, and either with biases."""
    layer = Layer(device, normal, (3, 64, 2100), weight_format, biased=True)
    assert slice_inputs(layer.weights.down) < 2100
    x, routing = normal(9, 64, dtype=torch.bfloat16), route(9, 3, 2)
    together = experts(device, x, routing, layer.weights)
    assert_close(together, layer(x, routing), 2e-2)
    part = Routing(routing.ids_TK[:2], routing.weights_TK[:2])
    assert torch.equal(experts(device, x[:2], part, layer.weights), together[:2])


@every_format
@few_and_many
def test_every_configuration_has_the_same_bits(
    device: Device, normal: Normal, route: Route, monkeypatch: pytest.MonkeyPatch,
    weight_format: WeightFormat, few: int,
) -> None:  # fmt: skip
    """On a device with large blocks too, in the interpreter with the smallest."""
    monkeypatch.setattr(module, "FEW_PAIRS", few)
    layer = Layer(device, normal, (2, 64, 72) if device.interpreted else (3, 320, 200), weight_format)
    dtype = torch.float32 if weight_format == "float32" else torch.bfloat16
    tokens = (3,) if device.interpreted else (5, 40, 120)
    for count in tokens:
        x, routing = normal(count, layer.weights.gate_up.cols, dtype=dtype), route(count, 2, 2)
        pairs = module.order_pairs(device, routing, layer.weights)
        first, second = (candidates(key) for key in module.keys(layer.weights, routing))
        if device.interpreted:  # which adds up a block of inputs by itself
            first, second = ([replace(c, block_cols=64) for c in configs] for configs in (first, second))
        hidden = [module.multiply_gate_up(device, x, pairs, layer.weights, config) for config in first]
        assert all(torch.equal(each, hidden[0]) for each in hidden)
        out = [module.multiply_down(device, hidden[0], pairs, layer.weights, config) for config in second]
        assert all(torch.equal(each, out[0]) for each in out)


@pytest.mark.parametrize(("count", "tokens", "top_k"), [(3, 1, 1), (8, 40, 2), (60, 9, 4), (5, 300, 4)])
def test_pairs_are_in_blocks_of_one_expert_in_the_order_of_the_step(
    device: Device, route: Route, count: int, tokens: int, top_k: int
) -> None:
    routing = route(tokens, count, top_k)
    routing.ids_TK[-1, -1] = -1
    blocks = align(device, routing.ids_TK, count, 16, None)
    ids, found = routing.ids_TK.flatten().tolist(), []
    experts_B = blocks.experts_B.tolist()
    num_live = sum(expert >= 0 for expert in experts_B)
    assert experts_B[:num_live] == sorted(experts_B[:num_live])
    assert all(expert == -1 for expert in experts_B[num_live:])
    for expert, pairs in zip(experts_B[:num_live], blocks.pairs_BT.tolist(), strict=False):
        real = [pair for pair in pairs if pair < len(ids)]
        assert pairs == real + [len(ids)] * (16 - len(real))
        assert all(ids[pair] == expert for pair in real)
        found += real
    assert found == sorted(
        (pair for pair, expert in enumerate(ids) if expert >= 0), key=lambda pair: (ids[pair], pair)
    )
