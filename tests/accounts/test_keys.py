"""The format of keys: what is told of one without looking it up."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toptwo.accounts.keys import KeyKind, make_key, new_id, parse_key


@pytest.mark.parametrize(("kind", "prefix"), [("inference", "toptwo_sk_"), ("management", "toptwo_adm_")])
def test_a_key_says_what_it_is(kind: KeyKind, prefix: str) -> None:
    new = make_key(kind)
    assert re.fullmatch(rf"{prefix}[0-9A-Za-z]{{8}}_[0-9A-Za-z]{{49}}", new.text)
    assert parse_key(new.text) == new.key
    assert new.key.kind == kind
    assert new.key.id in new.text


def test_keys_differ_and_hold_256_bits() -> None:
    keys = [make_key("inference") for _ in range(200)]
    assert len({key.text for key in keys}) == len({key.key.id for key in keys}) == 200
    assert 43 * math.log2(62) >= 256
    assert len(new_id(12)) == 12


def test_a_key_is_not_shown_by_accident() -> None:
    new = make_key("inference")
    secret = new.text.split("_")[3]
    assert secret not in repr(new)
    assert secret not in repr(new.key)


@given(st.integers(0, 66), st.characters(codec="ascii"))
def test_one_wrong_character_is_noticed(at: int, character: str) -> None:
    text = make_key("inference").text
    changed = text[:at] + character + text[at + 1 :]
    assert (parse_key(changed) is not None) == (changed == text)


@given(st.text(max_size=200))
def test_whatever_is_no_key_is_none(text: str) -> None:
    assert parse_key(text) is None


def test_the_kinds_cannot_be_exchanged() -> None:
    text = make_key("inference").text
    assert parse_key(text.replace("toptwo_sk", "toptwo_adm")) is None
    assert parse_key(text + "\n") is None
    assert parse_key(" " + text) is None
    assert parse_key(text.replace("_", "_", 1).upper()) is None
