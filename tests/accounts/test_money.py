"""Amounts and prices, to the micro-credit."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toptwo.accounts.money import Price, Tokens, cost_of, format_credits, most_cost_of, parse_credits

counts = st.integers(0, 10**7)
prices = st.builds(Price, *[st.integers(0, 10**9)] * 3)


@given(st.integers(-(10**15), 10**15))
def test_amounts_are_read_as_they_are_written(micro: int) -> None:
    assert parse_credits(format_credits(micro)) == micro


@pytest.mark.parametrize("text", ["", "x", "nan", "inf", "1e30", "0.0000001", "1,5", "--1"])
def test_what_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="credit"):
        parse_credits(text)


@given(counts, counts, counts, prices)
def test_a_cost_is_exact_and_rounded_up_once(prompt: int, cached: int, completion: int, price: Price) -> None:
    cached = min(cached, prompt)
    exact = Fraction(
        (prompt - cached) * price.prompt + cached * price.cached + completion * price.completion, 10**6
    )
    cost = cost_of(Tokens(prompt, cached, completion), price)
    assert exact <= cost < exact + 1
    assert cost <= most_cost_of(Tokens(prompt, 0, completion), price)


def test_a_price_that_people_know() -> None:
    price = Price(prompt=270_000, cached=27_000, completion=270_000)
    assert cost_of(Tokens(1_000_000, 0, 1_000_000), price) == 540_000
    assert cost_of(Tokens(10, 10, 0), price) == 1
