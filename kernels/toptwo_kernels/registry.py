"""Backends by name. A backend is made once, when a model is loaded, never chosen per call."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import cast

import torch

from toptwo_kernels.ops import Ops

BACKENDS = ("reference", "cpu")
"""Those that run on any machine's processor."""
GPU_BACKENDS = ("cuda",)


def load_backend(
    name: str, num_threads: int = 1, *, pinned: bool = False, tuning_directory: Path | None = None
) -> Ops:
    """The backend of `toptwo_kernels.<name>` on so many threads; see `cpu.create` for `pinned`, and
    `cuda.backend.create` for `tuning_directory`.

    Raises ValueError for a name that does not exist, or a backend that this machine cannot have.
    """
    known = BACKENDS + GPU_BACKENDS
    if name not in known:
        raise ValueError(f"no kernel backend {name!r}; there is: {', '.join(known)}")
    if name == "cuda":
        backend = importlib.import_module("toptwo_kernels.cuda.backend")  # needs Triton, which others do not
        return cast(Ops, backend.create(tuning_directory))
    module = importlib.import_module(f"toptwo_kernels.{name}")
    if name == "cpu":
        torch.set_num_threads(1)  # a second pool of threads would fight for the same cores
        return cast(Ops, module.create(num_threads, pinned=pinned))
    torch.set_num_threads(num_threads)
    return cast(Ops, module)
