"""The ways of gating that a `RouterSpec` describes besides top-k with renormalisation, on both backends,
against sums over experts written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from toptwo.moe.experts import Experts
from toptwo.moe.layer import MoELayer
from toptwo.moe.router import Router
from toptwo_kernels.ops import ExpertWeights, RouterSpec, RouterWeights
from toptwo_kernels.registry import BACKENDS, load_backend

HIDDEN, FFN = 24, 16


class Mixture:
    """Random experts and a random gate."""

    def __init__(self, num_experts: int, num_tokens: int) -> None:
        random = torch.Generator().manual_seed(100 * num_experts + num_tokens)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random)

        self.x_TH = draw(num_tokens, HIDDEN)
        self.gate_EH, self.bias_E = draw(num_experts, HIDDEN) / 5, draw(num_experts)
        self.gate_up_EFH = draw(num_experts, 2 * FFN, HIDDEN) / 5
        self.down_EHF = draw(num_experts, HIDDEN, FFN) / 4

    def layer(self, backend: str, spec: RouterSpec) -> MoELayer:
        ops = load_backend(backend, num_threads=1)
        router = RouterWeights(ops.pack(self.gate_EH, "float32"), self.bias_E)
        gate_up = ops.pack(self.gate_up_EFH, "float32", paired=True)
        experts = ExpertWeights(gate_up, ops.pack(self.down_EHF, "float32"))
        return MoELayer(Router(router, spec, ops), Experts(experts, ops))

    def logits(self) -> Tensor:
        """[T, E], in float64 as all that follows."""
        return self.x_TH.double() @ self.gate_EH.double().T + self.bias_E.double()

    def outputs(self) -> Tensor:
        """[T, E, H]: what every expert makes of every token."""
        both = torch.einsum("th,efh->tef", self.x_TH.double(), self.gate_up_EFH.double())
        gate, up = both.chunk(2, dim=-1)
        return torch.einsum("tef,ehf->teh", gate * gate.sigmoid() * up, self.down_EHF.double())

    def weighted(self, weights_TE: Tensor) -> Tensor:
        return torch.einsum("te,teh->th", weights_TE, self.outputs()).float()


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(params=[(1, 3), (4, 1), (5, 7), (8, 33), (40, 2)], ids=lambda shape: "{}x{}".format(*shape))
def mixture(request: pytest.FixtureRequest) -> Mixture:
    return Mixture(*request.param)


@pytest.mark.parametrize("renormalize", [False, True])
def test_dense_gating_is_the_mixture_of_1991(backend: str, mixture: Mixture, renormalize: bool) -> None:
    """Every expert is heard, by its softmax (Jacobs, Jordan, Nowlan, Hinton: Adaptive Mixtures of Local
    Experts). Softmax weights add up to 1, so there is nothing to renormalise."""
    num_experts = len(mixture.gate_EH)
    layer = mixture.layer(backend, RouterSpec(num_experts, num_experts, renormalize=renormalize))
    routing = layer.router(mixture.x_TH)
    assert routing.ids_TK.sort(-1).values.tolist() == [list(range(num_experts))] * len(mixture.x_TH)
    expected = mixture.weighted(mixture.logits().softmax(-1))
    torch.testing.assert_close(layer(mixture.x_TH), expected, atol=1e-5, rtol=1e-4)


def test_dense_gating_by_sigmoids_weighs_every_expert_for_itself(backend: str, mixture: Mixture) -> None:
    num_experts = len(mixture.gate_EH)
    spec = RouterSpec(num_experts, num_experts, score="sigmoid", renormalize=False)
    expected = mixture.weighted(mixture.logits().sigmoid())
    torch.testing.assert_close(mixture.layer(backend, spec)(mixture.x_TH), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_soft_weights_are_the_softmax_over_all_experts(backend: str, top_k: int, scale: float) -> None:
    """With one expert it is Switch's gate (arXiv 2101.03961), with more OLMoE's: what the experts left out
    would have got is lost."""
    mixture = Mixture(8, 17)
    layer = mixture.layer(backend, RouterSpec(8, top_k, renormalize=False, scale=scale))
    probabilities = mixture.logits().softmax(-1)
    left_out = probabilities.argsort(-1, descending=True)[:, top_k:]
    expected = mixture.weighted(scale * probabilities.scatter(-1, left_out, 0.0))
    torch.testing.assert_close(layer(mixture.x_TH), expected, atol=1e-5, rtol=1e-4)
    weights = layer.router(mixture.x_TH).weights_TK
    assert (weights.sum(-1) < scale).all()


def test_a_single_expert_of_weight_one_is_a_dense_network(backend: str) -> None:
    mixture = Mixture(1, 9)
    layer = mixture.layer(backend, RouterSpec(1, 1))
    torch.testing.assert_close(layer(mixture.x_TH), mixture.outputs()[:, 0].float(), atol=1e-5, rtol=1e-4)
