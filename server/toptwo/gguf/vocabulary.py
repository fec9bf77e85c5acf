"""A model's tokens out of a GGUF file's metadata, and what tokenizer_config.json and its like say of them.

Knows `tokenizer.*`. Must not know how text is cut into tokens, nor weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gguf import TokenType

from toptwo.gguf.metadata import Metadata

PADDING = re.compile(r"\[PAD\d+\]")  # what converters call rows of the embedding that no token has
# By the part that a token plays, GGUF's name for its id and, where it has one, Hugging Face's for its text.
ROLES = {
    "bos": ("bos_token_id", "bos_token"),
    "eos": ("eos_token_id", "eos_token"),
    "unknown": ("unknown_token_id", "unk_token"),
    "pad": ("padding_token_id", "pad_token"),
    "eot": ("eot_token_id", None),
    "eom": ("eom_token_id", None),
}
# Where llama.cpp looks for SentencePiece's if the file does not say.
SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unknown": 0}
# Control tokens that end an answer, or the document: files name one, and the chat template the others.
TURN_ENDS = frozenset(
    {"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|end_of_turn|>", "<|return|>", "<|call|>"}
    | {"<|endoftext|>", "<|end_of_text|>"}
)
# Where there is the first, the second ends but a part of an answer.
HARMONY_END, HARMONY_PAUSE = "<|return|>", "<|end|>"


@dataclass(frozen=True)
class Vocabulary:
    """Tokens and their types in the order of ids, and the ids that play a part (see ROLES)."""

    tokens: list[str]
    types: list[int]
    roles: Mapping[str, int]

    def ids(self, *types: TokenType) -> dict[str, int]:
        """By token, of the given types, or of all but those that are there for padding."""
        return {
            token: index
            for index, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if (kind in types if types else not (kind == TokenType.UNUSED and PADDING.fullmatch(token)))
        }

    def text_of(self, role: str) -> str | None:
        return self.tokens[self.roles[role]] if role in self.roles else None


def read_vocabulary(keys: Metadata) -> Vocabulary:
    """keys: those below "tokenizer". Raises CheckpointError."""
    tokens = keys.texts("ggml.tokens")
    types = [TokenType.NORMAL.value] * len(tokens)
    if keys.has("ggml.token_type"):
        types = keys.integers("ggml.token_type")
    if len(types) != len(tokens):
        raise keys.error("ggml.token_type", f"has {len(types)} entries for {len(tokens)} tokens")
    defaults = SENTENCEPIECE_IDS if keys.text("ggml.model") == "llama" else {}
    roles = {role: keys.integer(f"ggml.{key}", defaults.get(role, -1)) for role, (key, _) in ROLES.items()}
    # A number that is no token's means that there is none.
    return Vocabulary(tokens, types, {role: i for role, i in roles.items() if 0 <= i < len(tokens)})


def tokenizer_config(keys: Metadata, vocabulary: Vocabulary) -> dict[str, Any]:
    """The contents of tokenizer_config.json."""
    named = {name: vocabulary.text_of(role) for role, (_, name) in ROLES.items() if name}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    config |= {name: text for name, text in named.items() if text is not None}
    if keys.has("chat_template"):
        config["chat_template"] = keys.text("chat_template")
    return config


def generation_config(vocabulary: Vocabulary) -> dict[str, Any]:
    """The contents of generation_config.json: above all, what ends an answer."""
    control = vocabulary.ids(TokenType.CONTROL)
    ends = TURN_ENDS - {HARMONY_PAUSE} if HARMONY_END in control else TURN_ENDS
    stops = {vocabulary.roles[role] for role in ("eos", "eot", "eom") if role in vocabulary.roles}
    stops |= {index for token, index in control.items() if token in ends}
    named = {
        f"{role}_token_id": vocabulary.roles[role] for role in ("bos", "pad") if role in vocabulary.roles
    }
    return {**named, "eos_token_id": sorted(stops)}
