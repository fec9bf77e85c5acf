"""Finds stop strings in text that arrives in pieces.

Knows strings only. The result does not depend on how the text was cut into pieces.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Lets text through up to the first stop string; `matched` tells which one was found.

    The stop string that is complete first wins, of two that end together the longer one. Text that
    may be the beginning of a stop string is held back. Work and memory per piece are proportional to
    the piece, however long the output is (Knuth, Morris and Pratt's automaton, one per stop string).
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [(stop, _borders(stop)) for stop in stops]
        self._progress = [0] * len(stops)  # how much of each stop string the text ends with
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Text that is certain to come before any stop string; empty once one has matched."""
        if self.matched is not None:
            return ""
        if not self._stops:
            return text
        start = len(self._held)
        self._held += text
        for end, character in enumerate(text, start=start + 1):
            if found := self._advance(character):
                self.matched = self._held[end - found : end]
                return self._release(end - found)
        return self._release(len(self._held) - max(self._progress))

    def flush(self) -> str:
        """The text held back, when no more will come."""
        return "" if self.matched is not None else self._release(len(self._held))

    def _advance(self, character: str) -> int:
        """Feed one character; the length of the longest stop string it completes, or 0."""
        found = 0
        for index, (stop, borders) in enumerate(self._stops):
            length = self._progress[index]
            while length and stop[length] != character:
                length = borders[length - 1]
            length += stop[length] == character
            self._progress[index] = length
            if length == len(stop):
                found = max(found, length)
        return found

    def _release(self, length: int) -> str:
        released, self._held = self._held[:length], self._held[length:]
        return released


def _borders(text: str) -> list[int]:
    """For each prefix of the text, the length of the longest proper prefix that is also its suffix."""
    borders = [0] * len(text)
    length = 0
    for index in range(1, len(text)):
        while length and text[index] != text[length]:
            length = borders[length - 1]
        length += text[index] == text[length]
        borders[index] = length
    return borders
