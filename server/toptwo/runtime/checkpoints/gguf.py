"""llama.cpp's GGUF files as a `Checkpoint`: Hugging Face's names, and numbers decoded where they are packed.

Knows how llama.cpp renames tensors, and what it does to the rows of some; headers and number formats are
`toptwo.gguf`'s. Tensors that were not packed are views of the mapped file.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path

import torch
from gguf import MODEL_ARCH_NAMES, TensorNameMap, get_tensor_name_map
from gguf import GGMLQuantizationType as Format
from torch import Tensor

from toptwo.errors import CheckpointError
from toptwo.gguf.config import architecture_of, count_layers
from toptwo.gguf.header import Gguf, StoredTensor, read_gguf
from toptwo.gguf.numbers import DECODED, decode, split_halves
from toptwo.models.checkpoint import WeightSpec
from toptwo.runtime.memory import available_cpus, release_pages

VIEWED = {Format.F32: torch.float32, Format.F16: torch.float16, Format.BF16: torch.bfloat16}
# Architectures whose queries and keys llama.cpp keeps in the order in which neighbours turn together.
NEIGHBOURS_TURN = frozenset({"llama", "granitemoe"})
SUFFIXES = (".weight", ".bias")
EXPERT = re.compile(r"\.experts\.(\d+)\.")
BLOCK = re.compile(r"blk\.(\d+)\.")
# What follows from the config, which was made of it.
DERIVED = re.compile(r"rope_(freqs|factors_long|factors_short)\.weight|blk\.\d+\.attn_rot_embd\.weight")
ELEMENTS_AT_ONCE = 1 << 20  # decoding makes several copies of so many float32 numbers, in every thread


class GgufCheckpoint:
    """See `protocol.Checkpoint`. A tensor has the first name in `specs` that llama.cpp's is made of; one that
    no spec asks for has its own.

    place: where it is, for messages. parts: the model's files, in order.
    """

    def __init__(self, place: Path, parts: Sequence[Path], specs: Sequence[WeightSpec]) -> None:
        self.directory = place
        self.paths = parts
        self._gguf = read_gguf(parts)
        self._stored = dict(_name_tensors(self._gguf, specs))
        self._mapped: dict[Path, Tensor] = {}  # files that a tensor was asked for

    def __enter__(self) -> GgufCheckpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._mapped.clear()

    @property
    def names(self) -> Set[str]:
        return self._stored.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        tensor = self._tensor(name)
        if tensor.kind not in DECODED:
            raise self._error(name, f"is {tensor.kind.name}, which cannot be decoded")
        return tensor.shape

    def tensor(self, name: str) -> Tensor:
        tensor = self._tensor(name)
        if tensor.kind in VIEWED:
            values = self._bytes(tensor).view(VIEWED[tensor.kind]).reshape(tensor.shape)
        else:
            values = self._decode(name, tensor)
        heads = _count_turned_heads(self._gguf, self._stored[name])
        if heads and tensor.shape[0] % (2 * heads):
            raise self._error(name, f"has {tensor.shape[0]} rows, which are not {heads} heads")
        turned: Tensor = split_halves(values, heads) if heads else values
        return turned

    def release(self, name: str) -> None:
        release_pages(self._bytes(self._tensor(name)))

    def _decode(self, name: str, tensor: StoredTensor) -> Tensor:
        """A packed tensor's numbers, some rows at a time in each of several threads.

        Experts, which are large, become half precision: as exact as their scales are. MXFP4, whose scales are
        not within its bounds, becomes bfloat16, which holds each of its numbers. All else is float32.
        """
        dtype = torch.float16 if len(tensor.shape) > 2 else torch.float32
        values = torch.empty(tensor.shape, dtype=torch.bfloat16 if tensor.kind == Format.MXFP4 else dtype)
        num_rows = prod(tensor.shape[:-1])
        rows, target = self._bytes(tensor).view(num_rows, -1).numpy(), values.view(num_rows, -1)
        step = max(1, ELEMENTS_AT_ONCE // tensor.shape[-1])

        def fill(start: int) -> bool:
            part = slice(start, start + step)
            target[part].copy_(torch.from_numpy(decode(rows[part], tensor.kind)))
            return bool(target[part].isfinite().all())

        with ThreadPoolExecutor(available_cpus()) as pool:
            if not all(pool.map(fill, range(0, num_rows, step))):
                raise self._error(name, "holds numbers that are not finite: it is damaged")
        return values

    def _tensor(self, name: str) -> StoredTensor:
        return self._gguf.tensors[self._stored[name]]

    def _error(self, name: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{self._tensor(name).path}: {self._stored[name]} {problem}")

    def _bytes(self, tensor: StoredTensor) -> Tensor:
        if tensor.path not in self._mapped:
            self._mapped[tensor.path] = _map(tensor.path)
        return self._mapped[tensor.path][tensor.offset : tensor.offset + tensor.size]


def _map(path: Path) -> Tensor:
    """All bytes of a file. Private, because torch knows no tensors that may not be written."""
    try:
        with path.open("rb") as file:
            return torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be mapped: {error.strerror or error}") from None


def _name_tensors(gguf: Gguf, specs: Sequence[WeightSpec]) -> Iterator[tuple[str, str]]:
    """Pairs of the name that specs use and the file's own."""
    architecture, num_layers = architecture_of(gguf), count_layers(gguf)
    named = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
    names = get_tensor_name_map(named[architecture], num_layers)
    left = dict.fromkeys(gguf.tensors)
    for piece in (piece for spec in specs for source in spec.sources for piece in source):
        stored = _stored_name(piece.name, names)
        if stored in left:
            del left[stored]
            yield piece.name, stored
    for stored in left:
        block = BLOCK.match(stored)
        # Blocks behind the last one predict further tokens.
        if not DERIVED.fullmatch(stored) and not (block and int(block[1]) >= num_layers):
            yield stored, stored


def _stored_name(name: str, names: TensorNameMap) -> str | None:
    """llama.cpp's name of a tensor. Early Mixtrals have one per expert: "ffn_gate.3" for "ffn_gate_exps"."""
    expert = EXPERT.search(name)
    stored: str | None = names.get_name(EXPERT.sub(".experts.", name) if expert else name, SUFFIXES)
    return stored.replace("_exps.", f".{expert[1]}.") if stored and expert else stored


def _count_turned_heads(gguf: Gguf, stored: str) -> int:
    """How many heads the rows of a query or key projection are whose order has to be changed; else 0."""
    architecture, part = architecture_of(gguf), stored.split(".")[-2]
    if architecture not in NEIGHBOURS_TURN or part not in ("attn_q", "attn_k"):
        return 0
    keys = gguf.metadata.below(architecture)
    num_heads = keys.integer("attention.head_count")
    return num_heads if part == "attn_q" else keys.integer("attention.head_count_kv", num_heads)
