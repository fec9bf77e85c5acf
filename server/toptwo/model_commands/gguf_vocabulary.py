"""A checkpoint's tokenizer and chat template as GGUF metadata.

Knows `tokenizer.json` of the byte-level BPE family and the name under which llama.cpp knows a way to cut
text before merging. Must not know weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from toptwo.errors import StartupError
from toptwo.gguf.pre_tokenizers import UNNAMED, name_of
from toptwo.text.checkpoint import read_json, read_json_if_present, read_text
from toptwo.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Vocabulary:
    """tokens and types in id order, merges as "left right" in order of rank, ids by role ("bos", "eos", ...).

    pre: llama.cpp's name of the pre-tokenizer. template: the chat template; None where the model has none.
    """

    tokens: list[str]
    types: list[gguf.TokenType]
    merges: list[str]
    pre: str
    roles: dict[str, int]
    template: str | None

    @property
    def is_exact(self) -> bool:
        """Whether llama.cpp is known to cut text as the model's own tokenizer does."""
        return self.pre != UNNAMED


def read_vocabulary(directory: Path, vocab_size: int) -> Vocabulary:
    """The vocabulary, padded to the `vocab_size` rows of the embedding.

    Raises StartupError that names the file, also for a tokenizer of another family.
    """
    path = directory / "tokenizer.json"
    tokenizer = Tokenizer.load(directory)  # refuses what is no tokenizer at all
    content: dict[str, Any] = read_json(path)
    steps, model = _steps(content.get("pre_tokenizer")), content["model"]
    if model.get("type") != "BPE" or "ByteLevel" not in [step["type"] for step in steps]:
        raise StartupError(f"{path}: only byte-level BPE tokenizers can be exported")
    if content.get("normalizer") is not None:
        raise StartupError(f"{path}: a tokenizer with a normalizer cannot be exported")
    ids, types = _tokens(content)
    if ids and max(ids.values()) >= vocab_size:
        raise StartupError(f"{path}: has token {max(ids.values())}, but vocab_size is {vocab_size}")
    texts = {index: text for text, index in ids.items()}
    return Vocabulary(
        tokens=[texts.get(index, f"[PAD{index}]") for index in range(vocab_size)],
        types=[types.get(index, gguf.TokenType.UNUSED) for index in range(vocab_size)],
        merges=[pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]],
        pre=name_of(steps, bool(model.get("ignore_merges"))) or UNNAMED,
        roles=_roles(tokenizer, ids),
        template=_chat_template(directory),
    )


def add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    """Write it as llama.cpp's GPT-2 family. Chat templates write their own bos, so none is added."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    add_id = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "unk": writer.add_unk_token_id,
        "pad": writer.add_pad_token_id,
    }
    for role, index in vocabulary.roles.items():
        add_id[role](index)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    if vocabulary.template is not None:
        writer.add_chat_template(vocabulary.template)


def _tokens(content: Mapping[str, Any]) -> tuple[dict[str, int], dict[int, gguf.TokenType]]:
    ids: dict[str, int] = dict(content["model"]["vocab"])
    types = dict.fromkeys(ids.values(), gguf.TokenType.NORMAL)
    for token in content.get("added_tokens") or ():
        ids[token["content"]] = token["id"]
        special = token.get("special", False)
        types[token["id"]] = gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED
    return ids, types


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    if pre_tokenizer is None:
        return []
    return list(pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer])


def _roles(tokenizer: Tokenizer, ids: Mapping[str, int]) -> dict[str, int]:
    named = {role: tokenizer.named_tokens.get(f"{role}_token") for role in ("bos", "eos", "unk", "pad")}
    roles = {role: ids[text] for role, text in named.items() if text is not None and text in ids}
    if "eos" not in roles and tokenizer.stop_token_ids:
        roles["eos"] = tokenizer.stop_token_ids[0]
    return roles


def _chat_template(directory: Path) -> str | None:
    """The template's source, looked for where `toptwo.text.template` looks."""
    path = directory / "chat_template.jinja"
    if path.exists():
        return read_text(path)
    for file in ("chat_template.json", "tokenizer_config.json"):
        value = read_json_if_present(directory / file).get("chat_template")
        if isinstance(value, list):
            named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
            value = named.get("default")
        if isinstance(value, str):
            return value
    return None
