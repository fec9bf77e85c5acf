"""The header of a safetensors file, believed only after it was checked against the file.

Knows the format's rules and nothing of what tensors mean. Everything a header says is checked before anything
is mapped or allocated for it, so that a lie ends in one line that names the file and the tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from toptwo.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 8
MAX_NAME = 512
MAX_NUMBERS = 1 << 48  # in a tensor; one without numbers has no bytes that would bound its other sizes
LENGTH_BYTES = 8
ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a header describes it: the format's name for its numbers, its shape, and its bytes
    [start, end), counted from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name. Together they cover its data, without hole or overlap.

    Reads the header alone, at most MAX_HEADER_BYTES. Raises CheckpointError for whatever does not hold.
    """
    text, data_bytes = _read_text(path)
    try:
        table = json.loads(text, object_pairs_hook=_unique)
    except _DuplicateError as duplicate:
        raise CheckpointError(f"{path}: {duplicate} is in its header twice") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its header is not valid JSON: {error}") from None
    if not isinstance(table, dict):
        raise CheckpointError(f"{path}: its header is not a JSON object")
    table.pop("__metadata__", None)  # whatever it says, nothing reads it
    try:
        tensors = {name: _read_tensor(name, entry, data_bytes) for name, entry in table.items()}
        _check_cover(tensors, data_bytes)
    except _HeaderError as problem:
        raise CheckpointError(f"{path}: {problem}") from None
    return tensors


class _HeaderError(Exception):
    """What is wrong, with the tensor's name."""


class _DuplicateError(Exception):
    """A name that stands twice in one object."""


def _read_text(path: Path) -> tuple[bytes, int]:
    """(the header's JSON, how many bytes of data follow it)."""
    try:
        if not path.is_file():  # a pipe would make us wait, a device would never end
            raise CheckpointError(f"{path}: {'not a file' if path.exists() else 'not there'}")
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            if size < LENGTH_BYTES:
                raise CheckpointError(f"{path}: {size} bytes are too few for a safetensors file")
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path}: not a safetensors file, or its header of {length} bytes is over the limit of "
                    f"{MAX_HEADER_BYTES}"
                )
            if LENGTH_BYTES + length > size:
                raise CheckpointError(
                    f"{path}: cut short within its header: {length} bytes are announced and "
                    f"{size - LENGTH_BYTES} are there"
                )
            return file.read(length), size - LENGTH_BYTES - length
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found:
            raise _DuplicateError(_show(name))
        found[name] = value
    return found


def _read_tensor(name: str, entry: object, data_bytes: int) -> StoredTensor:
    if len(name) > MAX_NAME or not name.isprintable():  # it will stand in messages
        raise _HeaderError(f"{_show(name)} is not the name of a tensor")
    if not isinstance(entry, Mapping):
        raise _HeaderError(f"{name} is not described by an object")
    dtype, shape, span = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise _HeaderError(f"{name} has the unknown dtype {_show(dtype)}; there is {', '.join(ITEM_BYTES)}")
    if not _are_counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise _HeaderError(f"{name} has the shape {_show(shape)}, not a list of sizes")
    if not _are_counts(span) or len(span) != 2 or span[0] > span[1]:
        raise _HeaderError(f"{name} has the data_offsets {_show(span)}, not [start, end]")
    start, end = span
    if end > data_bytes:
        raise _HeaderError(f"{name} ends at byte {end} of the data, of which the file holds {data_bytes}")
    wanted = math.prod(shape) * ITEM_BYTES[dtype]
    if wanted != end - start or math.prod(max(size, 1) for size in shape) > MAX_NUMBERS:
        raise _HeaderError(
            f"{name} as {dtype} of shape {_show(shape)} needs {wanted} bytes and its data_offsets give it "
            f"{end - start}"
        )
    return StoredTensor(dtype, tuple(shape), start, end)


def _are_counts(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(each) is int and 0 <= each < 1 << 63 for each in value)


def _check_cover(tensors: Mapping[str, StoredTensor], data_bytes: int) -> None:
    position, before = 0, ""
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start < position:
            raise _HeaderError(f"{name} overlaps {before}")
        if tensor.start > position:
            raise _HeaderError(
                f"{name} leaves a hole before it: bytes {position} to {tensor.start} of the data"
            )
        position, before = tensor.end, name
    if position < data_bytes:
        raise _HeaderError(f"{data_bytes - position} bytes follow the last tensor {before}".rstrip())


def _show(value: object) -> str:
    text = f"{value!r}"
    return text if len(text) <= 60 else text[:57] + "..."
