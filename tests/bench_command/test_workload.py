"""Lengths, prompts and arrivals: as asked for, and the same again for the same seed."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator

import pytest

from toptwo.bench.client import Call
from toptwo.bench.options import Length
from toptwo.bench.workload import NONCE_WORDS, WORDS, Shape, arrivals, calls


def first(count: int, stream: Iterator[Call]) -> list[Call]:
    return list(itertools.islice(stream, count))


@pytest.mark.parametrize("text", ["", "0", "-1", "a", "5:", ":5", "9:3", "0:3", "1:2:3", "1.5", str(1 << 25)])
def test_lengths_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"tokens|lengths"):
        Length.parse(text)


def test_lengths_fixed_and_drawn() -> None:
    assert Length.parse("94") == Length(94, 94)
    assert str(Length.parse("32:256")) == "32:256"
    shape = Shape(Length(94, 94), Length(5, 9))
    taken = first(200, calls(shape, seed=1))
    assert {len(call.prompt.split()) for call in taken} == {94}
    assert {call.max_tokens for call in taken} == {5, 6, 7, 8, 9}


def test_what_the_template_adds_is_taken_off() -> None:
    (call,) = first(1, calls(Shape(Length(94, 94), Length(1, 1), overhead=30), seed=0))
    assert len(call.prompt.split()) == 64
    (call,) = first(1, calls(Shape(Length(5, 5), Length(1, 1), overhead=30), seed=0))
    assert len(call.prompt.split()) == 1


def test_a_seed_repeats_the_work_but_no_prompt_begins_as_another() -> None:
    shape = Shape(Length(20, 40), Length(1, 100), temperature=0.5, extra={"x": 1}, timeout=3)
    once, again = first(50, calls(shape, seed=7)), first(50, calls(shape, seed=7))
    other = first(50, calls(shape, seed=8))
    assert [c.max_tokens for c in once] == [c.max_tokens for c in again] != [c.max_tokens for c in other]
    tails = [[c.prompt.split()[NONCE_WORDS:] for c in taken] for taken in (once, again, other)]
    assert tails[0] == tails[1] != tails[2]
    heads = {tuple(c.prompt.split()[:NONCE_WORDS]) for c in once + again + other}
    assert len(heads) == 150
    assert (once[0].temperature, once[0].extra, once[0].timeout) == (0.5, {"x": 1}, 3)


def test_a_shared_prefix_is_shared_and_the_rest_is_not() -> None:
    shape = Shape(Length(30, 30), Length(1, 1), shared_prefix=20)
    taken = [call.prompt.split() for call in first(20, calls(shape, seed=0))]
    assert len({tuple(words[:20]) for words in taken}) == 1
    assert len({tuple(words[20:24]) for words in taken}) == 20
    assert {len(words) for words in taken} == {30}


def test_words_are_plain_and_different() -> None:
    assert len(set(WORDS)) == len(WORDS) > 256
    assert all(word.isascii() and word.isalpha() and word.islower() for word in WORDS)


def test_arrivals_are_a_poisson_process() -> None:
    moments = list(itertools.islice(arrivals(5.0, seed=3), 20_000))
    gaps = [later - earlier for earlier, later in itertools.pairwise([0.0, *moments])]
    # Gaps are exponential: mean and standard deviation are both 1 / rate, here within 4 standard errors.
    assert statistics.mean(gaps) == pytest.approx(0.2, rel=4 / 20_000**0.5)
    assert statistics.stdev(gaps) == pytest.approx(0.2, rel=0.06)
    assert sum(gap > 0.2 for gap in gaps) / len(gaps) == pytest.approx(0.3679, abs=0.015)


def test_arrivals_follow_from_the_seed() -> None:
    once, again, other = (list(itertools.islice(arrivals(2, seed), 100)) for seed in (1, 1, 2))
    assert once == again != other
    assert once == sorted(once)
