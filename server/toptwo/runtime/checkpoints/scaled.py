"""Weights stored as small numbers beside scales for the whole, for rows, groups of a row, or blocks of both.

Knows how shapes tell which of these a scale is; what the tensors are called is each format's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from toptwo.runtime.checkpoints.encoding import SCALES, Encoded, part
from toptwo.runtime.checkpoints.safetensors_files import SafetensorsFiles
from toptwo.runtime.checkpoints.unpacking import scale_blocks

SCALE_DTYPES = (*SCALES, "F8_E8M0")  # the last is a power of two


def find_scaled(
    files: SafetensorsFiles, names: Sequence[str], dtypes: Sequence[str], block: tuple[int, int] | None
) -> Encoded:
    """The weight names[0], one of `dtypes`, times the scale names[1], after the zero point names[2] if given.

    block: rows and columns that share a scale, where there is one for each block.
    Raises CheckpointError for a scale that fits no such way.
    """
    weight, scale = names[:2]
    dims = max(2, len(files.stored(weight).shape))
    shape = part(files, weight, dtypes, [None] * dims)
    scale_dims = len(files.stored(scale).shape) if scale in files.names else dims
    found = part(files, scale, SCALE_DTYPES, [None] * scale_dims)
    if len(names) > 2:
        part(files, names[2], [files.stored(weight).dtype], found)
    fit = _fit(shape, found, block)
    if fit is None:
        by_block = f" by blocks of {list(block)}" if block else ""
        raise files.error(scale, f"has shape {list(found)}, which cannot scale {list(shape)}{by_block}")
    parts = dict(zip(("weight", "scale", "zero"), names, strict=False))
    return Encoded(parts, shape, partial(_decode, grid=fit[0], block=fit[1]))


def _fit(
    shape: tuple[int, ...], scale: tuple[int, ...], block: tuple[int, int] | None
) -> tuple[list[int], tuple[int, int]] | None:
    """(the scale's shape with all dimensions of one; rows and columns that share an entry), if any fit."""
    *outer, rows, columns = shape
    blocks = [block] if block else []
    groups = [(1, columns // scale[-1])] if len(scale) == len(shape) and columns % scale[-1] == 0 else []
    for tall, wide in (*blocks, (rows, columns), (1, columns), *groups):
        grid = [*outer, -(-rows // tall), -(-columns // wide)]
        if list(scale) == grid or (len(scale) < len(grid) and _without_ones(scale) == _without_ones(grid)):
            return grid, (tall, wide)
    return None


def _without_ones(shape: Sequence[int]) -> list[int]:
    return [size for size in shape if size > 1]


def _decode(
    weight: Tensor, scale: Tensor, zero: Tensor | None = None, *, grid: list[int], block: tuple[int, int]
) -> Tensor:
    return scale_blocks(weight, scale.view(grid), None if zero is None else zero.view(grid), block)
