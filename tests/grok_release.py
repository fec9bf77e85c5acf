"""Tiny imitations of xai-org's release of Grok-1: one pickle per parameter and shard.

The pickles are made by Python's own pickle module, of numpy arrays and of a class that is called as in the
release: what reads them meets what it would meet there.
"""

from __future__ import annotations

import io
import pickle
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from grok_reference import Parameters

BLOCKS = 4  # of rows with scales of their own; in the release, eight devices had a part of the rows each

# The release's partition rules: what the axes of a parameter are split over.
RULES: dict[str, tuple[str | None, ...]] = {
    "in_out_embed": (None, "model"),
    "multi_head_attention/query": ("data", "model"),
    "multi_head_attention/key": ("data", "model"),
    "multi_head_attention/value": ("data", "model"),
    "multi_head_attention/linear": ("model", "data"),
    "router": ("data", None),
    "moe/linear": (None, "data", "model"),
    "moe/linear_v": (None, "data", "model"),
    "moe/linear_1": (None, "model", "data"),
}
PLAIN = ("in_out_embed", "router", "rms_norm", "rms_norm_1", "rms_norm_2", "rms_norm_3")


@dataclass
class QuantizedWeight8bit:
    """Pickled by the name of the release's class."""

    weight: Any
    scales: Any


class bfloat16:  # noqa: N801  (so it is called)
    """Stands for the type of JAX's 16-bit numbers."""


for stand_in, module in ((QuantizedWeight8bit, "__main__"), (bfloat16, "ml_dtypes")):
    stand_in.__module__ = module


@dataclass
class Halves:
    """A bfloat16 array, which numpy does not have."""

    values: Tensor


class HalfType:
    """Its dtype."""


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Halves):
            rebuild, arguments, _ = np.zeros(1).__reduce__()
            data = value.values.contiguous().view(torch.uint8).numpy().tobytes()
            return rebuild, arguments, (1, tuple(value.values.shape), HalfType(), False, data)
        if isinstance(value, HalfType):
            return np.dtype, (bfloat16, False, True), (3, "<", None, None, None, -1, -1, 0)
        return NotImplemented


def pickled(value: object, protocol: int = 4) -> bytes:
    """`value` as a program of the release would pickle it."""
    halves, buffer = types.ModuleType("ml_dtypes"), io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "ml_dtypes", halves)
        patch.setattr(halves, "bfloat16", bfloat16, raising=False)
        patch.setattr(sys.modules["__main__"], "QuantizedWeight8bit", QuantizedWeight8bit, raising=False)
        _Pickler(buffer, protocol).dump(value)
    return buffer.getvalue()


def write_release(
    directory: Path, parameters: Parameters, shards: int = 1, split: str = "model"
) -> Parameters:
    """Write tensor{index}_{shard} files, split along the axes of the "model" or "data" mesh; return what the
    quantised parameters stand for."""
    directory.mkdir(parents=True)
    tree: dict[str, dict[str, list[object]]] = {}
    meant: Parameters = {}
    for path, parameter in parameters.items():
        own = path.partition("/")[2] or path
        rule = RULES.get(own, ())
        axis = rule.index(split) if split in rule else None
        root = "transformer" if own != path else "language_model"
        leaf = {"in_out_embed": "embeddings"}.get(own, "scale" if own.startswith("rms_norm") else "w")
        if own in PLAIN:
            parts: list[object] = [part.numpy() for part in _parts(parameter, axis, shards)]
            meant[path] = parameter
        else:
            blocks = BLOCKS if axis == parameter.dim() - 2 else 1
            weight, scales, meant[path] = _quantize(parameter, blocks)
            pairs = zip(_parts(weight, axis, shards), _parts(scales, axis, shards), strict=True)
            parts = [QuantizedWeight8bit(w.numpy(), Halves(s)) for w, s in pairs]
        tree[f"{root}/{path}"] = {leaf: parts}
    for index, parts in enumerate(_flatten(tree)):
        for shard, part in enumerate(parts):
            (directory / f"tensor{index:05d}_{shard:03d}").write_bytes(pickled(part))
    return meant


def _flatten(tree: dict[str, Any]) -> Iterator[list[object]]:
    """The leaves of a tree of dicts in JAX's order: that of sorted keys, level by level."""
    for key in sorted(tree):
        value = tree[key]
        yield from _flatten(value) if isinstance(value, dict) else [value]


def _parts(tensor: Tensor, axis: int | None, shards: int) -> list[Tensor]:
    whole = [tensor] * shards if axis is None else tensor.chunk(shards, axis)
    return [part.contiguous() for part in whole]


def _quantize(parameter: Tensor, blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    """int8 weights, bfloat16 scales [..., blocks, out], and the numbers that they stand for."""
    *lead, rows, cols = parameter.shape
    grouped = parameter.view(*lead, blocks, rows // blocks, cols)
    scales = (grouped.abs().amax(-2, keepdim=True) / 127).bfloat16()
    weight = (grouped / scales.float()).round().clamp(-127, 127)
    meant = (weight * scales.float()).bfloat16().float()
    return weight.to(torch.int8).view(parameter.shape), scales.squeeze(-2), meant.view(parameter.shape)
