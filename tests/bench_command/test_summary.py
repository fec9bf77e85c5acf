"""The arithmetic, against values computed by hand."""

from __future__ import annotations

from dataclasses import astuple

import pytest

from toptwo.bench.client import Outcome
from toptwo.bench.load import Level, LevelRun
from toptwo.bench.options import Limits
from toptwo.bench.summary import is_good, percentile, spread, summarise, token_gap


@pytest.mark.parametrize(
    ("values", "percent", "value"),
    [
        ([7.0], 99, 7.0),
        ([1.0, 2.0], 50, 1.5),
        ([4.0, 1.0, 3.0, 2.0], 0, 1.0),
        ([4.0, 1.0, 3.0, 2.0], 50, 2.5),
        ([4.0, 1.0, 3.0, 2.0], 90, 3.7),
        ([4.0, 1.0, 3.0, 2.0], 100, 4.0),
        ([float(n) for n in range(1, 102)], 99, 100.0),
        ([10.0, 20.0, 30.0], 99, 29.8),
    ],
)
def test_percentiles(values: list[float], percent: float, value: float) -> None:
    assert percentile(values, percent) == pytest.approx(value)


def test_a_spread_is_in_milliseconds() -> None:
    found = spread([0.002, 0.001, 0.003])
    assert found is not None
    assert astuple(found) == pytest.approx((3, 2.0, 2.0, 2.8, 2.98, 3.0))
    assert spread([]) is None


# Started at 10 s; text at 10.5, 10.6 and 10.9; ended at 11.
ANSWER = Outcome(10.0, [10.5, 10.6, 10.9], 11.0, prompt_tokens=30, completion_tokens=3)
LATE = Outcome(10.0, [11.5, 12.5], 14.0, prompt_tokens=50, completion_tokens=5)
SILENT = Outcome(10.0, [], 10.5, prompt_tokens=40, completion_tokens=1)
FAILED = Outcome(10.0, [10.1], 13.0, prompt_tokens=99, completion_tokens=99, error="cut short")
REFUSED = Outcome(10.0, [], 10.0, error="http 429")


def test_the_figures_of_a_level() -> None:
    run = LevelRun(Level(concurrency=5), 10.0, 14.0, [ANSWER, LATE, SILENT, FAILED, REFUSED, REFUSED])
    found = summarise(run, Limits(ttft=600))
    assert (found.num_ok, found.num_failed, found.seconds) == (3, 3, 4.0)
    assert found.request_rate == 3 / 4
    assert found.output_rate == (3 + 5 + 1) / 4
    assert found.prompt_rate == (30 + 50 + 40) / 4
    assert (found.mean_prompt_tokens, found.mean_output_tokens) == (40, 3)
    assert found.tokens_per_chunk == 9 / 5
    assert found.ttft is not None
    assert (found.ttft.count, found.ttft.p50, found.ttft.max) == pytest.approx((2, 1000, 1500))
    assert found.inter_token is not None
    assert (found.inter_token.count, found.inter_token.p50) == pytest.approx((3, 300))
    assert found.end_to_end is not None
    assert (found.end_to_end.p50, found.end_to_end.max) == (1000, 4000)
    assert found.goodput == 1 / 4
    assert found.errors == {"http 429": 2, "cut short": 1}
    assert list(found.errors) == ["http 429", "cut short"]


def test_nothing_stated_and_nothing_counted() -> None:
    outcome = Outcome(0.0, [1.0, 2.0], 2.0)
    found = summarise(LevelRun(Level(concurrency=1), 0.0, 2.0, [outcome]), Limits())
    assert (found.goodput, found.prompt_rate, found.mean_prompt_tokens) == (None, None, None)
    assert (found.output_rate, found.tokens_per_chunk) == (1.0, 1.0)


def test_a_level_without_answers() -> None:
    found = summarise(LevelRun(Level(concurrency=1), 5.0, 5.0, [REFUSED]), Limits(itl=1))
    assert (found.num_ok, found.request_rate, found.output_rate, found.goodput) == (0, 0, 0, 0)
    assert (found.ttft, found.inter_token, found.end_to_end) == (None, None, None)


def test_the_gap_is_per_token_not_per_chunk() -> None:
    assert token_gap(ANSWER) == pytest.approx(0.2)
    assert token_gap(LATE) == pytest.approx(0.25)
    assert token_gap(SILENT) is None


@pytest.mark.parametrize(
    ("outcome", "limits", "good"),
    [
        (ANSWER, Limits(ttft=500), True),
        (ANSWER, Limits(ttft=499), False),
        (ANSWER, Limits(itl=201), True),
        (ANSWER, Limits(itl=199), False),
        (ANSWER, Limits(ttft=499, itl=201), False),
        (ANSWER, Limits(ttft=500, itl=199), False),
        (SILENT, Limits(ttft=9999), False),
        (SILENT, Limits(itl=1), True),
        (FAILED, Limits(ttft=9999), False),
    ],
)
def test_goodput_wants_all_limits_kept(outcome: Outcome, limits: Limits, good: bool) -> None:
    assert is_good(outcome, limits) == good
