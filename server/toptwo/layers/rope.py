"""Rotary position embedding."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from toptwo_kernels.ops import Ops, rope_tables


@dataclass(frozen=True)
class RotaryEmbedding:
    """cos/sin tables for every position the model may see, each [max_len, D/2] in float32."""

    cos_LD: Tensor
    sin_LD: Tensor
    ops: Ops

    @classmethod
    def create(cls, max_len: int, head_dim: int, theta: float, ops: Ops) -> RotaryEmbedding:
        """Tables for `max_len` positions of the default (unscaled) rotary embedding."""
        return cls(*rope_tables(max_len, head_dim, theta), ops)

    def __call__(self, x_TND: Tensor, positions_T: Tensor) -> Tensor:
        return self.ops.apply_rope(x_TND, positions_T, self.cos_LD, self.sin_LD)
