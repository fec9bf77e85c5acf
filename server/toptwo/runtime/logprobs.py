"""How likely the model found the tokens that came, and which it found likeliest.

Knows logits; must not know requests. A row's numbers depend on its own logits alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from toptwo.messages import TokenLogprobs


def describe(logprobs_NV: Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprobs]:
    """The report on N tokens, given the logarithms of the probabilities of their positions."""
    top_logprobs, top_ids = logprobs_NV.topk(min(num_top, logprobs_NV.shape[1]), dim=-1)
    own = [float(row[token]) for row, token in zip(logprobs_NV, token_ids, strict=True)]
    return [
        TokenLogprobs(logprob, ids, values)
        for logprob, ids, values in zip(own, top_ids.tolist(), top_logprobs.tolist(), strict=True)
    ]
