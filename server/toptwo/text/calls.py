"""Reads tool calls out of generated text, one character at a time, in the spellings that models use.

Knows those spellings and enough JSON to find the ends of values; must not know where in an answer calls
may begin (`parsers` does) or which tools there are. Arguments are passed on as they come and are not
validated: what a model writes there is for the caller to judge.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from dataclasses import dataclass

# A generator that looks at the reader's current character and yields to get the next one.
Steps = Generator[None, None, None]

_MOST_HELD = 1 << 20  # characters that may pass before it is clear whether they are a call
_SPACE = frozenset(" \t\r\n")
_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
_SCALAR = _LETTERS | frozenset("0123456789+-.")
_NAME = _SCALAR | frozenset("_:/")
_OPENERS, _CLOSERS = frozenset("{["), frozenset("}]")
_OUTSIDE_STRINGS = _SCALAR | _SPACE | _OPENERS | _CLOSERS | frozenset(":,")
_ARGUMENTS_KEYS = ("arguments", "parameters")


@dataclass(frozen=True)
class ToolCallStart:
    """A call begins. index: its place among the calls of the answer, from 0."""

    index: int
    name: str


@dataclass(frozen=True)
class ToolCallArguments:
    """A fragment of the JSON text of a call's arguments; joined, they are the object."""

    index: int
    text: str


class NotACallError(Exception):
    """The text does not go on as a call does."""


