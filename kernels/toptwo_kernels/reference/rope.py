"""Rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from toptwo_kernels.ops import Rope


def apply_rope(x_TND: Tensor, positions_T: Tensor, rope: Rope) -> Tensor:
    """Dimension i turns together with dimension i + D/2 (arXiv 2104.09864)."""
    cos = rope.cos_LD[positions_T].unsqueeze(1)
    sin = rope.sin_LD[positions_T].unsqueeze(1)
    first, second = x_TND.float().chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x_TND.dtype)
