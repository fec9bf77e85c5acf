"""The detokenizer: joined pieces are the whole text, and no piece shows half a character."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes import byte_fallback_vocabulary, byte_level_vocabulary
from toptwo.text.detokenizer import Detokenizer
from toptwo.text.tokenizer import Tokenizer

BYTE_LEVEL = Tokenizer(byte_level_vocabulary())
BYTE_FALLBACK = Tokenizer(byte_fallback_vocabulary())
VOCABULARIES = pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK], ids=["level", "fallback"])

texts = st.text(alphabet=st.one_of(st.sampled_from("hello wim "), st.characters(codec="utf-8")), max_size=30)


def feed(tokenizer: Tokenizer, groups: list[list[int]]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(group) for group in groups), detokenizer.flush()]


def groups_of(ids: list[int], size: int) -> list[list[int]]:
    return [ids[i : i + size] for i in range(0, len(ids), size)]


@VOCABULARIES
@given(text=texts, size=st.integers(1, 5))
def test_pieces_join_to_the_whole(tokenizer: Tokenizer, text: str, size: int) -> None:
    ids = tokenizer.encode([text])
    pieces = feed(tokenizer, groups_of(ids, size))
    assert "".join(pieces) == tokenizer.decode([i for i in ids if tokenizer.has_text(i)])
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)


@given(st.lists(st.integers(0, 270), max_size=40), st.integers(1, 5))
def test_any_bytes_join_to_the_whole(ids: list[int], size: int) -> None:
    text = "".join(feed(BYTE_LEVEL, groups_of(ids, size)))
    assert text == BYTE_LEVEL.decode([i for i in ids if BYTE_LEVEL.has_text(i)])


@given(st.lists(st.integers(0, 310), max_size=40), st.integers(1, 5))
def test_stray_bytes_never_raise(ids: list[int], size: int) -> None:
    feed(BYTE_FALLBACK, groups_of(ids, size))


def test_characters_wait_for_their_last_byte() -> None:
    ids = BYTE_LEVEL.encode(["a👍b"])
    assert len(ids) == 6
    assert feed(BYTE_LEVEL, groups_of(ids, 1)) == ["a", "", "", "", "👍", "b", ""]


def test_half_a_character_is_shown_at_the_end() -> None:
    ids = BYTE_LEVEL.encode(["a👍"])[:-1]
    assert feed(BYTE_LEVEL, [ids]) == ["", "a\ufffd"]


def test_a_leading_space_survives_between_pieces() -> None:
    ids = BYTE_FALLBACK.encode(["hello hello"])
    assert "".join(feed(BYTE_FALLBACK, groups_of(ids, 1))) == "hello hello"


def test_control_and_unknown_tokens_are_not_shown() -> None:
    end = BYTE_LEVEL.encode(["<|im_end|>"])
    assert len(end) == 1
    ids = [*BYTE_LEVEL.encode(["hello"]), *end, 100_000, *BYTE_LEVEL.encode([" wo"])]
    assert "".join(feed(BYTE_LEVEL, groups_of(ids, 1))) == "hello wo"


def test_endless_noise_does_not_pile_up() -> None:
    noise = BYTE_LEVEL.encode(["👍"])[:1]
    detokenizer = Detokenizer(BYTE_LEVEL)
    shown = "".join(detokenizer.push(noise) for _ in range(2000))
    assert len(shown) > 1500


@VOCABULARIES
@given(text=texts, before=st.sampled_from(["hell", "a ", "hello w"]))
def test_a_text_that_goes_on_keeps_its_first_space(tokenizer: Tokenizer, text: str, before: str) -> None:
    """Decoders of the SentencePiece family drop a space at the start of a text."""
    prompt, ids = tokenizer.encode([before]), tokenizer.encode([before + text])
    if ids[: len(prompt)] != prompt:
        return  # the border melted into a token
    detokenizer = Detokenizer(tokenizer, before=prompt)
    pieces = [*(detokenizer.push([token]) for token in ids[len(prompt) :]), detokenizer.flush()]
    assert tokenizer.decode(prompt) + "".join(pieces) == tokenizer.decode(ids)


def test_control_tokens_show_where_somebody_needs_them() -> None:
    (control,) = BYTE_LEVEL.encode(["<|im_end|>"])
    assert Detokenizer(BYTE_LEVEL).push([control]) == ""
    assert Detokenizer(BYTE_LEVEL, frozenset([control])).push([control]) == "<|im_end|>"
