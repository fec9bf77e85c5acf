"""compressed-tensors, the format of LLM Compressor: integers in words, or integers or floats of eight bits.

pack-quantized:
    X.weight_packed      int32 [..., out, in * bits / 32]
    X.weight_scale       float [..., out, groups]
    X.weight_shape       the weight's own shape
    X.weight_zero_point  int32 [..., out * bits / 32, groups], where it is asymmetric
    X.weight_g_idx       int32 [in], the group of each input, where they were reordered
int-quantized, float-quantized:
    X.weight             int8 or float8 [..., out, in]
    X.weight_scale       float, for all, for rows, or for groups or blocks of them; see `scaled.py`
    X.weight_zero_point  as the weight, and of the scale's shape

Packed integers are stored plus half their range, and so are packed zero points; the lowest bits of a word
come first. Facts: compressed-tensors 0.20.0, compressors/pack_quantized and compressors/naive_quantized.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from toptwo.models.fields import ConfigFields
from toptwo.runtime.checkpoints.encoding import SCALES, Encoded, Encodings, named, part, stems
from toptwo.runtime.checkpoints.safetensors_files import SMALL_FLOATS, SafetensorsFiles
from toptwo.runtime.checkpoints.scaled import find_scaled
from toptwo.runtime.checkpoints.unpacking import scale_groups, unpack

PACKED = "pack-quantized"
FORMATS = (PACKED, "int-quantized", "float-quantized", "naive-quantized", "mixed-precision", "dense")
# Of activations and caches, which are not computed in so few bits here.
UNUSED = (
    "input_scale",
    "input_zero_point",
    "output_scale",
    "output_zero_point",
    "q_scale",
    "k_scale",
    "v_scale",
    "q_zero_point",
    "k_zero_point",
    "v_zero_point",
)


def find(files: SafetensorsFiles, config: ConfigFields) -> Encodings:
    """See `encoding.FindEncodings`."""
    _check_config(config)
    packed = list(stems(files, ".weight_packed"))
    bits = _packed_bits(config) if packed else 0
    weights = {f"{stem}.weight": _find_packed(files, stem, bits) for stem in packed}
    block = _block(config)
    for stem in stems(files, ".weight_scale"):
        if f"{stem}.weight" in files.names:
            weights[f"{stem}.weight"] = _find_scaled(files, stem, block)
    return Encodings(weights, named(files, *UNUSED))


def _check_config(config: ConfigFields) -> None:
    groups = config.sections("config_groups")
    for each in (config, *groups):
        each.require("format", None, *FORMATS)
    config.section("sparsity_config").require("format", "dense")
    if config.section("transform_config").sections("config_groups"):
        # The weights would be right, and the model wrong without rotations at run time.
        raise config.error("transform_config", "is not supported")


def _packed_bits(config: ConfigFields) -> int:
    """Of all packed integers: shapes alone would not tell four bits from eight of half as many inputs."""
    schemes = [group.section("weights") for group in config.sections("config_groups")]
    widths = {scheme.integer("num_bits", 8) for scheme in schemes if scheme.text("type", "int") == "int"}
    if len(widths) != 1 or not widths <= {4, 8}:
        raise config.error("config_groups", f"num_bits must be 4 or 8 for all, not {sorted(widths)}")
    return widths.pop()


def _block(config: ConfigFields) -> tuple[int, int] | None:
    """Rows and columns that share a scale, where any do."""
    schemes = [group.section("weights") for group in config.sections("config_groups")]
    blocks = {block for scheme in schemes if (block := scheme.integers("block_structure"))}
    if not blocks:
        return None
    if len(blocks) > 1 or len(block := blocks.pop()) != 2 or 0 in block:
        raise config.error("config_groups", "block_structure must be two sizes, the same for all")
    return block[0], block[1]


def _find_scaled(files: SafetensorsFiles, stem: str, block: tuple[int, int] | None) -> Encoded:
    names = [f"{stem}.weight", f"{stem}.weight_scale", f"{stem}.weight_zero_point"]
    given = [name for name in names if name in files.names]
    return find_scaled(files, given, ("I8", *SMALL_FLOATS), block)


def _find_packed(files: SafetensorsFiles, stem: str, bits: int) -> Encoded:
    names = {key: f"{stem}.weight_{key}" for key in ("packed", "scale", "shape", "zero_point", "g_idx")}
    dims = max(2, len(files.stored(names["packed"]).shape))
    *outer, rows, words = part(files, names["packed"], ["I32"], [None] * dims)
    columns = words * 32 // bits
    *_, groups = part(files, names["scale"], SCALES, [*outer, rows, None])
    if columns % groups:
        raise files.error(names["scale"], f"has {groups} groups, into which {columns} inputs do not go")
    part(files, names["shape"], ["I64", "I32"], [dims])
    optional = {"zero_point": [*outer, -(-rows * bits // 32), groups], "g_idx": [columns]}
    for key, shape in optional.items():
        if names[key] in files.names:
            part(files, names[key], ["I32"], shape)
        else:
            del names[key]
    return Encoded(names, (*outer, rows, columns), partial(_decode_packed, bits=bits))


def _decode_packed(
    packed: Tensor,
    scale: Tensor,
    shape: Tensor,
    zero_point: Tensor | None = None,
    g_idx: Tensor | None = None,
    *,
    bits: int,
) -> Tensor:
    weight = unpack(packed, bits)
    if shape.tolist() != list(weight.shape):
        raise ValueError(f"weight_shape is {shape.tolist()}, and {list(weight.shape)} are packed")
    if zero_point is None:
        zero = torch.full_like(scale, 1 << bits - 1)
    else:
        zero = unpack(zero_point.mT, bits).mT[..., : weight.shape[-2], :]
    return scale_groups(weight, scale, zero, weight.shape[-1] // scale.shape[-1], g_idx)
