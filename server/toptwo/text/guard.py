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
from collections.abc import Iterable, Mapping
from typing import Any


class ControlTokenGuard:
    """Finds and breaks the texts of control tokens, in any upper or lower case, as some tokenizers
    normalise before they look for them."""

    def __init__(self, control_texts: Iterable[str]) -> None:
        texts = sorted((t for t in control_texts if len(t) > 1), key=len, reverse=True)
        # A look-ahead behind the first character, so that overlapping texts are all found.
        heads = "|".join(f"{re.escape(t[0])}(?={re.escape(t[1:])})" for t in texts)
        self._first_character = re.compile(heads or "(?!)", re.IGNORECASE)

    def protect(self, value: Any, marker: str) -> Any:
        """The value, JSON-like data, with the marker behind the first character of every control token
        in any of its texts, names of fields included. Raises RecursionError on very deep data."""
        if isinstance(value, str):
            return self._first_character.sub(lambda match: match.group() + marker, value)
        if isinstance(value, Mapping):
            return {self.protect(k, marker): self.protect(v, marker) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self.protect(item, marker) for item in value]
        return value


def new_marker() -> str:
    """A text that no caller can foresee and that survives a template's trimming, case and JSON filters."""
    return str(secrets.randbelow(9 * 10**24) + 10**24)
