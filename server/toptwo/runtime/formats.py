"""Which number format each weight gets, and what that costs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import cast

from toptwo.models.checkpoint import Role, WeightSpec
from toptwo_kernels.ops import WeightFormat

# Bits per weight; a group of 32 has a 2-byte scale and, in int4, a 1-byte zero point, and a block of
# 128 x 128 in fp8 a 4-byte scale.
BITS: dict[WeightFormat, float] = {
    "float32": 32,
    "bfloat16": 16,
    "float16": 16,
    "int8": 8 + 16 / 32,
    "int4": 4 + 24 / 32,
    "fp8": 8 + 32 / 128**2,
}


def format_of(role: Role, quantization: str, dtype: WeightFormat) -> WeightFormat:
    """The format of a weight. Routers and vectors stay exact; a head never has fewer than 8 bits."""
    if role in ("router", "vector"):
        return "float32"
    if quantization == "none":
        return dtype
    if quantization == "int4":
        return "int8" if role == "head" else "int4"
    return cast(WeightFormat, quantization)


def count_bytes(specs: Iterable[WeightSpec], quantization: str, dtype: WeightFormat) -> int:
    """Bytes of all weights in their formats."""
    bits = sum(math.prod(s.shape) * BITS[format_of(s.role, quantization, dtype)] for s in specs)
    return math.ceil(bits / 8)
