"""Rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from toptwo_kernels.ops import Rope


def apply_rope(x_TND: Tensor, positions_T: Tensor, rope: Rope) -> Tensor:
    """Of the first 2 D' dimensions, which the tables are for, i turns together with i + D'."""
    cos = rope.cos_LD[positions_T].unsqueeze(1)
    sin = rope.sin_LD[positions_T].unsqueeze(1)
    half = cos.shape[-1]
    rest_dims = x_TND.shape[-1] - 2 * half
    first, second, rest = torch.split(x_TND.float(), [half, half, rest_dims], dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
    return turned.to(x_TND.dtype)
