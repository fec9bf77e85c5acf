"""Whether this machine can run the CUDA backend. Imports neither Triton nor any kernel."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import torch

OLDEST = (8, 0)
"""Compute capability from which cards have bfloat16 matrix units."""


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
    capability = torch.cuda.get_device_capability(0)
    if capability < OLDEST:
        name = torch.cuda.get_device_name(0)
        return f"{name} has compute capability {capability[0]}.{capability[1]}, and 8.0 is needed"
    return ""
