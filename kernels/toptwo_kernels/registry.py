"""Backends by name. A backend is chosen once, when a model is loaded, never per call."""

from __future__ import annotations

import importlib
from typing import cast

from toptwo_kernels.ops import Ops

BACKENDS = ("reference",)


def load_backend(name: str) -> Ops:
    """The backend module `toptwo_kernels.<name>`. Raises ValueError for a name that does not exist."""
    if name not in BACKENDS:
        raise ValueError(f"no kernel backend {name!r}; there is: {', '.join(BACKENDS)}")
    return cast(Ops, importlib.import_module(f"toptwo_kernels.{name}"))
