"""Writes a GGUF's byte-level BPE as `tokenizer.json` and `tokenizer_config.json`.

Knows how SmolLM cuts text before merging (digit by digit, then GPT-2's pattern), which GGUF only names.
Must not know weights or where files come from.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from toptwo.default_model.gguf_weights import TokenizerFields


def build_tokenizer(fields: TokenizerFields) -> Tokenizer:
    """The tokenizer; it adds no token of its own before or after the text.

    The vocabulary lacks a few bytes that are rare in UTF-8 text; SmolLM2 drops them, and so does this.
    """
    # A byte-level token has no space of its own (it is written as "Ġ"): the only one separates the pair.
    merges = [(left, right) for left, right in (merge.split(" ") for merge in fields.merges)]
    vocabulary = {token: i for i, token in enumerate(fields.tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(fields.tokens[i], special=True, normalized=False) for i in fields.special_ids]
    )
    return tokenizer


def write_tokenizer(fields: TokenizerFields, context_length: int, directory: Path) -> None:
    """Write both files into `directory`; the chat template is the GGUF's own."""
    build_tokenizer(fields).save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": fields.tokens[fields.bos_id],
        "eos_token": fields.tokens[fields.eos_id],
        "pad_token": fields.tokens[fields.pad_id],
        "unk_token": fields.tokens[fields.unknown_id],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
        "chat_template": fields.chat_template,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
