"""The router's choice."""

from __future__ import annotations

import torch
from torch import Tensor

from toptwo_kernels.ops import RouterSpec, RouterWeights, Routing
from toptwo_kernels.reference.linear import product


def route(x_TH: Tensor, router: RouterWeights, spec: RouterSpec) -> Routing:
    """See `ops.Ops.route`."""
    logits_TE = product(x_TH.float(), router.matrix, 0)
    if router.logit_bias_E is not None:
        logits_TE = logits_TE + router.logit_bias_E
    return choose(logits_TE, spec, router.selection_bias_E)


def choose(logits_TE: Tensor, spec: RouterSpec, selection_bias_E: Tensor | None = None) -> Routing:
    """The rule itself, from logits in float32."""
    logits = logits_TE.float()
    if spec.score == "sparsemixer":
        return _mix_sparsely(logits, spec)
    scores = logits if spec.over_selected else _score(logits, spec)
    ranked = scores if selection_bias_E is None else scores + selection_bias_E
    if spec.num_groups > 1:
        ranked = _within_best_groups(ranked, spec)
    ids = _best(ranked, spec.top_k)
    weights = scores.gather(-1, ids)
    if spec.over_selected:
        weights = _score(weights, spec)
    if spec.renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return Routing(ids, weights * spec.scale)


def _best(ranked: Tensor, count: int) -> Tensor:
    """Indices of the largest, best first."""
    # A stable sort, because torch.topk does not promise which of two equal experts comes first.
    return torch.sort(ranked, dim=-1, descending=True, stable=True).indices[..., :count].contiguous()


def _score(logits: Tensor, spec: RouterSpec) -> Tensor:
    return logits.softmax(-1) if spec.score == "softmax" else logits.sigmoid()


def _within_best_groups(ranked_TE: Tensor, spec: RouterSpec) -> Tensor:
    """Ranked scores with -inf for every expert outside the best groups."""
    grouped = ranked_TE.view(len(ranked_TE), spec.num_groups, -1)
    strongest = grouped.topk(1 if spec.group_score == "best" else 2, dim=-1).values.sum(-1)
    kept = torch.zeros_like(strongest, dtype=torch.bool).scatter_(-1, _best(strongest, spec.top_groups), True)
    return grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(-2)


def _mix_sparsely(logits_TE: Tensor, spec: RouterSpec) -> Routing:
    """Two experts, each weighted among the logits that come near its own (arXiv 2409.12136)."""
    left, ids, weights = logits_TE, [], []
    for _ in range(spec.top_k):
        chosen = _best(left, 1)
        most = left.gather(-1, chosen)
        distance = (most - logits_TE) / torch.maximum(logits_TE.abs(), most)
        near = left.masked_fill(distance > 2 * spec.jitter, float("-inf")).softmax(-1)
        ids.append(chosen)
        weights.append(near.gather(-1, chosen))
        left = left.scatter(-1, chosen, float("-inf"))
    return Routing(torch.cat(ids, -1), torch.cat(weights, -1) * spec.scale)
