"""Operations on single numbers of the residual stream, projections and logits."""

from __future__ import annotations

from torch import Tensor


def add(x_TH: Tensor, y_TH: Tensor) -> Tensor:
    """See `ops.Ops.add`."""
    return x_TH + y_TH


def scale(x_TH: Tensor, factor: float) -> Tensor:
    """See `ops.Ops.scale`."""
    return x_TH * factor


def clamp(x_TH: Tensor, limit: float) -> Tensor:
    """See `ops.Ops.clamp`."""
    return x_TH.clamp(-limit, limit)
