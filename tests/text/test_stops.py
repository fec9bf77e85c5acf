"""The stop matcher: nothing of a stop string is ever shown, however the text is cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toptwo.text.stops import StopMatcher

few_letters = st.text(alphabet="ab", max_size=40)
stop_lists = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=4)


def feed(stops: list[str], pieces: list[str]) -> tuple[str, str | None]:
    matcher = StopMatcher(stops)
    shown = "".join(matcher.push(piece) for piece in pieces) + matcher.flush()
    return shown, matcher.matched


def expected(stops: list[str], text: str) -> tuple[str, str | None]:
    """The plain definition: the first place where the text so far ends with a stop string."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(stop_lists, few_letters, st.lists(st.integers(0, 40), max_size=8))
def test_any_split_gives_the_definition(stops: list[str], text: str, cuts: list[int]) -> None:
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(borders)]
    assert feed(stops, pieces) == expected(stops, text)
    assert feed(stops, list(text)) == expected(stops, text)


@given(stop_lists, st.lists(few_letters, max_size=6))
def test_shown_text_is_never_taken_back(stops: list[str], pieces: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown, fed = "", ""
    for piece in pieces:
        fed += piece
        shown += matcher.push(piece)
        assert expected(stops, fed)[0].startswith(shown)


@pytest.mark.parametrize(
    ("stops", "pieces", "shown"),
    [
        (["\n\n"], ["one\n", "\ntwo"], "one"),
        (["END"], ["the E", "N", "DING"], "the "),
        (["END"], ["the EN"], "the EN"),
        (["bc", "abc"], ["xab", "c"], "x"),
        (["é"], ["caf", "é!"], "caf"),
        ([], ["all ", "of it"], "all of it"),
    ],
)
def test_examples(stops: list[str], pieces: list[str], shown: str) -> None:
    assert feed(stops, pieces)[0] == shown


def test_only_a_possible_beginning_is_held_back() -> None:
    matcher = StopMatcher(["STOP"])
    assert matcher.push("ST") == ""
    assert matcher.push("ART") == "START"
    assert matcher.push("abc") == "abc"


def test_nothing_comes_after_a_match() -> None:
    matcher = StopMatcher(["."])
    assert matcher.push("a.b") == "a"
    assert matcher.push("c") == ""
    assert matcher.flush() == ""
