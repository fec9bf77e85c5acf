"""GPTQ: weights of four or eight bits in groups with zero points, as AutoGPTQ and GPTQModel write them.

    X.qweight  int32 [in * bits / 32, out]            X.scales  half [groups, out]
    X.qzeros   int32 [groups, out * bits / 32]        X.g_idx   int32 [in], the group of each input

weight[o, i] = (q[i, o] - zero[g_idx[i], o]) * scale[g_idx[i], o]; the lowest bits of a word come first. In
the first version of the format ("gptq", which files are of unless they say "gptq_v2") one was subtracted from
every zero before it was stored. Facts: GPTQModel 7.7.0, nn_modules/qlinear/__init__.py and utils/model.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from toptwo.models.fields import ConfigFields
from toptwo.runtime.checkpoints.encoding import SCALES, Encoded, Encodings, part, stems
from toptwo.runtime.checkpoints.safetensors_files import SafetensorsFiles
from toptwo.runtime.checkpoints.unpacking import scale_groups, unpack

ONES = {4: 0x11111111, 8: 0x01010101}


def find(files: SafetensorsFiles, config: ConfigFields) -> Encodings:
    """See `encoding.FindEncodings`."""
    config.require("bits", *ONES)
    for key in ("checkpoint_format", "format"):
        config.require(key, "gptq", "gptq_v2")
    is_first = all(config.text(key, "gptq") == "gptq" for key in ("checkpoint_format", "format"))
    group_size = config.integer("group_size", -1, low=-1)
    return Encodings(
        {f"{stem}.weight": _find_one(files, stem, group_size, is_first) for stem in stems(files, ".qweight")}
    )


def _find_one(files: SafetensorsFiles, stem: str, group_size: int, is_first: bool) -> Encoded:
    names = {key: f"{stem}.{key}" for key in ("qweight", "qzeros", "scales", "g_idx")}
    groups, outputs = part(files, names["scales"], SCALES, [None, None])
    _, zero_words = part(files, names["qzeros"], ["I32"], [groups, None])
    # A module may have other bits and groups than the config says; shapes tell.
    bits, rest = divmod(zero_words * 32, outputs)
    if rest or bits not in ONES:
        raise files.error(names["qzeros"], f"has shape {[groups, zero_words]}, not 4 or 8 bits of {outputs}")
    words, _ = part(files, names["qweight"], ["I32"], [None, outputs])
    inputs = words * 32 // bits
    sizes = [size for size in (group_size, inputs // groups) if size > 0 and -(-inputs // size) == groups]
    if not sizes:
        raise files.error(names["scales"], f"has {groups} groups, into which {inputs} inputs do not go")
    if names["g_idx"] in files.names:
        part(files, names["g_idx"], ["I32"], [inputs])
    else:
        del names["g_idx"]
    layout = _Layout(bits, sizes[0], ONES[bits] if is_first else 0)
    return Encoded(names, (outputs, inputs), partial(_decode, layout=layout))


@dataclass(frozen=True)
class _Layout:
    """Bits of a weight, inputs in a group, and what was subtracted from a word of zeros."""

    bits: int
    group_size: int
    subtracted: int


def _decode(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None = None,
    *,
    layout: _Layout,
) -> Tensor:
    weight = unpack(qweight.T, layout.bits)
    # To whole words, with carries from zero to zero: so it was subtracted.
    zeros = unpack(qzeros + layout.subtracted, layout.bits)
    return scale_groups(weight, scales.T, zeros.T, layout.group_size, g_idx)
