"""What the API knows of the model it serves: its name and its words, none of its weights.

Knows tokenizer, template and guard; must not know HTTP or the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from toptwo.errors import StartupError
from toptwo.text.guard import ControlTokenGuard, new_marker
from toptwo.text.template import ChatTemplate, Message
from toptwo.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ServedModel:
    """A model as its callers see it.

    name: the id that requests name; it may contain "/".
    created: seconds since 1970, shown by the models endpoint.
    """

    name: str
    created: int
    tokenizer: Tokenizer
    template: ChatTemplate

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        return self.tokenizer.stop_token_ids

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the prompt that asks for the next answer. Slow for long chats: call it in a thread.

        Texts of control tokens in the messages stay plain text.
        Raises ApiError when the template refuses the messages.
        """
        texts = [text for m in messages for key, text in m.items() if key != "role"]
        if not self._guard.is_needed(texts):
            return self.tokenizer.encode([self.template.render(messages)])
        marker = new_marker()
        protected = [
            {key: text if key == "role" else self._guard.protect(text, marker) for key, text in m.items()}
            for m in messages
        ]
        return self.tokenizer.encode(self.template.render(protected).split(marker))

    @cached_property
    def _guard(self) -> ControlTokenGuard:
        return ControlTokenGuard(self.tokenizer.special_tokens)


def load_served_model(directory: Path, name: str) -> ServedModel:
    """Read the text side of a checkpoint directory; `created` is the age of its tokenizer.

    Raises StartupError with one line that names the file.
    """
    tokenizer = Tokenizer.load(directory)
    template = ChatTemplate.load(directory, tokenizer.named_tokens)
    try:
        created = int((directory / "tokenizer.json").stat().st_mtime)
    except OSError as error:
        raise StartupError(f"{directory / 'tokenizer.json'}: cannot be read ({error})") from None
    return ServedModel(name, created, tokenizer, template)
