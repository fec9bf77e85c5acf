"""From safetensors files to a model's weights, one tensor at a time.

Knows files, names and shapes; which names a model wants is the architecture's `weight_map`. Pickled
checkpoints (.bin, .pt) are refused: unpickling runs code.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from toptwo.errors import StartupError
from toptwo.models.checkpoint import Piece, WeightSpec
from toptwo.runtime.memory import release_pages

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
LOADABLE_DTYPES = ("F32", "BF16", "F16")
# Buffers that old exporters wrote although they follow from the config.
DERIVED_SUFFIXES = (".rotary_emb.inv_freq",)

Keep = Callable[[WeightSpec, Tensor], None]


class Checkpoint:
    """The tensors of a directory's safetensors files, memory-mapped; close it by `with`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.paths = _weight_files(directory)
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        for path in self.paths:
            handle = self._open(path)
            for name in handle.keys():  # noqa: SIM118  (not a dict)
                if name in self._files:
                    raise StartupError(f"{path}: tensor {name} is also in another file")
                self._files[name] = handle

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()
        self._stack.close()

    def _open(self, path: Path) -> Any:
        try:
            return self._stack.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError, ValueError) as error:
            raise StartupError(f"{path}: not a readable safetensors file: {error}") from None

    @property
    def names(self) -> set[str]:
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        part = self._files[name].get_slice(name)
        if part.get_dtype() not in LOADABLE_DTYPES:
            supported = ", ".join(LOADABLE_DTYPES)
            raise StartupError(
                f"{self.directory}: {name} is {part.get_dtype()}; only {supported} can be loaded"
            )
        return tuple(part.get_shape())

    def tensor(self, name: str) -> Tensor:
        """The tensor as a view of the mapped file: pages are read when they are first used."""
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor


def _weight_files(directory: Path) -> list[Path]:
    index = directory / INDEX
    if index.exists():
        return _indexed_files(index)
    if (directory / SINGLE).exists():
        return [directory / SINGLE]
    pickles = sorted(path.name for path in directory.glob("*") if path.suffix in PICKLES)
    if pickles:
        raise StartupError(
            f"{directory / pickles[0]}: pickled weights are refused because unpickling runs code; "
            "convert the checkpoint to safetensors"
        )
    raise StartupError(f"{directory}: no weights; expected {SINGLE} or {INDEX}")


def _indexed_files(index: Path) -> list[Path]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StartupError(f"{index}: not a valid weight index ({error!r})") from None
    for name in names:
        # Only plain names: an index must not reach outside its directory.
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise StartupError(f"{index}: {name!r} is not the name of a safetensors file beside it")
        if not (index.parent / name).exists():
            raise StartupError(f"{index.parent / name}: listed in {INDEX} but not there")
    return [index.parent / name for name in names]


def load_weights(
    checkpoint: Checkpoint, specs: Sequence[WeightSpec], ignored: Sequence[str], keep: Keep
) -> None:
    """Hand every weight of `specs`, assembled, to `keep`, one at a time.

    Memory beyond what `keep` holds on to is that of the largest weight.
    Raises StartupError that names missing, unknown and misshapen tensors.
    """
    sources = {spec.name: _choose_source(spec, checkpoint.names) for spec in specs}
    _check_names(checkpoint, sources, ignored)
    for spec in specs:
        for piece in sources[spec.name]:
            _check_shape(checkpoint, spec, piece)
    for spec in specs:
        pieces = sources[spec.name]
        keep(spec, _assemble(checkpoint, spec, pieces))
        for piece in pieces:
            release_pages(checkpoint.tensor(piece.name))


def _choose_source(spec: WeightSpec, names: set[str]) -> tuple[Piece, ...]:
    """The first complete source, else the most complete one, so that an error names what lacks."""
    return max(spec.sources, key=lambda pieces: sum(p.name in names for p in pieces) / len(pieces))


def _check_names(
    checkpoint: Checkpoint, sources: dict[str, tuple[Piece, ...]], ignored: Sequence[str]
) -> None:
    wanted = {piece.name for pieces in sources.values() for piece in pieces}
    unknown = {
        name for name in checkpoint.names - wanted - set(ignored) if not name.endswith(DERIVED_SUFFIXES)
    }
    problems = [
        f"{what} {_list_some(names)}"
        for what, names in (("misses", wanted - checkpoint.names), ("has unknown", unknown))
        if names
    ]
    if problems:
        raise StartupError(f"{checkpoint.directory}: the checkpoint " + " and ".join(problems))


def _list_some(names: set[str], limit: int = 4) -> str:
    shown = ", ".join(sorted(names)[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _check_shape(checkpoint: Checkpoint, spec: WeightSpec, piece: Piece) -> None:
    # A meta tensor's part tells what a piece must be, without allocating anything.
    expected = tuple(torch.empty(spec.shape, device="meta")[piece.into].shape)
    found = checkpoint.shape(piece.name)
    if found != expected:
        raise StartupError(
            f"{checkpoint.directory}: {piece.name} has shape {list(found)}, expected {list(expected)}"
        )


def _assemble(checkpoint: Checkpoint, spec: WeightSpec, pieces: tuple[Piece, ...]) -> Tensor:
    if len(pieces) == 1 and not pieces[0].into:
        return checkpoint.tensor(pieces[0].name)
    weight: Tensor | None = None
    for piece in pieces:
        part = checkpoint.tensor(piece.name)
        weight = torch.empty(spec.shape, dtype=part.dtype) if weight is None else weight
        weight[piece.into].copy_(part)
        release_pages(part)
    assert weight is not None  # noqa: S101  (a source has pieces)
    return weight
