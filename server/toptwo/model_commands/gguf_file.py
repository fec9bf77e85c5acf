"""Writes a GGUF file: number formats, and the bytes of its tensors one piece at a time.

Holds one piece of one tensor in memory, whatever the size of the model. Knows safetensors through
`Checkpoint` and GGUF through its library; must not know what a person asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Format
from numpy.typing import NDArray
from torch import Tensor

from toptwo.errors import StartupError
from toptwo.model_commands.gguf_layout import (
    ARCHITECTURE,
    GgufTensor,
    Role,
    add_hyperparameters,
    interleave_halves,
)
from toptwo.model_commands.gguf_vocabulary import Vocabulary, add_vocabulary
from toptwo.models.mixtral import MixtralConfig
from toptwo.runtime.checkpoints.protocol import Checkpoint

CHUNK_ELEMENTS = 1 << 22  # 16 MiB as float32, of which quantising makes several copies


@dataclass(frozen=True)
class ExportType:
    """The number format of each role; norms and routers are always float32."""

    formats: dict[Role, Format]
    file_type: gguf.LlamaFileType

    @classmethod
    def of(cls, table: Format, matrix: Format, file_type: gguf.LlamaFileType) -> ExportType:
        return cls({Role.FINE: Format.F32, Role.TABLE: table, Role.MATRIX: matrix}, file_type)

    def bytes_of(self, tensor: GgufTensor) -> int:
        """Size of the tensor's data in the file. Raises StartupError where its rows cannot be packed."""
        kind = self.formats[tensor.role]
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if tensor.shape[-1] % block_size:
            raise StartupError(
                f"--type: {kind.name} needs rows in multiples of {block_size}, "
                f"and those of {tensor.name} have {tensor.shape[-1]} elements"
            )
        return prod(tensor.shape) // block_size * int(block_bytes)


@dataclass(frozen=True)
class GgufContent:
    """Everything that a file is made of but the weights."""

    name: str
    kind: ExportType
    config: MixtralConfig
    vocabulary: Vocabulary
    tensors: list[GgufTensor]


def write_gguf(
    content: GgufContent, checkpoint: Checkpoint, path: Path, advance: Callable[[int], object]
) -> None:
    """Write the file; `advance` hears how many bytes of tensors were added. Raises OSError."""
    _write_head(content, path)
    # The library would want each tensor whole.
    with path.open("ab") as file:
        _pad(file)
        for tensor in content.tensors:
            for piece in packed_pieces(checkpoint, tensor, content.kind.formats[tensor.role]):
                file.write(piece.data)
                advance(piece.nbytes)
            _pad(file)


def _write_head(content: GgufContent, path: Path) -> None:
    """Metadata and the list of tensors: all that comes before their data."""
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    writer.add_name(content.name)
    writer.add_file_type(content.kind.file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_hyperparameters(writer, content.config)
    add_vocabulary(writer, content.vocabulary)
    for tensor in content.tensors:
        writer.add_tensor_info(
            tensor.name,
            tensor.shape,
            np.dtype(np.float32),  # of no effect beside a raw_dtype
            content.kind.bytes_of(tensor),
            raw_dtype=content.kind.formats[tensor.role],
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def packed_pieces(checkpoint: Checkpoint, tensor: GgufTensor, kind: Format) -> Iterator[NDArray[Any]]:
    """The tensor's data in `kind`, piece by piece from the first row to the last."""
    for part in tensor.parts:
        weight = checkpoint.tensor(part.source)[part.index]
        if tensor.rotated_heads:
            weight = interleave_halves(weight, tensor.rotated_heads)
        rows = weight.reshape(-1, weight.shape[-1])
        step = max(1, CHUNK_ELEMENTS // rows.shape[1])
        for start in range(0, len(rows), step):
            yield _pack(rows[start : start + step], kind)


def _pack(rows: Tensor, kind: Format) -> NDArray[Any]:
    if kind is Format.BF16:  # rounds to nearest even, as the library does, and faster
        return rows.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    packed: NDArray[Any] = gguf.quantize(rows.float().contiguous().numpy(), kind)
    return packed


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % gguf.GGUF_DEFAULT_ALIGNMENT))
