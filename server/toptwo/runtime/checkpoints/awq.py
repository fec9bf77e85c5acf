"""AWQ: four-bit weights in groups with zero points, in the order of AutoAWQ's GEMM kernels.

    X.qweight  int32 [in, out / 8]      X.qzeros  int32 [groups, out / 8]      X.scales  half [groups, out]

weight[o, i] = (q[i, o] - zero[g, o]) * scale[g, o], where g is the group of input i. Eight outputs in a row
share a word, evens before odds. Facts: AutoAWQ 0.2.9, awq/modules/linear/gemm.py.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from toptwo.models.fields import ConfigFields
from toptwo.runtime.checkpoints.encoding import SCALES, Encoded, Encodings, part, stems
from toptwo.runtime.checkpoints.safetensors_files import SafetensorsFiles
from toptwo.runtime.checkpoints.unpacking import scale_blocks

BITS = 4
PER_WORD = 32 // BITS
OUTPUT_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)


def find(files: SafetensorsFiles, config: ConfigFields) -> Encodings:
    """See `encoding.FindEncodings`."""
    config.require("bits", BITS)
    config.require("w_bit", BITS)
    config.require("version", "gemm", "GEMM")
    config.require("format", "gemm")
    config.require("zero_point", True)
    return Encodings({f"{stem}.weight": _find_one(files, stem) for stem in stems(files, ".qweight")})


def _find_one(files: SafetensorsFiles, stem: str) -> Encoded:
    names = {key: f"{stem}.{key}" for key in ("qweight", "qzeros", "scales")}
    inputs, words = part(files, names["qweight"], ["I32"], [None, None])
    groups, _ = part(files, names["qzeros"], ["I32"], [None, words])
    part(files, names["scales"], SCALES, [groups, words * PER_WORD])
    if inputs % groups:
        raise files.error(names["qweight"], f"has {inputs} inputs, which are not {groups} groups of one size")
    return Encoded(names, (words * PER_WORD, inputs), partial(_decode, group_size=inputs // groups))


def _decode(qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int) -> Tensor:
    return scale_blocks(_unpack(qweight), scales.T, _unpack(qzeros), (1, group_size))


def _unpack(words: Tensor) -> Tensor:
    """[N, out / 8] words to uint8 [out, N]."""
    turned = words.T.contiguous()
    unpacked = torch.empty(len(turned), PER_WORD, len(words), dtype=torch.uint8)
    for place, output in enumerate(OUTPUT_OF_NIBBLE):
        unpacked[:, output] = turned >> BITS * place & 15
    return unpacked.flatten(0, 1)
