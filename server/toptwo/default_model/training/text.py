"""The text that the experts are trained on, as tokens, and the text that they are measured on, as text.

A document is wholly one or the other. `documents.json` says which was which, by the SHA-256 of its text,
and what it came from; `held_out.json` has the excerpts themselves, so that the table of MODEL_CARD.md can
be printed anywhere. Must not know models.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from toptwo.default_model.router_corpus import DOMAINS, PACKAGES, Document, collect

TEXT = "text.safetensors"  # training tokens by domain
EXCERPT = 256  # tokens of a held-out document
HELD_OUT_TOKENS = 6_144  # per domain
END_OF_TEXT = 0
DIGEST = 16  # hexadecimal digits kept of a SHA-256: thousands of documents do not meet in 64 bits

Tokens = NDArray[np.int32]


def prepare_text(tokenizer: Tokenizer, work: Path, tokens_per_domain: int) -> None:
    """Collect the text and write `text.safetensors`, `documents.json` and `held_out.json` into `work`."""
    packages = work / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    for stale in packages.glob("*.deb"):
        stale.unlink()
    documents = unrepeated(collect(packages))
    training = {name: _training_tokens(tokenizer, documents, name, tokens_per_domain) for name in DOMAINS}
    save_file({name: tokens for name, (tokens, _) in training.items()}, work / TEXT)
    excerpts = {name: _excerpts(tokenizer, documents, name) for name in DOMAINS}
    write_json(work / "held_out.json", excerpts)
    manifest = {
        "packages": [asdict(package) for package in PACKAGES],
        "torch headers": version("torch").partition("+")[0],
        "training tokens": {name: len(tokens) for name, (tokens, _) in training.items()},
        "training": {name: sorted(hashes) for name, (_, hashes) in training.items()},
        "held out": {name: sorted(e["document"] for e in each) for name, each in excerpts.items()},
    }
    write_json(work / "documents.json", manifest)


def unrepeated(documents: list[Document]) -> list[Document]:
    """Each text once: of copies that fell on both sides of the split, none that is for training."""
    held_out = {digest(document.text) for document in documents if document.held_out}
    kept: dict[str, Document] = {}
    for document in documents:
        name = digest(document.text)
        if document.held_out or name not in held_out:
            kept.setdefault(name, document)
    return list(kept.values())


def digest(text: str) -> str:
    """What names a document: its SHA-256, without regard to blanks, shortened."""
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:DIGEST]


def _training_tokens(
    tokenizer: Tokenizer, documents: list[Document], domain: str, limit: int
) -> tuple[Tokens, list[str]]:
    ids: list[int] = []
    hashes = []
    for document in documents:
        if document.domain == domain and not document.held_out and len(ids) < limit:
            ids += [*tokenizer.encode(document.text).ids, END_OF_TEXT]
            hashes.append(digest(document.text))
    return np.array(ids[:limit], np.int32), hashes


def _excerpts(tokenizer: Tokenizer, documents: list[Document], domain: str) -> list[dict[str, str]]:
    """From the middle of held-out documents, until there are HELD_OUT_TOKENS."""
    excerpts, missing = [], HELD_OUT_TOKENS
    for document in documents:
        if document.domain == domain and document.held_out and missing > 0:
            ids = tokenizer.encode(document.text).ids
            start = max(0, len(ids) - EXCERPT) // 2
            chosen = ids[start : start + min(EXCERPT, missing)]
            missing -= len(chosen)
            # A token may be a part of a letter.
            text = tokenizer.decode(chosen).strip("\N{REPLACEMENT CHARACTER}")
            excerpts.append({"document": digest(document.text), "source": document.key, "text": text})
    if missing > 0:
        raise ValueError(f"too little held-out text of {domain}: {missing} tokens are missing")
    return excerpts


def write_json(path: Path, content: object) -> None:
    """Readable, and the same bytes for the same content."""
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
