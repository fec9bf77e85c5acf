"""Routers for experts that are equal yet: random, or told from texts of the domains they are meant for.

Knows texts, tokens and the runtime; must not know files of checkpoints.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from rich.table import Table
from tokenizers import Tokenizer
from torch import Tensor

from toptwo.default_model.ridge import Ridge, report, scale_for
from toptwo.errors import StartupError
from toptwo.model_commands.forward import load, logits
from toptwo.models.decoder import DecoderConfig
from toptwo.runtime.build import Runtime

WINDOW = 256  # tokens of a text that are looked at in one piece
HELD_OUT = 5  # of so many pieces one is kept to judge the router by
LEAST_TOKENS = HELD_OUT * WINDOW
CALIBRATED = 8  # of so many pieces one is looked at again, to set how decided routers are
DEVIATION = 0.02  # of a random router

Visit = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class Piece:
    """Some tokens of one text, and the expert that its domain belongs to."""

    expert: int
    token_ids: list[int]
    is_held_out: bool


@dataclass(frozen=True)
class Domains:
    """Folders of text, one for each expert, in the order of their names."""

    folders: list[Path]

    @classmethod
    def of(cls, directory: Path) -> Domains:
        """Raises StartupError for a directory that is none, or has fewer than two folders."""
        if not directory.is_dir():
            raise StartupError(f"--domains {directory}: no such directory")
        folders = sorted(path for path in directory.iterdir() if path.is_dir())
        if len(folders) < 2:
            raise StartupError(f"--domains {directory}: it must hold a folder of texts for each expert")
        return cls(folders)

    @property
    def names(self) -> list[str]:
        """What the folders are called."""
        return [folder.name for folder in self.folders]

    def files(self) -> list[Path]:
        """All texts."""
        return [path for folder in self.folders for path in _texts(folder)]

    def pieces(self, tokenizer: Tokenizer, tokens_per_domain: int) -> list[Piece]:
        """So many tokens of each domain. Raises StartupError where there is too little text, or none."""
        pieces: list[Piece] = []
        for expert, folder in enumerate(self.folders):
            missing = tokens_per_domain
            for token_ids, is_held_out in _windows(folder, tokenizer):
                pieces.append(Piece(expert, token_ids[:missing], is_held_out))
                missing -= len(pieces[-1].token_ids)
                if missing <= 0:
                    break
            if not any(piece.expert == expert and piece.is_held_out for piece in pieces):
                raise StartupError(
                    f"{folder}: holds too little text; {HELD_OUT * WINDOW} tokens are the least"
                )
        return pieces


def random_routers(config: DecoderConfig, num_experts: int) -> Tensor:
    """[L, E, H], the same each time."""
    generator = torch.Generator().manual_seed(0)
    shape = (config.num_layers, num_experts, config.hidden_size)
    return DEVIATION * torch.randn(shape, generator=generator)


def ridge_routers(
    directory: Path, config: DecoderConfig, domains: Domains, pieces: list[Piece], top_k: int, bar: Progress
) -> tuple[Tensor, Table]:
    """[L, E, H] by ridge regression on what enters each MLP of the dense model, and how they do."""
    # Operation by operation: what is recorded cannot be looked into.
    runtime = load(directory, WINDOW, dtype="float32", backend="reference", quantization="none")
    training = [piece for piece in pieces if not piece.is_held_out]
    held_out = [piece for piece in pieces if piece.is_held_out]
    ridge = Ridge(config.num_layers, len(domains.folders), config.hidden_size)
    for piece in bar.track(training, description="Fitting routers"):
        _visit(runtime, piece, partial(ridge.add, expert=piece.expert))
    routers_LEH = ridge.solve()
    if top_k > 1:
        calibration = _route(runtime, routers_LEH, bar.track(training[::CALIBRATED], description="Scaling"))
        routers_LEH *= torch.stack([scale_for(logits_TE) for logits_TE in calibration])[:, None, None]
    logits_LTE = _route(runtime, routers_LEH, bar.track(held_out, description="Judging routers"))
    labels_T = torch.cat([torch.full((len(piece.token_ids),), piece.expert) for piece in held_out])
    return routers_LEH, report(logits_LTE, labels_T, domains.names, top_k)


def _route(runtime: Runtime, routers_LEH: Tensor, pieces: Iterable[Piece]) -> Tensor:
    """Router logits [L, T, E] of all tokens."""
    layers: list[list[Tensor]] = [[] for _ in routers_LEH]
    for piece in pieces:
        _visit(runtime, piece, lambda layer, x_TH: layers[layer].append(x_TH @ routers_LEH[layer].T))
    return torch.stack([torch.cat(parts) for parts in layers])


def _visit(runtime: Runtime, piece: Piece, visit: Visit) -> None:
    """Run a piece; `visit(layer, x_TH)` sees what enters each MLP, which is what a router will see."""
    layers: Any = runtime.model.layers
    plain = list(layers)

    def watched(index: int) -> Callable[[Tensor], Tensor]:
        feed_forward = plain[index].feed_forward

        def run(x_TH: Tensor) -> Tensor:
            visit(index, x_TH.float())
            out_TH: Tensor = feed_forward(x_TH)
            return out_TH

        return run

    layers[:] = [replace(layer, feed_forward=watched(index)) for index, layer in enumerate(plain)]
    try:
        logits(runtime, piece.token_ids, slice(0, 1))  # what matters has been seen on the way
    finally:
        layers[:] = plain


def _windows(folder: Path, tokenizer: Tokenizer) -> Iterator[tuple[list[int], bool]]:
    """Pieces of the folder's texts, a first one of each, then a second one, and so on; and whether it is one
    to judge by. With few texts that is every fifth piece, else all pieces of every fifth text."""
    paths = _texts(folder)
    texts = [_cut(path, tokenizer) for path in paths]
    for turn in itertools.count():
        found = False
        for number, pieces in enumerate(texts):
            piece = next(pieces, None)
            if piece is not None:
                found = True
                kept = number if len(paths) >= HELD_OUT else turn
                yield piece, kept % HELD_OUT == HELD_OUT - 1
        if not found:
            return


def _cut(path: Path, tokenizer: Tokenizer) -> Iterator[list[int]]:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"{path}: is no text that can be read: {error}") from None
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    for start in range(0, len(ids) - WINDOW // 4, WINDOW):
        yield ids[start : start + WINDOW]


def _texts(folder: Path) -> list[Path]:
    """In an order that has nothing to do with what they say, and is the same each time."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return sorted(files, key=lambda path: hashlib.sha256(str(path.relative_to(folder)).encode()).digest())
