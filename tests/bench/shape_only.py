"""A published model's shape without its weights: a directory for `toptwo serve DIR --random-weights`.

It holds config.json, a byte-level vocabulary filled up to the model's size with made-up words, and ChatML.

Run: python tests/bench/shape_only.py DIR --model mixtral-8x7b
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import fakes
from published import MIXTRAL_8X7B

MODELS = {"mixtral-8x7b": MIXTRAL_8X7B}


def write(directory: Path, model: str) -> None:
    """Fill the directory; its tokens are words, so that every one that is drawn is seen in an answer."""
    raw = MODELS[model]
    tokenizer = fakes.byte_level_vocabulary()
    missing = raw["vocab_size"] - tokenizer.get_vocab_size()
    tokenizer.add_tokens([f" word{number}" for number in range(missing)])
    start, end = (tokenizer.token_to_id(token) for token in fakes.CONTROL_TOKENS)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {**raw, "bos_token_id": start, "eos_token_id": end}
    (directory / "config.json").write_text(json.dumps(config))
    words = {"chat_template": fakes.CHATML, "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(words))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--model", choices=sorted(MODELS), default="mixtral-8x7b")
    arguments = parser.parse_args()
    write(arguments.directory, arguments.model)


if __name__ == "__main__":
    main()
