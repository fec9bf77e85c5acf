"""What a sampler may draw, by the definition, and settings and logits that try it.

Samplers add up the same weights to different roundings. Where a uniform or a limit (top_p, min_p) falls on a
boundary to within EPSILON they may disagree; every disagreement must have that reason.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from toptwo_kernels.ops import SamplingBatch

EPSILON = 1e-6
TEMPERATURES = (0.0, 0.3, 1.0, 1.7)
TOP_KS = (0, 1, 2, 40, 400)
TOP_PS = (0.0, 0.5, 0.9, 0.999, 1.0)
MIN_PS = (0.0, 0.05, 0.5, 1.0)
GRID = torch.tensor(list(itertools.product(TEMPERATURES, TOP_KS, TOP_PS, MIN_PS)), dtype=torch.float64)


def batch(filters_R5: Tensor) -> SamplingBatch:
    return SamplingBatch(filters_R5, [], [], [], [], [], [])


def make_logits(kind: str, rows: int, vocab: int, generator: torch.Generator) -> Tensor:
    logits = 3 * torch.randn(rows, vocab, generator=generator)
    if kind == "ties":
        logits = logits.round()
    elif kind == "masked":
        logits[torch.randn(rows, vocab, generator=generator) > -0.5] = -torch.inf
        logits[:, vocab // 2] = 1.0  # never all of them
    elif kind == "flat":
        logits /= 1000
    return logits


def possible(logits: Tensor, filters: list[float], token: int) -> bool:
    """Whether `token` is the draw by the definition, in float64, give or take EPSILON at every boundary."""
    temperature, top_k, top_p, min_p, uniform = filters
    logits = logits.double()
    if temperature == 0:
        return token == int(logits.argmax())
    weights = torch.exp((logits - logits.max()) / temperature)
    if not 0 < top_k < len(weights) and top_p >= 1 and min_p <= 0:
        end = float(weights[: token + 1].sum())
        return within(uniform * float(weights.sum()), end - float(weights[token]), end, float(weights.sum()))
    order = torch.sort(logits, descending=True, stable=True).indices
    if 0 < top_k < len(weights):
        order = order[: int(top_k)]
    ranked = weights[order]
    before, mass = ranked.cumsum(0) - ranked, float(ranked.sum())
    counts = [
        min(
            max(1, int((before < (top_p + slack) * mass).sum())) if top_p < 1 else len(ranked),
            max(1, int((ranked >= min_p * (1 - slack)).sum())),
        )
        for slack in (-EPSILON, EPSILON)
    ]
    # Tokens whose logits differ by next to nothing may be ranked either way; equal ones by their ids.
    mine, ids = weights[token], torch.arange(len(weights))
    close = ((weights / mine - 1).abs() < EPSILON) & (logits != logits[token])
    ahead = ((weights > mine) & ~close) | ((logits == logits[token]) & (ids < token))
    for count in {*counts, *range(counts[0], min(counts[1], counts[0] + 20))}:
        kept = torch.zeros(len(weights), dtype=torch.bool)
        kept[order[:count]] = True
        total = float(weights[kept].sum())
        begin = float(weights[kept & ahead].sum())
        end = begin + float(mine) + float(weights[close].sum())
        if (kept[token] or bool((kept & close).any())) and within(uniform * total, begin, end, total):
            return True
    return False


def within(value: float, begin: float, end: float, total: float) -> bool:
    return begin - EPSILON * total <= value <= end + EPSILON * total
