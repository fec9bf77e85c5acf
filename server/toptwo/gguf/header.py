"""What a GGUF file says of itself, metadata and tensors, believed only after it was checked against the file.

Knows the container, versions 2 and 3, and how many bytes each number format takes. Must not know what keys
and tensors mean. Everything is checked before memory is taken for it, so that a lie ends in one line that
names the file and the tensor or key.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from gguf import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGUF_MAGIC,
    GGMLQuantizationType,
    GGUFValueType,
)

from toptwo.errors import CheckpointError
from toptwo.gguf.metadata import Metadata, Value, show

VERSIONS = (2, 3)
# Real ones stay far below: of the largest vocabularies 20 MB, 600 000 merges and 2 000 tensors.
MAX_HEADER_BYTES = 1 << 26
MAX_ARRAY = 1 << 21
MAX_KEYS = 1 << 12
MAX_TENSORS = 1 << 16
MAX_NAME = 256
MAX_DIMENSIONS = 4
MIN_ALIGNMENT = 8  # every number format may then be viewed where it lies

_FORMATS: dict[int, str] = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
    GGUFValueType.BOOL: "<?",
}
_KINDS = {int(kind): kind for kind in GGML_QUANT_SIZES}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is and how it is stored. shape: the slowest dimension first, as torch and numpy have it.

    offset: of its first byte in the file `path`; size: in bytes.
    """

    path: Path
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class Gguf:
    """A model's metadata and tensors by their names in the file; of all its files, where it is split.

    path: the file that holds the metadata.
    """

    path: Path
    metadata: Metadata
    tensors: Mapping[str, StoredTensor]


def read_gguf(paths: Iterable[Path]) -> Gguf:
    """The model in one file, or in several: the first holds the metadata, each says which one it is.

    Reads headers alone. Raises CheckpointError for whatever does not hold.
    """
    parts = [_read_file(path) for path in paths]
    tensors: dict[str, StoredTensor] = {}
    for number, part in enumerate(parts):
        count, place = part.metadata.integer("split.count", 0) or 1, part.metadata.integer("split.no", 0)
        if (count, place) != (len(parts), number):
            raise CheckpointError(
                f"{part.path}: is part {place + 1} of {count}, not part {number + 1} of {len(parts)}"
            )
        for name in sorted(tensors.keys() & part.tensors.keys()):
            raise CheckpointError(f"{part.path}: tensor {name} is also in {tensors[name].path.name}")
        tensors |= part.tensors
    first = parts[0]
    if (told := first.metadata.integer("split.tensors.count", len(tensors))) != len(tensors):
        raise first.metadata.error("split.tensors.count", f"is {told}, and {len(tensors)} tensors are there")
    return Gguf(first.path, first.metadata, tensors)


