"""From outcomes to figures: percentiles, throughput, goodput. Pure arithmetic.

Latencies are those of requests that were answered; a request that failed counts as failed and nowhere else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from toptwo.bench.client import Outcome
from toptwo.bench.load import LevelRun
from toptwo.bench.options import Limits


@dataclass(frozen=True)
class Spread:
    """How a latency is distributed, in milliseconds."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True)
class Summary:
    """The figures of one level; per second means from its first request to the end of its last.

    prompt_rate, mean_prompt_tokens: None when the server does not count prompt tokens.
    tokens_per_chunk: more than 1 when a server sends several tokens at once; inter_token is between chunks.
    goodput: requests per second that kept to all limits; None when none is stated.
    """

    num_ok: int
    num_failed: int
    seconds: float
    request_rate: float
    output_rate: float
    prompt_rate: float | None
    mean_prompt_tokens: float | None
    mean_output_tokens: float | None
    tokens_per_chunk: float | None
    ttft: Spread | None
    inter_token: Spread | None
    end_to_end: Spread | None
    goodput: float | None
    errors: dict[str, int] = field(default_factory=dict)


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which so many per cent lie, interpolated between neighbours as numpy does."""
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    below = int(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (rank - below)


def spread(seconds: Sequence[float]) -> Spread | None:
    """The distribution of some latencies; None of none."""
    if not seconds:
        return None
    values = sorted(1000 * value for value in seconds)
    p50, p90, p99 = (percentile(values, percent) for percent in (50, 90, 99))
    return Spread(len(values), sum(values) / len(values), p50, p90, p99, values[-1])


def num_tokens(outcome: Outcome) -> int:
    """Generated tokens: as the server counted them, or else one per chunk."""
    if outcome.completion_tokens is None:
        return len(outcome.token_times)
    return outcome.completion_tokens


def token_gap(outcome: Outcome) -> float | None:
    """Mean seconds between the tokens of an answer, however they were put into chunks; None of one."""
    if len(outcome.token_times) < 2:
        return None
    return (outcome.token_times[-1] - outcome.token_times[0]) / (max(num_tokens(outcome), 2) - 1)


def is_good(outcome: Outcome, limits: Limits) -> bool:
    """Whether an answer came, and came within all limits."""
    if outcome.error is not None:
        return False
    if limits.ttft is not None and (outcome.ttft is None or 1000 * outcome.ttft > limits.ttft):
        return False
    gap = token_gap(outcome)
    return limits.itl is None or gap is None or 1000 * gap <= limits.itl


def summarise(run: LevelRun, limits: Limits) -> Summary:
    """All figures of a level."""
    ok = [outcome for outcome in run.outcomes if outcome.error is None]
    # A level in which nothing was asked took no time; its rates are 0, not infinite.
    seconds = run.ended - run.started
    per_second = 1 / seconds if seconds > 0 else 0.0
    prompts = [outcome.prompt_tokens for outcome in ok if outcome.prompt_tokens is not None]
    outputs = [num_tokens(outcome) for outcome in ok]
    num_chunks = sum(len(outcome.token_times) for outcome in ok)
    good = sum(is_good(outcome, limits) for outcome in ok)
    return Summary(
        num_ok=len(ok),
        num_failed=len(run.outcomes) - len(ok),
        seconds=seconds,
        request_rate=len(ok) * per_second,
        output_rate=sum(outputs) * per_second,
        prompt_rate=sum(prompts) * per_second if prompts else None,
        mean_prompt_tokens=sum(prompts) / len(prompts) if prompts else None,
        mean_output_tokens=sum(outputs) / len(outputs) if outputs else None,
        tokens_per_chunk=sum(outputs) / num_chunks if num_chunks else None,
        ttft=spread([outcome.ttft for outcome in ok if outcome.ttft is not None]),
        inter_token=spread([gap for outcome in ok for gap in outcome.inter_token]),
        end_to_end=spread([outcome.end_to_end for outcome in ok]),
        goodput=good * per_second if limits.stated else None,
        errors=dict(Counter(o.error for o in run.outcomes if o.error is not None).most_common()),
    )
