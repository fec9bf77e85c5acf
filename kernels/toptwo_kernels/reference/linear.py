"""Dense products."""

from __future__ import annotations

import torch
from torch import Tensor


def linear(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """See `ops.Ops.linear`."""
    return torch.nn.functional.linear(x_TI, weight_OI)
