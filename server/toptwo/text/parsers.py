"""Tells apart what a model says, what it thinks and which tools it calls, as the text arrives.

Knows texts and the spellings of tool formats; must not know token ids, HTTP or which tools there are.
The result does not depend on how the text was cut into pieces, and nothing is lost: what only begins
like a call comes out as content. Work is proportional to the text.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from toptwo.text.calls import CallReader, ToolCallArguments, ToolCallStart
from toptwo.text.tools import ToolFormat

__all__ = [
    "Content",
    "OutputParser",
    "Piece",
    "Reasoning",
    "ReasoningFormat",
    "ToolCallArguments",
    "ToolCallStart",
    "detect_reasoning",
    "make_parser",
]

_SPACE = " \t\r\n"
_THINK, _END_OF_THINK = "<think>", "</think>"
_MOST_SPACE = 64  # white space that may come before the reasoning


@dataclass(frozen=True)
class Content:
    """Text of the answer."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """Text of a thought."""

    text: str


Piece = Content | Reasoning | ToolCallStart | ToolCallArguments


@dataclass(frozen=True)
class ReasoningFormat:
    """What a thought begins and ends with. shown_tokens: those of the two that are tokens."""

    open: str
    close: str
    shown_tokens: tuple[str, ...] = ()


def detect_reasoning(template_source: str, token_texts: Collection[str]) -> ReasoningFormat | None:
    """The format, where the template or the vocabulary knows of thoughts."""
    if _THINK not in template_source and _THINK not in token_texts:
        return None
    shown = tuple(text for text in (_THINK, _END_OF_THINK) if text in token_texts)
    return ReasoningFormat(_THINK, _END_OF_THINK, shown)


def make_parser(
    tool_format: ToolFormat | None, reasoning: ReasoningFormat | None, *, starts_in_reasoning: bool = False
) -> OutputParser:
    """A parser of one answer. None where calls or thoughts are to stay in the text.

    starts_in_reasoning: the prompt ends inside a thought.
    """
    return OutputParser(
        None if reasoning is None else _ReasoningSplitter(reasoning, starts_in_reasoning),
        None if tool_format is None else _CallParser(tool_format),
    )


class OutputParser:
    """Text in, pieces out. Without stages all text is content."""

    def __init__(self, reasoning: _ReasoningSplitter | None = None, calls: _CallParser | None = None) -> None:
        self._reasoning = reasoning
        self._calls = calls

    @property
    def num_tool_calls(self) -> int:
        """Calls that have started so far."""
        return 0 if self._calls is None else self._calls.num_calls

    @property
    def in_reasoning(self) -> bool:
        """Whether the text so far ends inside a thought."""
        return self._reasoning is not None and self._reasoning.inside

    def push(self, text: str) -> list[Piece]:
        """What the text makes certain; it may be nothing."""
        thought = ""
        if self._reasoning is not None:
            thought, text = self._reasoning.push(text)
        return self._pieces(thought, text)

    def flush(self) -> list[Piece]:
        """What is left when no more text will come."""
        thought = text = ""
        if self._reasoning is not None:
            thought, text = self._reasoning.flush()
        pieces = self._pieces(thought, text)
        return pieces if self._calls is None else [*pieces, *self._calls.flush()]

    def _pieces(self, thought: str, text: str) -> list[Piece]:
        pieces: list[Piece] = [Reasoning(thought)] if thought else []
        if self._calls is not None:
            pieces += self._calls.push(text)
        elif text:
            pieces.append(Content(text))
        return pieces


class _ReasoningSplitter:
    """Thoughts come first. Newlines around them are dropped.

    inside: whether the text so far ends inside a thought.
    """

    def __init__(self, form: ReasoningFormat, inside: bool) -> None:
        self._open = form.open
        self._until = _Until(form.close, "\n")
        self.inside = inside
        self._may_begin = not inside
        self._skips_newlines = inside
        self._held = ""  # what may be the opening marker

    def push(self, text: str) -> tuple[str, str]:
        """Thought and content, in this order."""
        thought = ""
        if self._may_begin:
            text = self._begin(text)
        if self.inside:
            thought, rest = self._until.push(self._skip_newlines(text))
            if rest is None:
                return thought, ""
            self.inside, self._skips_newlines, text = False, True, rest
        return thought, self._skip_newlines(text)

    def flush(self) -> tuple[str, str]:
        """Thought and content that were held back."""
        held, self._held = self._held, ""
        return self._until.flush().rstrip("\n"), held

    def _begin(self, text: str) -> str:
        text = self._held + text
        solid = text.lstrip(_SPACE)
        in_time = len(text) - len(solid) <= _MOST_SPACE
        if in_time and self._open.startswith(solid) and solid != self._open:
            self._held = text
            return ""
        self._held, self._may_begin = "", False
        if not in_time or not solid.startswith(self._open):
            return text
        self.inside = self._skips_newlines = True
        return solid[len(self._open) :]

    def _skip_newlines(self, text: str) -> str:
        if self._skips_newlines:
            text = text.lstrip("\n")
            self._skips_newlines = not text
        return text


class _CallParser:
    """Content up to a marker, then calls, then content again. Space around markers is dropped.

    num_calls: calls that have started so far.
    """

    def __init__(self, form: ToolFormat) -> None:
        self._marker = form.marker
        self._spelling = _SPELLINGS[form.name]
        self._until = _Until(form.marker, _SPACE)
        self._reader: CallReader | None = None
        self.num_calls = 0
        if form.name == "llama3":  # there, an answer that is nothing but a call needs no marker
            self._reader = CallReader(self._spelling, "", 0)

    def push(self, text: str) -> list[Piece]:
        """What the text makes certain."""
        pieces: list[Piece] = []
        while text:
            if self._reader is not None:
                text = self._read(self._reader, self._reader.feed(text), pieces)
                continue
            content, after = self._until.push(text)
            if content:
                pieces.append(Content(content))
            if after is None:
                break
            marker = self._until.take_blanks() + self._marker
            self._reader, text = CallReader(self._spelling, marker, self.num_calls), after
        return pieces

    def flush(self) -> list[Piece]:
        """What is left when no more text will come."""
        pieces: list[Piece] = []
        if self._reader is not None:
            self._reader.finish()
            pieces += self.push(self._read(self._reader, "", pieces))
        rest = self._until.flush()
        return [*pieces, Content(rest)] if rest else pieces

    def _read(self, reader: CallReader, rest: str, pieces: list[Piece]) -> str:
        """Collect what has been read; the text that is still to be looked at."""
        pieces += reader.take_pieces()
        self.num_calls = reader.num_calls
        if not reader.ended:
            return rest
        self._reader = None
        held = "".join(reader.held)
        if held.strip(_SPACE):
            pieces.append(Content(held))
        elif reader.failed:  # space before an answer that does not begin with a call
            rest = held + rest
        return rest


_SPELLINGS = {
    "hermes": CallReader.hermes,
    "mistral": CallReader.mistral,
    "llama3": CallReader.llama3,
    "granite": CallReader.mistral,  # the same list behind another marker
}


class _Until:
    """Text up to a marker, without the `blanks` (characters) right before the marker."""

    def __init__(self, marker: str, blanks: str) -> None:
        self._marker = marker
        self._blanks = blanks
        self._held_blanks: list[str] = []
        self._begun = ""  # a part of the marker that the text ends with

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that is certainly before the marker, and what follows the marker once it is there."""
        before, marker, after = (self._begun + text).partition(self._marker)
        num_begun = 0 if marker else self._num_begun(before)
        self._begun = before[len(before) - num_begun :]
        before = before[: len(before) - num_begun]
        solid = before.rstrip(self._blanks)
        released = self.take_blanks() + solid if solid else ""
        self._held_blanks.append(before[len(solid) :])
        return released, after if marker else None

    def take_blanks(self) -> str:
        """The blanks that were held back; nobody gets them again."""
        blanks = "".join(self._held_blanks)
        self._held_blanks.clear()
        return blanks

    def flush(self) -> str:
        """What is held when no more text will come."""
        begun, self._begun = self._begun, ""
        return self.take_blanks() + begun

    def _num_begun(self, text: str) -> int:
        """How much of the marker the text ends with."""
        return next(n for n in range(len(self._marker) - 1, -1, -1) if text.endswith(self._marker[:n]))
