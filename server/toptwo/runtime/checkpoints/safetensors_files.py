"""A directory's safetensors files: which there are, what is in them, and their tensors, memory-mapped.

Knows files and dtypes; must not know that several tensors may be one quantised weight. Pickled checkpoints
(.bin, .pt) are refused: unpickling runs code.
"""

from __future__ import annotations

import json
from collections.abc import Set
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from toptwo.errors import CheckpointError
from toptwo.runtime.checkpoints.header import MAX_HEADER_BYTES, StoredTensor, read_header
from toptwo.runtime.memory import release_pages

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
FLOATS = ("F32", "BF16", "F16")
SMALL_FLOATS = ("F8_E4M3", "F8_E5M2")


class SafetensorsFiles:
    """The tensors of a directory's safetensors files: a `Checkpoint` of those that are not quantised, and
    `stored` and `raw` for decoders of the others.

    Raises CheckpointError for files that are not what they should be.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.paths, file_of = weight_files(directory)
        self._path_of: dict[str, Path] = {}
        self._stored: dict[str, StoredTensor] = {}
        for path in self.paths:
            header = read_header(path)
            for name in sorted(header.keys() & self._path_of.keys()):
                raise CheckpointError(f"{path}: tensor {name} is also in {self._path_of[name].name}")
            self._stored |= header
            self._path_of |= dict.fromkeys(header, path)
        for name, file in file_of.items():
            if self._path_of.get(name) != directory / file:
                raise CheckpointError(f"{directory / file}: lacks {name!r}, which {INDEX} says is in it")
        self._stack = ExitStack()
        self._handles: dict[Path, Any] = {}  # of files that a tensor was asked for

    def __enter__(self) -> SafetensorsFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._handles.clear()
        self._stack.close()

    @property
    def names(self) -> Set[str]:
        return self._stored.keys()

    def stored(self, name: str) -> StoredTensor:
        """What the header says of a tensor."""
        return self._stored[name]

    def raw(self, name: str) -> Tensor:
        """The tensor as it is stored, a view of the mapped file: pages are read when they are first used."""
        path = self._path_of[name]
        if path not in self._handles:
            self._handles[path] = self._open(path)
        tensor: Tensor = self._handles[path].get_tensor(name)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        stored = self._stored[name]
        if stored.dtype not in FLOATS + SMALL_FLOATS:
            supported = ", ".join(FLOATS + SMALL_FLOATS)
            raise self.error(name, f"is {stored.dtype}; only {supported} can be loaded")
        return stored.shape

    def tensor(self, name: str) -> Tensor:
        tensor = self.raw(name)
        # bfloat16 holds every number of both eight-bit formats.
        return tensor.bfloat16() if self._stored[name].dtype in SMALL_FLOATS else tensor

    def release(self, name: str) -> None:
        release_pages(self.raw(name))

    def error(self, name: str, problem: str) -> CheckpointError:
        """What is wrong with a tensor, told with its file."""
        return CheckpointError(f"{self._path_of[name]}: {name} {problem}")

    def _open(self, path: Path) -> Any:
        try:
            return self._stack.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError, ValueError, RuntimeError, MemoryError) as error:
            # The last two where the system does not map so much.
            raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from None


def weight_files(directory: Path) -> tuple[list[Path], dict[str, str]]:
    """(the files, which file an index says each tensor is in); a file that stands alone needs no index."""
    index = directory / INDEX
    if index.exists():
        file_of = _read_index(index)
        return [directory / name for name in sorted(set(file_of.values()))], file_of
    if (directory / SINGLE).exists():
        return [directory / SINGLE], {}
    pickles = sorted(path.name for path in directory.glob("*") if path.suffix in PICKLES)
    if pickles:
        raise CheckpointError(
            f"{directory / pickles[0]}: pickled weights are refused because unpickling runs code; "
            "convert the checkpoint to safetensors"
        )
    raise CheckpointError(f"{directory}: no weights; expected {SINGLE} or {INDEX}")


def _read_index(index: Path) -> dict[str, str]:
    try:
        with index.open("rb") as file:
            file_of = dict(json.loads(file.read(MAX_HEADER_BYTES))["weight_map"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: not a valid weight index ({error!r})") from None
    if not file_of:
        raise CheckpointError(f"{index}: lists no tensors")
    for name in file_of.values():
        # Only plain names: an index must not reach outside its directory.
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: {name!r} is not the name of a safetensors file beside it")
    return file_of
