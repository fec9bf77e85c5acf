"""MXFP4, the format of gpt-oss's experts: four-bit floats in blocks of 32 with a power of two each.

    X_blocks  uint8 [..., rows, groups, 16]      X_scales  uint8 [..., rows, groups], exponents plus 127

Decoded as `X_blocks` [..., rows, groups * 32], in the order of the blocks: an architecture can tell it from
an `X` that is not quantised, which is transposed. The low half of a byte comes first. Facts: OCP Microscaling
Formats 1.0; transformers 5.23, integrations/mxfp4.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from toptwo.models.fields import ConfigFields
from toptwo.runtime.checkpoints.encoding import Encoded, Encodings, part, stems
from toptwo.runtime.checkpoints.safetensors_files import SafetensorsFiles
from toptwo.runtime.checkpoints.unpacking import split_nibbles

BLOCK_BYTES = 16
ROWS_AT_ONCE = 4096
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of codes 0 to 7; the highest bit is the sign


def _values_of_bytes() -> Tensor:
    """[256] words, each the two bfloat16 numbers that a byte means."""
    values = torch.tensor([*MAGNITUDES, *(-x for x in MAGNITUDES)], dtype=torch.bfloat16)
    codes = split_nibbles(torch.arange(256, dtype=torch.uint8))
    return values[codes.view(256, 2).long()].view(torch.int32).flatten()


VALUES_OF_BYTE = _values_of_bytes()


def find(files: SafetensorsFiles, config: ConfigFields) -> Encodings:
    """See `encoding.FindEncodings`. The config has nothing to say."""
    return Encodings({f"{stem}_blocks": _find_one(files, stem) for stem in stems(files, "_blocks")})


def _find_one(files: SafetensorsFiles, stem: str) -> Encoded:
    names = {key: f"{stem}_{key}" for key in ("blocks", "scales")}
    leading = [None] * max(2, len(files.stored(names["blocks"]).shape) - 1)
    *outer, groups, _ = part(files, names["blocks"], ["U8"], [*leading, BLOCK_BYTES])
    part(files, names["scales"], ["U8", "F8_E8M0"], [*outer, groups])
    return Encoded(names, (*outer, groups * 2 * BLOCK_BYTES), _decode)


def _decode(blocks: Tensor, scales: Tensor) -> Tensor:
    """As bfloat16, which holds every product exactly: as large a weight as these are would be twice as large
    in float32."""
    *outer, rows, groups, _ = blocks.shape
    weight = torch.empty(*outer, rows, groups * 2 * BLOCK_BYTES, dtype=torch.bfloat16)
    numbers = weight.view(-1, groups, 2 * BLOCK_BYTES)
    codes = blocks.view(-1, groups * BLOCK_BYTES)
    powers = scales.view(torch.float8_e8m0fnu).view(-1, groups, 1)
    for start in range(0, len(numbers), ROWS_AT_ONCE):
        few = slice(start, start + ROWS_AT_ONCE)
        pairs = VALUES_OF_BYTE.index_select(0, codes[few].flatten().int())
        torch.mul(pairs.view(torch.bfloat16).view_as(numbers[few]), powers[few].bfloat16(), out=numbers[few])
    return weight
