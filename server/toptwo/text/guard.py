"""Keeps the texts that people write from turning into control tokens.

A message that contains the text "<|im_end|>" could otherwise end its own turn and open a system turn:
the tokenizer cannot tell the template's control tokens from the caller's. So every control token text
in a message is broken by a marker after its first character; the rendered prompt is cut at the markers
and the pieces are tokenised one by one. The model still sees the same characters, as plain text.
(Hugging Face's default is to let them through; a served model has callers who do not trust each other.)

Knows texts and control tokens; must not know templates or token ids. A control token of a single
character cannot be broken and is left alone.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable

# Two code points that Unicode reserves for internal use: valid in strings, no character of any text.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"


class ControlTokenGuard:
    """Finds and breaks the texts of `special_tokens`, in any upper or lower case, as some tokenizers
    normalise before they look for them."""

    def __init__(self, special_tokens: Iterable[str]) -> None:
        texts = sorted((t for t in special_tokens if len(t) > 1), key=len, reverse=True)
        # A look-ahead behind the first character, so that overlapping texts are all found.
        heads = "|".join(f"{re.escape(t[0])}(?={re.escape(t[1:])})" for t in texts)
        self._first_character = re.compile(heads or "(?!)", re.IGNORECASE)

    def is_needed(self, texts: Iterable[str]) -> bool:
        """Whether any of the texts contains a control token."""
        return any(self._first_character.search(text) for text in texts)

    def protect(self, text: str, marker: str) -> str:
        """The text with the marker behind the first character of every control token in it."""
        return self._first_character.sub(lambda match: match.group() + marker, text)


def new_marker() -> str:
    """A text that no caller can foresee and that survives a template's trimming and case filters."""
    return f"{_OPEN}{secrets.randbits(64)}{_CLOSE}"
