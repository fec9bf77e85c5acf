"""Normalisation."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """See `ops.Ops.rms_norm`. The product with the weight is taken in x's dtype, as Llama does."""
    x = x_TH.float()
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return weight_H * (x * scale).to(x_TH.dtype)