class CallReader:
    """Reads the calls behind a marker.

    held: text that has been taken, the marker included, and has not proved to be part of a call.
    ended: no more text is wanted. failed: because it does not go on as calls do.
    num_calls: calls of the answer that have started so far.
    """

    def __init__(self, spelling: Callable[[CallReader], Steps], marker: str, num_calls: int) -> None:
        self.held = [marker] if marker else []
        self.ended = self.failed = False
        self.num_calls = num_calls
        self._pieces: list[ToolCallStart | ToolCallArguments] = []
        self._fragment: list[str] = []
        self._started = False  # whether the call that is being read is certainly one
        self._streaming = False  # whether characters go to the fragment, and so are not held
        self._character = ""  # the current one; empty at the end of the text
        self._steps = self._run(spelling)
        next(self._steps)

    def feed(self, text: str) -> str:
        """Take text; what it does not want is returned."""
        for at, character in enumerate(text):
            if not self._step(character):
                return text[at:]
            if not self._streaming:
                self.held.append(character)
        return ""

    def finish(self) -> None:
        """There is no more text."""
        self._step("")

    def take_pieces(self) -> list[ToolCallStart | ToolCallArguments]:
        """What has become certain."""
        self._emit()
        pieces, self._pieces = self._pieces, []
        return pieces

    def _step(self, character: str) -> bool:
        self._character = character
        try:
            if len(self.held) > _MOST_HELD:
                raise NotACallError
            next(self._steps)
        except StopIteration:
            self.ended = True
        except NotACallError:
            self.ended = self.failed = True
        return not self.ended

    def _run(self, spelling: Callable[[CallReader], Steps]) -> Steps:
        yield
        yield from spelling(self)

    def _emit(self) -> None:
        if self._fragment:
            self._pieces.append(ToolCallArguments(self.num_calls - 1, "".join(self._fragment)))
            self._fragment.clear()

    def _start(self, name: str) -> None:
        self._emit()
        self._pieces.append(ToolCallStart(self.num_calls, name))
        self.num_calls += 1
        self.held.clear()
        self._started = True

    # --- Pieces of JSON -------------------------------------------------------------------------------

    def _space(self) -> Steps:
        while self._character in _SPACE:
            yield

    def _require(self, character: str) -> None:
        if self._character != character:
            raise NotACallError

    def _string(self, taken: list[str]) -> Steps:
        self._require('"')
        yield from self._take(taken)
        while self._character != '"':
            escapes = self._character == "\\"
            yield from self._take(taken)
            if escapes:
                yield from self._take(taken)
        yield from self._take(taken)

    def _take(self, taken: list[str]) -> Steps:
        if not self._character:
            raise NotACallError
        taken.append(self._character)
        yield

    def _container(self, taken: list[str]) -> Steps:
        """An object or an array. Outside of strings, what cannot be JSON ends it: a closing marker."""
        depth = 0
        while True:
            character = self._character
            if character == '"':
                yield from self._string(taken)
                continue
            if character not in _OUTSIDE_STRINGS:
                raise NotACallError
            depth += (character in _OPENERS) - (character in _CLOSERS)
            yield from self._take(taken)
            if depth == 0:
                return

    def _value(self, taken: list[str]) -> Steps:
        if self._character == '"':
            yield from self._string(taken)
        elif self._character in _OPENERS:
            yield from self._container(taken)
        else:
            yield from self._word(_SCALAR, taken)

    def _word(self, alphabet: frozenset[str], taken: list[str]) -> Steps:
        if self._character not in alphabet:
            raise NotACallError
        while self._character in alphabet:
            yield from self._take(taken)

    # --- Calls ----------------------------------------------------------------------------------------

    def _call(self, steps: Steps) -> Steps:
        """One call. If it breaks off when it has started, what has come of it stays a call."""
        self._started = False
        try:
            yield from steps
        except NotACallError:
            if not self._started:
                raise
        else:
            self.held.clear()
        finally:
            self._streaming = False

    def _stream_arguments(self, name: str) -> Steps:
        self._require("{")
        self._start(name)
        self._streaming = True
        yield from self._container(self._fragment)
        self._streaming = False

    def _object(self) -> Steps:
        """{"name": ..., "arguments": {...}}, in any order, perhaps with other keys."""
        name, early = None, ""
        separator = "{"
        while self._character == separator:
            yield
            yield from self._space()
            key = yield from self._text()
            yield from self._space()
            self._require(":")
            yield
            yield from self._space()
            if key in _ARGUMENTS_KEYS and self._character == "{" and name and not self._started:
                yield from self._stream_arguments(name)
            else:
                taken: list[str] = []
                yield from self._value(taken)
                if key == "name":
                    name = _decoded("".join(taken))
                elif key in _ARGUMENTS_KEYS:
                    early = _arguments("".join(taken))
            if name and early and not self._started:
                self._start(name)
                self._fragment.append(early)
            yield from self._space()
            separator = ","
        self._require("}")
        if not self._started:
            raise NotACallError
        yield

    def _text(self) -> Generator[None, None, str]:
        taken: list[str] = []
        yield from self._string(taken)
        return _decoded("".join(taken))

    def _named(self) -> Steps:
        """name[ARGS]{...}, with a [CALL_ID] and its value in between or without any mark."""
        name: list[str] = []
        yield from self._word(_NAME, name)
        yield from self._space()
        while self._character == "[":
            mark: list[str] = []
            yield
            yield from self._word(_LETTERS | {"_"}, mark)
            self._require("]")
            yield
            if "".join(mark) == "CALL_ID":
                yield from self._word(_NAME, [])
            elif "".join(mark) != "ARGS":
                raise NotACallError
            yield from self._space()
        yield from self._stream_arguments("".join(name))

    def _literal(self, text: str) -> Generator[None, None, bool]:
        for character in text:
            if self._character != character:
                return False
            yield
        self.held.clear()
        return True

    # --- Spellings ------------------------------------------------------------------------------------

    def hermes(self) -> Steps:
        """A call and the closing marker."""
        yield from self._space()
        yield from self._call(self._object())
        yield from self._space()
        if (yield from self._literal("</tool_call>")):
            yield from self._space()

    def mistral(self) -> Steps:
        """A list of calls, or one call that begins with its name."""
        yield from self._space()
        if self._character != "[":
            named = self._object() if self._character == "{" else self._named()
            yield from self._call(named)
            yield from self._space()
            return
        separator = "["
        while self._character == separator:
            yield
            yield from self._space()
            yield from self._call(self._object())
            yield from self._space()
            separator = ","
        if (yield from self._literal("]")):
            yield from self._space()

    def llama3(self) -> Steps:
        """Calls with a semicolon, a comma or space between them."""
        yield from self._space()
        yield from self._call(self._object())
        yield from self._space()
        while self._character in (";", ",", "{"):
            if self._character != "{":
                yield
                yield from self._space()
            if self._character != "{":
                return
            yield from self._call(self._object())
            yield from self._space()


def _decoded(literal: str) -> str:
    """The text of a JSON string. Raises NotACallError when it is none that can be sent to a client."""
    try:
        text = json.loads(literal, strict=False)
        if not isinstance(text, str):
            raise NotACallError
        text.encode()
    except (ValueError, RecursionError):  # the first also for half a surrogate pair
        raise NotACallError from None
    return text


def _arguments(value: str) -> str:
    """The JSON text of an object, or the object in a text that some models write."""
    if value.startswith("{"):
        return value
    text = _decoded(value)
    try:
        if isinstance(json.loads(text), dict):
            return text
    except (ValueError, RecursionError):
        pass
    raise NotACallError
