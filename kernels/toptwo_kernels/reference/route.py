"""The router's choice."""

from __future__ import annotations

import torch
from torch import Tensor

from toptwo_kernels.ops import Matrix, RouterSpec, Routing
from toptwo_kernels.reference.linear import product


def route(x_TH: Tensor, router: Matrix, spec: RouterSpec) -> Routing:
    """See `ops.Ops.route`."""
    return choose(product(x_TH.float(), router, 0), spec)


def choose(logits_TE: Tensor, spec: RouterSpec) -> Routing:
    """The rule itself, from logits in float32."""
    logits = logits_TE.float()
    scores = logits if spec.over_selected else _score(logits, spec)
    # A stable sort, because torch.topk does not promise which of two equal experts comes first.
    chosen, ids = torch.sort(scores, dim=-1, descending=True, stable=True)
    chosen, ids = chosen[:, : spec.top_k], ids[:, : spec.top_k]
    weights = _score(chosen, spec) if spec.over_selected else chosen
    if spec.renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return Routing(ids.contiguous(), (weights * spec.scale).contiguous())


def _score(logits: Tensor, spec: RouterSpec) -> Tensor:
    return logits.softmax(-1) if spec.score == "softmax" else logits.sigmoid()
