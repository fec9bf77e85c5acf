"""Whether this machine can run the CUDA backend. Imports neither Triton nor any kernel."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import torch

OLDEST = (8, 0)
"""Compute capability from which cards have bfloat16 matrix units."""
LEAST_SHARED_BYTES = 160 << 10
"""What attention's tiles need; cards for games have less."""


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, in main memory; False until Triton is loaded."""
    triton: Any = sys.modules.get("triton")
    return triton is not None and bool(triton.knobs.runtime.interpret)


def problem() -> str:
    """Why not, in a phrase; "" if it can."""
    if is_interpreted():
        return ""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install 'toptwo[cuda]')"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device here"
    card = torch.cuda.get_device_properties(0)
    if (card.major, card.minor) < OLDEST:
        return f"{card.name} has compute capability {card.major}.{card.minor}, and 8.0 is needed"
    if (shared := shared_bytes(card)) < LEAST_SHARED_BYTES:
        return f"{card.name} lets a program share {shared >> 10} KiB of memory, and 160 are needed"
    return ""


def shared_bytes(card: Any) -> int:
    """Memory that a program may share among its threads. Some builds of torch do not tell."""
    told: int | None = getattr(card, "shared_memory_per_block_optin", None)
    return told or (227 << 10 if card.major >= 9 else 163 << 10)
