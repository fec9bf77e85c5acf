"""A router by ridge regression: which expert's domain a token is of, told from what enters the MLP.

One-vs-rest, without a bias, as Mixtral's router has none; no gradients. Knows sums over tokens; must not know
where tokens come from. Source of the method and of what it reaches: MODEL_CARD.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from rich.table import Table
from torch import Tensor

RIDGE = 1e-2  # penalty, as a share of the mean variance of an input coordinate
FIRST_EXPERT_WEIGHT = 0.7  # mean weight of the first of two chosen experts


class Ridge:
    """Sums that a regression needs, for every layer at once."""

    def __init__(self, num_layers: int, num_experts: int, hidden_size: int) -> None:
        self._covariance_LHH = torch.zeros(num_layers, hidden_size, hidden_size, dtype=torch.float64)
        self._correlation_LEH = torch.zeros(num_layers, num_experts, hidden_size, dtype=torch.float64)

    def add(self, layer: int, x_TH: Tensor, expert: int) -> None:
        """What entered a layer's MLP for tokens of an expert's domain."""
        num_experts = self._correlation_LEH.shape[1]
        # Centred labels: the same choice, but the rows of a layer add up to (nearly) zero.
        label_E = torch.full((num_experts,), -1 / num_experts, dtype=torch.float64)
        label_E[expert] += 1
        self._covariance_LHH[layer] += (x_TH.T @ x_TH).double()
        self._correlation_LEH[layer] += torch.outer(label_E, x_TH.sum(0).double())

    def solve(self) -> Tensor:
        """The routers [L, E, H], float32."""
        covariance = self._covariance_LHH
        penalty_L = RIDGE * covariance.diagonal(dim1=1, dim2=2).mean(1)
        identity = torch.eye(covariance.shape[1], dtype=torch.float64)
        regularised = covariance + penalty_L[:, None, None] * identity
        # Symmetric and positive. (The general solver fails in torch 2.13 with MKL: batches, several threads.)
        rows = torch.cholesky_solve(self._correlation_LEH.mT, torch.linalg.cholesky(regularised)).mT
        return rows.float().contiguous()


def scale_for(logits_TE: Tensor) -> Tensor:
    """The factor at which the first chosen expert has FIRST_EXPERT_WEIGHT of the weight on average.

    It changes no choice, only how decided it is.
    """
    best = logits_TE.topk(2).values
    gap_T = best[:, 0] - best[:, 1]
    low, high = torch.tensor(0.0), torch.tensor(1e4)
    for _ in range(60):
        middle = (low + high) / 2
        # The softmax of two logits is the logistic function of their difference.
        if torch.sigmoid(middle * gap_T).mean() < FIRST_EXPERT_WEIGHT:
            low = middle
        else:
            high = middle
    return high


def measure(logits_LTE: Tensor, labels_T: Tensor, names: Sequence[str], top_k: int) -> dict[str, float]:
    """How some layers route: means over layers and tokens, loads over all chosen slots of a layer.

    names: of the experts' domains; labels: the expert of each token's domain.
    """
    best = logits_LTE.topk(top_k)
    own = (best.indices[..., 0] == labels_T).float()
    loads = torch.stack([torch.bincount(each.flatten(), minlength=len(names)) for each in best.indices])
    share = loads / loads.sum(1, keepdim=True)
    entropy = torch.special.entr(share).sum(1) / math.log(len(names))
    chosen = (best.indices == labels_T[:, None]).any(-1).float()
    return {
        "top-1 = own expert": own.mean().item(),
        **{f"  {name}": own[:, labels_T == index].mean().item() for index, name in enumerate(names)},
        f"own expert in the top {top_k}": chosen.mean().item(),
        "load entropy (1 = even), mean of layers": entropy.mean().item(),
        "largest expert share, worst layer": share.max().item(),
        "weight of the first expert, mean": best.values.softmax(-1)[..., 0].mean().item(),
    }


def report(logits_LTE: Tensor, labels_T: Tensor, names: Sequence[str], top_k: int) -> Table:
    """What `measure` says of each third of the layers."""
    thirds = torch.arange(len(logits_LTE)).chunk(3)
    measures = [measure(logits_LTE[layers], labels_T, names, top_k) for layers in thirds]
    headings = [f"{int(layers[0])}-{int(layers[-1])}" for layers in thirds]
    table = Table("layers", *headings, title=f"routing of {len(labels_T)} held-out tokens")
    for name in measures[0]:
        table.add_row(name, *(f"{values[name]:.3f}" for values in measures))
    return table
