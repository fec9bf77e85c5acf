"""Normalisation, and the sum that follows it in every residual stream."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """See `ops.Ops.rms_norm`. The product with the weight is taken in x's dtype, as Llama does."""
    x = x_TH.float()
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return weight_H.to(x_TH.dtype) * (x * scale).to(x_TH.dtype)


def layer_norm(x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """See `ops.Ops.layer_norm`."""
    x = torch.nn.functional.layer_norm(x_TH.float(), x_TH.shape[-1:], weight_H.float(), eps=eps)
    return x.to(x_TH.dtype)


def add(x_TH: Tensor, y_TH: Tensor) -> Tensor:
    """See `ops.Ops.add`."""
    return x_TH + y_TH
