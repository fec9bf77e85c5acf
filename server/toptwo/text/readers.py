"""From generated token ids to the pieces of an answer, whatever the model's format.

Knows detokenizer, stop strings and parsers; must not know HTTP, the engine or which tools there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from toptwo.text.detokenizer import Detokenizer
from toptwo.text.parsers import OutputParser, Piece
from toptwo.text.stops import StopMatcher


class AnswerReader(Protocol):
    """Reads one answer. The pieces, joined, do not depend on how the ids came."""

    @property
    def stop(self) -> str | None:
        """The stop string that has ended the answer, if one has."""

    @property
    def num_tool_calls(self) -> int:
        """Calls that have started so far."""

    @property
    def in_reasoning(self) -> bool:
        """Whether the answer so far ends inside a thought."""

    def read(self, ids: Sequence[int], *, last: bool) -> list[Piece]:
        """What the new ids make certain; it may be nothing.

        last: no more ids will come. Then, and when a stop string ends the answer, nothing is held back.
        """


class TextReader:
    """Reads formats whose marks are texts: all ids become one text, which is searched for stop strings
    and then taken apart."""

    def __init__(self, detokenizer: Detokenizer, stops: StopMatcher, parser: OutputParser) -> None:
        self._detokenizer = detokenizer
        self._stops = stops
        self._parser = parser

    @property
    def stop(self) -> str | None:
        """See AnswerReader."""
        return self._stops.matched

    @property
    def num_tool_calls(self) -> int:
        """See AnswerReader."""
        return self._parser.num_tool_calls

    @property
    def in_reasoning(self) -> bool:
        """See AnswerReader."""
        return self._parser.in_reasoning

    def read(self, ids: Sequence[int], *, last: bool) -> list[Piece]:
        """See AnswerReader."""
        text = self._stops.push(self._detokenizer.push(ids))
        if last:
            text += self._stops.push(self._detokenizer.flush()) + self._stops.flush()
        pieces = self._parser.push(text)
        return [*pieces, *self._parser.flush()] if last or self.stop is not None else pieces
