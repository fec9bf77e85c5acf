"""Grouped-query attention over the paged KV cache."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from toptwo.layers.context import StepContext
from toptwo.layers.linear import Linear
from toptwo_kernels.ops import HeadShape, Ops, Rope


@dataclass(frozen=True)
class Attention:
    """QKV projection (rows: all q heads, all k heads, all v heads), RoPE, attention, output projection."""

    layer: int
    shape: HeadShape
    qkv: Linear
    out: Linear
    rope: Rope
    ops: Ops

    def __call__(self, x_TH: Tensor, step: StepContext) -> Tensor:
        scale = self.shape.head_dim**-0.5
        kv = step.kv_cache[self.layer]
        attended = self.ops.attention(self.qkv(x_TH), self.rope, kv, step.plan, self.shape, scale)
        return self.out(attended)
