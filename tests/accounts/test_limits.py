"""Token buckets: what gets through in any time, and when who was refused may come back."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toptwo.accounts.caller import Caller, Limits
from toptwo.accounts.limits import Bucket, RateLimits


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@given(st.integers(1, 500), st.lists(st.tuples(st.floats(0, 20), st.integers(1, 50)), max_size=60))
def test_no_more_than_a_minutes_worth_and_what_comes_back(limit: int, steps: list[tuple[float, int]]) -> None:
    clock = Clock()
    bucket, taken = Bucket(limit, clock), 0
    for pause, count in steps:
        clock.now += pause
        if not bucket.wait_for(count):
            bucket.take(count)
            taken += count
        assert 0 <= bucket.remaining <= limit
    assert taken <= limit * (1 + (clock.now - 1000) / 60) + 1e-6


@given(st.integers(1, 500), st.integers(1, 500))
def test_the_wait_is_long_enough_and_no_longer(limit: int, count: int) -> None:
    clock = Clock()
    bucket = Bucket(limit, clock)
    bucket.take(limit)
    wait = bucket.wait_for(count)
    if count > limit:
        assert math.isinf(wait)
        return
    clock.now += wait * 0.99
    assert bucket.wait_for(count) > 0
    clock.now += wait * 0.01 + 1e-6
    assert bucket.wait_for(count) == 0


def test_who_is_refused_is_told_of_another_place() -> None:
    clock = Clock()
    bucket = Bucket(60, clock)
    bucket.take(60)
    promised = [bucket.promise(1) for _ in range(5)]
    assert [round(seconds) for seconds in promised] == [1, 2, 3, 4, 5]
    assert max(bucket.promise(1) for _ in range(200)) <= 60


def test_what_was_not_needed_comes_back_and_no_more() -> None:
    clock = Clock()
    bucket = Bucket(100, clock)
    bucket.take(80)
    bucket.give_back(50)
    assert bucket.remaining == 70
    bucket.give_back(50)
    assert bucket.remaining == 100
    assert bucket.reset_seconds == 0


def test_a_limit_that_changes_keeps_what_was_taken() -> None:
    clock = Clock()
    rates = RateLimits(clock)

    def bucket(limit: int) -> Bucket:
        owners = rates.of(Caller("k", "a", key_limits=Limits(requests_per_minute=limit)))
        assert owners[0].requests is not None
        return owners[0].requests

    bucket(10).take(8)
    assert bucket(20).remaining == 12
    assert bucket(5).remaining == -3
    assert bucket(5).wait_for(1) == pytest.approx(48)


def test_keys_of_one_account_share_its_buckets() -> None:
    rates = RateLimits(Clock())
    limits = Limits(tokens_per_minute=100)
    one = rates.of(Caller("k1", "a", account_limits=limits))[1].tokens
    two = rates.of(Caller("k2", "a", account_limits=limits))[1].tokens
    assert one is two is not None
