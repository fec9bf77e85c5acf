"""Tokens as readers of log-probabilities see them: a text, and the bytes behind it.

Knows the tokenizer and the engine's reports; must not know which endpoint shows them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from toptwo.messages import TokenLogprobs
from toptwo.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Likelihood:
    """A token and the natural logarithm of its probability. data: its bytes; a character may have several."""

    text: str
    logprob: float
    data: bytes


@dataclass(frozen=True)
class TokenReport:
    """A token of the text, and the likeliest ones at its place, best first."""

    token: Likelihood
    top: tuple[Likelihood, ...]


def report_tokens(
    tokenizer: Tokenizer, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]
) -> tuple[TokenReport, ...]:
    """The reports on the tokens, of which the engine sent one each."""

    if not logprobs:
        return ()

    def likelihood(token_id: int, logprob: float) -> Likelihood:
        # JSON has no infinity; a token that was impossible is as good as this.
        return Likelihood(
            tokenizer.decode([token_id]), max(logprob, LEAST_LOGPROB), tokenizer.token_bytes(token_id)
        )

    return tuple(
        TokenReport(
            likelihood(token_id, one.logprob),
            tuple(likelihood(i, p) for i, p in zip(one.top_ids, one.top_logprobs, strict=True)),
        )
        for token_id, one in zip(token_ids, logprobs, strict=False)
    )


LEAST_LOGPROB = -9999.0  # OpenAI's own number for "not at all"
