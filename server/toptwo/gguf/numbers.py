"""The number formats of GGUF: which can be decoded, and the order of rows that llama.cpp gives some weights.

Knows formats and rows, on numpy alone; must not know names or architectures.
"""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Format
from numpy.typing import NDArray

from toptwo.gguf.header import StoredTensor

# What the library decodes, but for NVFP4, whose numbers need a scale from another tensor.
DECODED = frozenset(
    {Format.F32, Format.F16, Format.BF16, Format.MXFP4, Format.TQ1_0, Format.TQ2_0}
    | {Format.Q4_0, Format.Q4_1, Format.Q5_0, Format.Q5_1, Format.Q8_0}
    | {Format.Q2_K, Format.Q3_K, Format.Q4_K, Format.Q5_K, Format.Q6_K}
    | {Format.IQ1_S, Format.IQ1_M, Format.IQ2_XXS, Format.IQ2_XS, Format.IQ2_S}
    | {Format.IQ3_XXS, Format.IQ3_S, Format.IQ4_NL, Format.IQ4_XS}
)


def decode(rows: NDArray[np.uint8], kind: Format) -> NDArray[np.float32]:
    """Stored rows [..., bytes] as numbers [..., elements]; `kind` must be in DECODED."""
    with np.errstate(over="ignore", invalid="ignore"):  # damaged scales are for the caller to find
        values: NDArray[np.float32] = gguf.dequantize(rows, kind)
    return values


def read_numbers(tensor: StoredTensor) -> NDArray[np.float32]:
    """All of a tensor; `tensor.kind` must be in DECODED."""
    rows = np.memmap(tensor.path, np.uint8, "r", tensor.offset, (tensor.size,))
    return decode(rows.reshape(*tensor.shape[:-1], -1), tensor.kind)


def split_halves(weight: Any, num_heads: int) -> Any:
    """Rows of a q or k projection [heads * D, ...], from llama.cpp's order to Hugging Face's; numpy or torch.

    llama.cpp turns neighbouring pairs (0, 1), (2, 3), ...; Hugging Face turns (0, D/2), (1, D/2 + 1), ...
    So each head's even rows come first, then its odd rows.
    """
    shape = weight.shape
    pairs = weight.reshape(num_heads, shape[0] // num_heads // 2, 2, *shape[1:])
    return pairs.swapaxes(1, 2).reshape(shape)
