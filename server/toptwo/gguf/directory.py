"""A model directory that stands for GGUF files: the small files that everything else expects, and links.

Must not know where directories are kept or for how long.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from toptwo.errors import CheckpointError
from toptwo.gguf.config import architecture_of, config_of
from toptwo.gguf.files import link_name
from toptwo.gguf.header import read_gguf
from toptwo.gguf.tokenizer import build_tokenizer, is_guessed
from toptwo.gguf.vocabulary import generation_config, read_vocabulary, tokenizer_config


def write_model_directory(parts: Sequence[Path], directory: Path) -> str | None:
    """Write everything into `directory`, which is there. parts: absolute paths, in order.

    Returns a warning for the person, or None. Raises CheckpointError that names the file, and tensor or key.
    """
    gguf = read_gguf(parts)
    keys = gguf.metadata.below("tokenizer")
    config, vocabulary = config_of(gguf), read_vocabulary(keys)
    if len(vocabulary.tokens) > config["vocab_size"]:
        problem = f"has {len(vocabulary.tokens)} entries for the {config['vocab_size']} rows of the embedding"
        raise CheckpointError(f"{gguf.path}: tokenizer.ggml.tokens {problem}")
    tokenizer = build_tokenizer(keys, vocabulary, architecture_of(gguf))
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(directory / "config.json", config)
    _write_json(directory / "tokenizer_config.json", tokenizer_config(keys, vocabulary))
    _write_json(directory / "generation_config.json", generation_config(vocabulary))
    for number, part in enumerate(parts, 1):
        (directory / link_name(number, len(parts))).symlink_to(part)
    if not is_guessed(keys):
        return None
    return (
        f"{gguf.path} does not say how text is cut before merging (tokenizer.ggml.pre); llama.cpp's guess is "
        "taken, and the model may see some texts in other tokens than it was trained on"
    )


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
