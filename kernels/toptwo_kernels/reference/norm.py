"""Normalisation."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """See `ops.Ops.rms_norm`. The product with the weight is taken in x's dtype, as Llama does."""
    x = x_TH.float()
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return weight_H.to(x_TH.dtype) * (x * scale).to(x_TH.dtype)


def layer_norm(x_TH: Tensor, weight_H: Tensor, eps: float, bias_H: Tensor | None = None) -> Tensor:
    """See `ops.Ops.layer_norm`."""
    bias = None if bias_H is None else bias_H.float()
    x = torch.nn.functional.layer_norm(x_TH.float(), x_TH.shape[-1:], weight_H.float(), bias, eps)
    return x.to(x_TH.dtype)


def norm_slices(x_TX: Tensor, weight_W: Tensor, eps: float, first: int, count: int) -> Tensor:
    """See `ops.Ops.norm_slices`."""
    width = len(weight_W)
    behind_columns = x_TX.shape[1] - first - count * width
    before, slices, behind = torch.split(x_TX, [first, count * width, behind_columns], dim=1)
    normed = rms_norm(slices.reshape(-1, width), weight_W, eps).view_as(slices)
    return torch.cat((before, normed, behind), dim=1)
