"""Token ids to text, a few at a time, without ever showing half a character.

Knows the tokenizer; must not know stop strings or HTTP.

The library's own DecodeStream is not used: on vocabularies with byte fallback it raises as soon as a
model produces a stray byte, and it cannot hand out what it still holds at the end.
"""

from __future__ import annotations

from collections.abc import Sequence

from toptwo.text.tokenizer import Tokenizer

# A character is at most four tokens. So many undecodable ones in a row are noise; they are let go, so
# that noise cannot make the work per token grow with the length of the output.
_MOST_HELD = 256
_UNDECODABLE = "\ufffd"


class Detokenizer:
    """Joined, the pieces are the decoded text of all ids, without control tokens.

    Decoders look back (at the start of a text they drop a space, bytes join into characters), so each
    piece is decoded together with the ids of the piece before it.

    shown_ids: control tokens whose text is wanted all the same.
    before: the last ids of a text that these go on with; the pieces do not repeat it.
    """

    def __init__(
        self, tokenizer: Tokenizer, shown_ids: frozenset[int] = frozenset(), before: Sequence[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._shown_ids = shown_ids
        # ids of the last piece, then those not shown yet
        self._window = [token for token in before if tokenizer.has_text(token)]
        self._num_shown = len(self._window)  # how many ids of the window have been shown,
        self._shown = tokenizer.decode(self._window)  # and as which text

    def push(self, ids: Sequence[int]) -> str:
        """The text that the new ids complete; it may be empty."""
        self._window.extend(i for i in ids if i in self._shown_ids or self._tokenizer.has_text(i))
        num_held = len(self._window) - self._num_shown
        if not num_held:
            return ""
        text = self._tokenizer.decode(self._window)
        if text.endswith(_UNDECODABLE) and num_held < _MOST_HELD:
            return ""
        return self._show(text)

    def flush(self) -> str:
        """What is left when no more ids will come; half a character is shown as U+FFFD."""
        if len(self._window) == self._num_shown:
            return ""
        return self._show(self._tokenizer.decode(self._window))

    def _show(self, text: str) -> str:
        held = self._window[self._num_shown :]
        piece = text[len(self._shown) :]
        if not text.startswith(self._shown):
            # A stray byte spoilt the text before it, which is already with the reader.
            piece = self._tokenizer.decode(held)
        self._window, self._num_shown = held, len(held)
        self._shown = self._tokenizer.decode(held)
        return piece
