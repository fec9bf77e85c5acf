"""Packed weights on disk: written while a model is first loaded, mapped ever after.

    magic, version, and where the table is | weights, each at a page | table (JSON)

The table holds each weight's place, shape and checksum, and a fingerprint of the checkpoint it was made
from. A file that does not match in every respect, or whose content has changed, is as good as none.
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec
import structlog
import torch
from torch import Tensor

from toptwo_kernels import cpu
from toptwo_kernels.ops import Matrix, WeightFormat

log = structlog.get_logger()

MAGIC = b"toptwo packed weights\0\0\0"
VERSION = 3  # of this file and of csrc/layout.h: raise it when either changes
HEADER = struct.Struct("<24sIIQQ")  # magic, version; checksum, offset and size of the table
PAGE = 4096


class Entry(msgspec.Struct, frozen=True):
    """One weight. format is None for a vector, which is float32 of shape [cols]."""

    name: str
    offset: int
    size: int
    checksum: int
    format: WeightFormat | None
    num_matrices: int
    rows: int
    cols: int
    paired: bool


class Table(msgspec.Struct, frozen=True):
    fingerprint: str
    entries: list[Entry]


@dataclass(frozen=True)
class PackedWeights:
    """What a file holds, as views of the mapped file, and the checksum of each weight's bytes."""

    matrices: Mapping[str, Matrix]
    vectors: Mapping[str, Tensor]
    checksums: Mapping[str, int]


class PackedWriter:
    """Writes a file beside its final name and renames it when it is complete; use it by `with`.

    A disk that is full or may not be written costs the file, not the start: it is reported once, and
    what follows is ignored.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self._path = path
        self._temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
        self._fingerprint = fingerprint
        self._entries: list[Entry] = []
        self._file: BinaryIO | None = None

    def __enter__(self) -> PackedWriter:
        with self._forgiving():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(self._path)
            self._file = self._temporary.open("wb")
            self._file.write(bytes(PAGE))
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            with suppress(OSError):  # what was buffered has no room either
                self._file.close()
            self._temporary.unlink(missing_ok=True)

    def add(self, name: str, weight: Matrix | Tensor) -> None:
        """Append a matrix, or a float32 vector."""
        with self._forgiving() as file:
            if file:
                self._entries.append(_append(file, name, weight))

    def finish(self) -> None:
        """Make the file complete and give it its name."""
        with self._forgiving() as file:
            if not file:
                return
            table = msgspec.json.encode(Table(self._fingerprint, self._entries))
            offset = file.tell()
            file.write(table)
            file.seek(0)
            file.write(HEADER.pack(MAGIC, VERSION, zlib.crc32(table), offset, len(table)))
            file.flush()
            os.fsync(file.fileno())
            self._temporary.replace(self._path)

    @contextmanager
    def _forgiving(self) -> Iterator[BinaryIO | None]:
        try:
            yield self._file
        except OSError as error:
            log.warning("packed weights are not kept; every start will pack anew", reason=str(error))
            self.__exit__()
            self._file = None


def _append(file: BinaryIO, name: str, weight: Matrix | Tensor) -> Entry:
    data = weight.data if isinstance(weight, Matrix) else weight.contiguous()
    offset, size = file.tell(), data.nbytes
    file.write(data.view(torch.uint8).numpy().data)  # straight from the weight's memory
    file.write(bytes(-size % PAGE))
    checksum = cpu.checksum(data)
    if isinstance(weight, Matrix):
        shape = weight.num_matrices, weight.rows, weight.cols, weight.paired
        return Entry(name, offset, size, checksum, weight.format, *shape)
    return Entry(name, offset, size, checksum, None, 1, 1, weight.numel(), False)


def _remove_leftovers(path: Path) -> None:
    """Unfinished files of processes that are gone."""
    for leftover in path.parent.glob(f"{path.name}.tmp-*"):
        if not Path(f"/proc/{leftover.suffix.removeprefix('.tmp-')}").exists():
            leftover.unlink(missing_ok=True)


def read_packed(path: Path, fingerprint: str) -> PackedWeights | None:
    """The weights of a file made from the checkpoint of that fingerprint; None if there is no such file.

    A file that is damaged is reported and counts as none.
    """
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        table = _read_table(mapped)
        if table.fingerprint != fingerprint:
            return None
        content = torch.frombuffer(mapped, dtype=torch.uint8)
        return _read_weights(content, table)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, struct.error, msgspec.MsgspecError) as error:
        log.warning("the packed weights are damaged and are made anew", path=str(path), reason=str(error))
        return None


def _read_table(mapped: mmap.mmap) -> Table:
    magic, version, checksum, offset, size = HEADER.unpack_from(mapped)
    if magic != MAGIC:
        raise ValueError("not a file of packed weights")
    if version != VERSION:
        raise ValueError(f"version {version}, expected {VERSION}")
    if offset + size != len(mapped):
        raise ValueError("the file is cut short")
    table = mapped[offset : offset + size]
    if zlib.crc32(table) != checksum:
        raise ValueError("its table has changed")
    return msgspec.json.decode(table, type=Table)


def _read_weights(content: Tensor, table: Table) -> PackedWeights:
    matrices, vectors = {}, {}
    for entry in table.entries:
        if entry.offset % PAGE or entry.offset + entry.size > len(content):
            raise ValueError(f"{entry.name} lies outside the file")
        data = content[entry.offset : entry.offset + entry.size]
        if cpu.checksum(data) != entry.checksum:
            raise ValueError(f"{entry.name} has changed")
        if entry.format is None:
            vectors[entry.name] = data.view(torch.float32)
        else:
            shape = entry.num_matrices, entry.rows, entry.cols, entry.paired
            matrices[entry.name] = Matrix(data, entry.format, *shape)
    return PackedWeights(matrices, vectors, {entry.name: entry.checksum for entry in table.entries})
