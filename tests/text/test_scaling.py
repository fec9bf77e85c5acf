"""Twice as much text takes about twice as long, whatever the text: nothing about it is quadratic."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from fakes import byte_fallback_vocabulary, chat_tokenizer, served_model
from toptwo.text.detokenizer import Detokenizer
from toptwo.text.stops import StopMatcher
from toptwo.text.tokenizer import Tokenizer

MOST_RATIO = 2.6  # of the times for twice the size and for the size; 4 would be quadratic
REPEATS, MOST_TRIES = 3, 5
TEXTS = {
    "words": "hello world ",
    "one word": "hello",
    "digits": "1",
    "spaces": " ",
    "lines": "\n",
    "controls": "<|im_start|>",
    "halves": "<|im_",
    "smileys": "\U0001f600",
    "accents": "e\u0301",
}


@pytest.fixture(autouse=True)
def _keep_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long giving memory back takes, after large texts only, depends on all that the process held."""
    monkeypatch.setattr("toptwo.text.tokenizer.give_memory_back", lambda: None)


def ratio(work: Callable[[int], object], size: int) -> float:
    """How much longer twice the size takes, in CPU time: over two doublings, at the best of a few tries."""

    def seconds(size: int) -> float:
        began = time.process_time()
        work(size)
        return time.process_time() - began

    work(size)
    found = []
    for _ in range(MOST_TRIES):
        short, long = (min(seconds(n) for _ in range(REPEATS)) for n in (size, 4 * size))
        found.append((long / short) ** 0.5)
        if found[-1] <= MOST_RATIO:
            break
    return min(found)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("vocabulary", ["byte level", "byte fallback"])
def test_tokenizing(vocabulary: str, text: str) -> None:
    tokenizer = chat_tokenizer() if vocabulary == "byte level" else Tokenizer(byte_fallback_vocabulary())
    assert ratio(lambda size: tokenizer.encode([text * (size // len(text))]), 30_000) <= MOST_RATIO


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_making_a_prompt(text: str) -> None:
    model = served_model()

    def make(size: int) -> None:
        model.prompt_of([{"role": "user", "content": text * (size // len(text))}])

    assert ratio(make, 30_000) <= MOST_RATIO


def test_making_a_prompt_of_many_messages() -> None:
    model = served_model()
    message = {"role": "user", "content": "hello <|im_end|> world"}
    assert ratio(lambda size: model.prompt_of([message] * size), 500) <= MOST_RATIO


@pytest.mark.parametrize("token", ["h", "hello", "\u00e9", "noise", "controls"])
def test_detokenizing(token: str) -> None:
    """A token at a time, as they come; noise is half a character, over and over."""
    tokenizer = chat_tokenizer()
    ids = tokenizer.encode(["\u00e9" if token == "noise" else TEXTS.get(token, token)])
    ids = ids[:1] if token == "noise" else ids

    def push_all(size: int) -> None:
        detokenizer = Detokenizer(tokenizer)
        for _ in range(size):
            detokenizer.push(ids)
        detokenizer.flush()

    assert ratio(push_all, 500) <= MOST_RATIO


@pytest.mark.parametrize("piece", ["a", "ab", "aaaaaaab", "b" * 50])
def test_looking_for_stop_strings(piece: str) -> None:
    """Also where a long stop string nearly comes, again and again."""

    def push_all(size: int) -> None:
        matcher = StopMatcher(("a" * 255 + "c", "b" * 200 + "c"))
        for _ in range(size):
            matcher.push(piece)

    assert ratio(push_all, 1_000) <= MOST_RATIO
