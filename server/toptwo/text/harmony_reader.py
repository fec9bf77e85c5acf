"""Reads answers in Harmony: thoughts, texts for the user and calls of tools, told apart by their headers.

Works on token ids, so that a control token that a model only writes about, in letters, is none. Stop
strings end texts for the user; thoughts, calls and headers are not searched for them.

Models make mistakes: a header or an end that is missing never swallows what is said. Of a header that is
cut off nothing is shown.

Knows the format and the tokenizer; must not know templates, HTTP or which tools there are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import Literal

from toptwo.text.calls import ToolCallArguments, ToolCallStart
from toptwo.text.detokenizer import Detokenizer
from toptwo.text.harmony import CHANNEL, CONSTRAIN, MESSAGE, START, Harmony
from toptwo.text.parsers import Content, Piece, Reasoning
from toptwo.text.stops import StopMatcher
from toptwo.text.tokenizer import Tokenizer

_MOST_HEADER = 96  # tokens; with the longest name of a function it has fewer
_BETWEEN = "\n\n"  # goes between two texts, or two thoughts, that were messages of their own
_CHANNEL = re.compile(re.escape(CHANNEL) + r"\s*([^\s<]*)")
_RECIPIENT = re.compile(r"\b(?:to=|(?=functions\.))([^\s<]+)")
_PEOPLE = ("user", "assistant", "all")  # recipients that are no tools
_FUNCTIONS = "functions."  # what functions of the caller's are called with


class HarmonyReader:
    """An AnswerReader. The prompt ends behind the role in the answer's first header.

    with_thoughts, with_calls: whether these are told apart; else they are texts.
    """

    def __init__(
        self,
        harmony: Harmony,
        tokenizer: Tokenizer,
        stops: Sequence[str] = (),
        *,
        with_thoughts: bool = True,
        with_calls: bool = True,
    ) -> None:
        self.stop: str | None = None
        self.num_tool_calls = 0
        self._marks = {token_id: text for text, token_id in harmony.ids.items()}
        self._tokenizer = tokenizer
        self._stop_strings = stops
        self._with_thoughts = with_thoughts
        self._with_calls = with_calls
        self._header: list[int] | None = []  # of the message to come; None inside a body
        self._body = _Body("text", Detokenizer(tokenizer), StopMatcher(stops))
        self._said: set[str] = set()  # kinds of bodies of which something was said

    @property
    def in_reasoning(self) -> bool:
        """See AnswerReader."""
        return self._header is None and self._body.kind == "thought"

    def read(self, ids: Sequence[int], *, last: bool) -> list[Piece]:
        """See AnswerReader."""
        pieces: list[Piece] = []
        for mark, run in groupby(ids, lambda token: self._marks.get(token, "")):
            for tokens in [[token] for token in run] if mark else [list(run)]:
                if self.stop is None:
                    pieces += self._meet(mark, tokens[0]) if mark else self._take(tokens)
        if last and self.stop is None:
            pieces += self._break_off() if self._header is not None else self._close()
        return pieces

    def _take(self, ids: list[int]) -> list[Piece]:
        """Tokens with a text."""
        if self._header is None:
            return self._say(self._body.push(ids))
        self._header += ids
        if len(self._header) <= _MOST_HEADER:
            return []
        said = [token for token in self._header if token not in self._marks]
        return [*self._open(""), *self._say(self._body.push(said))]

    def _meet(self, mark: str, token: int) -> list[Piece]:
        """A control token."""
        if self._header is None:
            if mark in (MESSAGE, CONSTRAIN):
                return []
            pieces = self._close()
            self._header = [token] if mark in (START, CHANNEL) else []
            return pieces
        if mark == MESSAGE:
            return self._open(self._tokenizer.decode(self._header))
        if mark in (CHANNEL, CONSTRAIN):
            self._header.append(token)
            return []
        pieces = self._break_off()
        self._header = [token] if mark == START else []
        return pieces

    def _open(self, header: str) -> list[Piece]:
        """A body begins."""
        self._header = None
        channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
        if self._with_calls and recipient and recipient[1] not in _PEOPLE:
            self._body = _Body("call", Detokenizer(self._tokenizer), StopMatcher(()))
            self.num_tool_calls += 1
            return [ToolCallStart(self.num_tool_calls - 1, recipient[1].removeprefix(_FUNCTIONS))]
        is_thought = self._with_thoughts and channel is not None and channel[1] == "analysis"
        stops = StopMatcher(() if is_thought else self._stop_strings)
        self._body = _Body("thought" if is_thought else "text", Detokenizer(self._tokenizer), stops)
        return []

    def _close(self) -> list[Piece]:
        """The body ends."""
        self._header = []
        text = self._body.flush()
        if self._body.kind == "call" and not self._body.said and not text:
            text = "{}"  # no arguments are an empty object to everybody else
        return self._say(text)

    def _break_off(self) -> list[Piece]:
        """The header ends without a body. If nothing made it a header, it was said without one."""
        header, self._header = self._header or [], []
        if any(token in self._marks for token in header) or not self._tokenizer.decode(header).strip():
            return []
        return [*self._open(""), *self._say(self._body.push(header)), *self._close()]

    def _say(self, text: str) -> list[Piece]:
        """The pieces of a text of the body."""
        body, self.stop = self._body, self._body.stops.matched
        if not text:
            return []
        if not body.said and body.kind in self._said and body.kind != "call":
            text = _BETWEEN + text
        body.said = True
        self._said.add(body.kind)
        if body.kind == "call":
            return [ToolCallArguments(self.num_tool_calls - 1, text)]
        return [Reasoning(text) if body.kind == "thought" else Content(text)]


class _Body:
    """The body of one message as it comes. said: whether any of its text has been let out."""

    def __init__(
        self, kind: Literal["text", "thought", "call"], detokenizer: Detokenizer, stops: StopMatcher
    ) -> None:
        self.kind = kind
        self.stops = stops
        self.said = False
        self._detokenizer = detokenizer

    def push(self, ids: Sequence[int]) -> str:
        return self.stops.push(self._detokenizer.push(ids))

    def flush(self) -> str:
        return self.stops.push(self._detokenizer.flush()) + self.stops.flush()
