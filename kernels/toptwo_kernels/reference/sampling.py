"""From logits to the next token."""

from __future__ import annotations

import torch
from torch import Tensor

from toptwo_kernels.ops import SamplingBatch


def sample(logits_RV: Tensor, batch: SamplingBatch) -> Tensor:
    """See `ops.Ops.sample`. Everything is computed in float32."""
    logits = penalize(logits_RV.float(), batch)
    temperatures = batch.filters_R5[:, 0].float()
    ids = logits.argmax(-1)
    # The maximum is finite unless a logit is NaN or inf, or all are -inf.
    valid = logits.amax(-1).isfinite()
    for row in torch.nonzero(valid & (temperatures > 0)).flatten().tolist():
        # From the largest logit down: dividing by a tiny temperature must not overflow to inf - inf.
        shifted = logits[row] - logits[row].max()
        ids[row] = _draw(shifted / temperatures[row], batch.filters_R5[row])
    return torch.where(valid, ids, -1)


def penalize(logits_RV: Tensor, batch: SamplingBatch) -> Tensor:
    """Logits with the penalties of the rows that have any."""
    if not batch.penalty_rows:
        return logits_RV
    logits_RV = logits_RV.clone()
    vocab = logits_RV.shape[1]
    for i, row in enumerate(batch.penalty_rows):
        logits = logits_RV[row]
        if batch.repetition[i] != 1.0:
            seen = torch.unique(batch.context_tokens[i])
            at = logits[seen]
            logits[seen] = torch.where(at > 0, at / batch.repetition[i], at * batch.repetition[i])
        counts = torch.bincount(batch.generated_tokens[i], minlength=vocab)
        logits -= batch.presence[i] * (counts > 0) + batch.frequency[i] * counts
    return logits_RV


def _draw(logits_V: Tensor, filters: Tensor) -> Tensor:
    """One row, one draw: walk the kept tokens in a fixed order until the uniform is used up."""
    probs = logits_V.softmax(-1)
    top_k, top_p, min_p = int(filters[1]), float(filters[2]), float(filters[3])
    uniform = filters[4]
    if not (0 < top_k < len(probs)) and top_p >= 1.0 and min_p <= 0.0:
        return _invert(probs, uniform)
    # Stable: equal probabilities keep the order of their ids.
    probs, ids = torch.sort(probs, descending=True, stable=True)
    if 0 < top_k < len(probs):
        probs = probs[:top_k]
        probs = probs / probs.sum()
    if top_p < 1.0:
        # Keep a token while the mass before it has not reached top_p; the first is always kept.
        before = probs.cumsum(0) - probs
        probs = probs[before < top_p] if top_p > 0 else probs[:1]
    if min_p > 0.0:
        probs = probs[probs >= min_p * probs[0]]
    return ids[_invert(probs, uniform)]


def _invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """Index i with probability weights[i] / sum: the first whose running sum exceeds u * sum."""
    running = weights.double().cumsum(0)
    index = torch.searchsorted(running, (uniform * running[-1]).reshape(1), right=True)[0]
    # u * sum can round up to the sum itself; trailing zero weights must not be drawn then.
    return index.clamp(max=int(torch.nonzero(weights)[-1]))