def _read_file(path: Path) -> Gguf:
    try:
        if not path.is_file():  # a pipe would make us wait
            raise CheckpointError(f"{path}: {'not a file' if path.exists() else 'not there'}")
        with path.open("rb") as file:
            size = path.stat().st_size
            if size < 4:
                raise CheckpointError(f"{path}: {size} bytes are too few for a GGUF file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _read_header(path, data)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None
    except _HeaderError as problem:
        raise CheckpointError(f"{path}: {problem}") from None


class _HeaderError(Exception):
    """What is wrong, and with which tensor or key."""


class _Cursor:
    """Reads a file's header from the front. Nothing beyond its end, or the limit, is ever touched."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._end = min(len(data), MAX_HEADER_BYTES)
        self.position = 0

    def number(self, layout: str, what: str) -> int:
        (value,) = struct.unpack(layout, self.take(struct.calcsize(layout), what))
        return int(value)

    def take(self, size: int, what: str) -> bytes:
        start = self.position
        if size > self._end - start:
            raise _HeaderError(self._problem(what))
        self.position = start + size
        return self._data[start : self.position]

    def text(self, what: str) -> str:
        return self.texts(1, what)[0]

    def texts(self, count: int, what: str) -> list[str]:
        pieces = []
        for _ in range(count):
            pieces.append(self.take(int.from_bytes(self.take(8, what), "little"), what))
        try:
            return [piece.decode() for piece in pieces]
        except UnicodeDecodeError:
            raise _HeaderError(f"{what} is not valid UTF-8") from None

    def name(self, what: str) -> str:
        """A text that will stand in messages."""
        name = self.text(what)
        if not 0 < len(name) <= MAX_NAME or not name.isprintable():
            raise _HeaderError(f"{what} cannot be {show(name)}")
        return name

    def _problem(self, what: str) -> str:
        if self._end < len(self._data):
            return f"{what} lies beyond the first {MAX_HEADER_BYTES} bytes, more than any header has"
        return f"the file ends within {what}: it is cut short or damaged"


def _read_header(path: Path, data: mmap.mmap) -> Gguf:
    cursor = _Cursor(data)
    if cursor.number("<I", "the magic number") != GGUF_MAGIC:
        raise _HeaderError("not a GGUF file")
    version = cursor.number("<I", "the version")
    if version not in VERSIONS:
        order = " in the byte order of another machine" if not version & 0xFFFF else ""
        raise _HeaderError(f"GGUF version {version}{order} is not supported; there is 2 and 3")
    num_tensors, num_keys = (cursor.number("<Q", "the counts of tensors and keys") for _ in range(2))
    if num_tensors > MAX_TENSORS or num_keys > MAX_KEYS:
        raise _HeaderError(f"it announces {num_tensors} tensors and {num_keys} keys: it is damaged")
    metadata: dict[str, Value] = {}
    for number in range(num_keys):
        key = cursor.name(f"the name of key {number}")
        if key in metadata:
            raise _HeaderError(f"{key} is in its metadata twice")
        metadata[key] = _read_value(cursor, key)
    described = [_read_description(cursor, number) for number in range(num_tensors)]
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < MIN_ALIGNMENT or alignment & (alignment - 1):
        raise _HeaderError(
            f"general.alignment must be a power of two from {MIN_ALIGNMENT} on, not {alignment}"
        )
    start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, StoredTensor] = {}
    for name, kind, shape, offset in described:
        if name in tensors:
            raise _HeaderError(f"{name} is in its header twice")
        if offset % alignment:
            raise _HeaderError(
                f"{name} begins at byte {offset} of the data, not at a multiple of {alignment}"
            )
        tensors[name] = StoredTensor(path, kind, shape, start + offset, _bytes_of(name, kind, shape))
    _check_places(tensors, len(data))
    return Gguf(path, Metadata(path, metadata), tensors)


def _read_value(cursor: _Cursor, key: str) -> Value:
    kind = cursor.number("<I", key)
    if kind == GGUFValueType.STRING:
        return cursor.text(key)
    if kind == GGUFValueType.ARRAY:
        return _read_array(cursor, key)
    layout = _layout_of(kind, key)
    (value,) = struct.unpack(layout, cursor.take(struct.calcsize(layout), key))
    if kind == GGUFValueType.FLOAT32:
        # 1e-05 comes back as 9.999999747378752e-06. The shortest decimal is meant.
        return float(str(np.float32(value)))
    return value if isinstance(value, bool | float) else int(value)


def _read_array(cursor: _Cursor, key: str) -> list[bool] | list[int] | list[float] | list[str]:
    kind, count = cursor.number("<I", key), cursor.number("<Q", key)
    if count > MAX_ARRAY:
        raise _HeaderError(f"{key} announces {count} entries: it is damaged")
    if kind == GGUFValueType.STRING:
        return cursor.texts(count, key)
    numbers = np.dtype(_layout_of(kind, key))
    values: list[bool] | list[int] | list[float]
    values = np.frombuffer(cursor.take(count * numbers.itemsize, key), numbers).tolist()
    return values


def _layout_of(kind: int, key: str) -> str:
    if kind not in _FORMATS:
        raise _HeaderError(f"{key} has a value of the unknown type {kind}")
    return _FORMATS[kind]


def _read_description(cursor: _Cursor, number: int) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int]:
    """Name, number format, shape, and where it begins in the data."""
    name = cursor.name(f"the name of tensor {number}")
    dimensions = cursor.number("<I", name)
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise _HeaderError(f"{name} cannot have {dimensions} dimensions")
    shape = tuple(cursor.number("<Q", name) for _ in range(dimensions))[::-1]
    kind = cursor.number("<I", name)
    if kind not in _KINDS:
        raise _HeaderError(f"{name} is stored in the unknown number format {kind}")
    return name, _KINDS[kind], shape, cursor.number("<Q", name)


def _bytes_of(name: str, kind: GGMLQuantizationType, shape: tuple[int, ...]) -> int:
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if 0 in shape or shape[-1] % block:
        raise _HeaderError(
            f"{name} of shape {list(shape)} cannot be {kind.name}, which has blocks of {block}"
        )
    return prod(shape) // block * int(block_bytes)


def _check_places(tensors: dict[str, StoredTensor], file_size: int) -> None:
    before, end = "", 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        if tensor.offset < end:
            raise _HeaderError(f"{name} overlaps {before}")
        before, end = name, tensor.offset + tensor.size
        if end > file_size:
            raise _HeaderError(f"{name} ends at byte {end} and the file at {file_size}: it is cut short")
