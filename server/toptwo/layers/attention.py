"""Grouped-query attention over the paged KV cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from toptwo.layers.context import StepContext
from toptwo_kernels.ops import AttentionSpec, HeadShape, Ops, Rope


@dataclass(frozen=True)
class Attention:
    """QKV projection (columns: all q heads, all k heads, all v heads), RoPE, attention, output projection."""

    layer: int
    spec: AttentionSpec
    qkv: Callable[[Tensor], Tensor]
    out: Callable[[Tensor], Tensor]
    rope: Rope
    ops: Ops

    def __call__(self, x_TH: Tensor, step: StepContext) -> Tensor:
        kv = step.kv_cache[self.layer]
        return self.out(self.ops.attention(self.qkv(x_TH), self.rope, kv, step.plan, self.spec))


@dataclass(frozen=True)
class NormedQKV:
    """A QKV projection whose queries and keys are normalised before they turn.

    q_weight, k_weight: as wide as a head, and every head is normalised for itself (Qwen3), or as wide as
    all heads together (OLMoE).
    """

    qkv: Callable[[Tensor], Tensor]
    heads: HeadShape
    q_weight: Tensor
    k_weight: Tensor
    eps: float
    ops: Ops

    def __call__(self, x_TH: Tensor) -> Tensor:
        q_columns = self.heads.num_heads * self.heads.head_dim
        k_columns = self.heads.num_kv_heads * self.heads.head_dim
        num_q, num_k = q_columns // len(self.q_weight), k_columns // len(self.k_weight)
        qkv_TX = self.ops.norm_slices(self.qkv(x_TH), self.q_weight, self.eps, 0, num_q)
        return self.ops.norm_slices(qkv_TX, self.k_weight, self.eps, q_columns, num_k)


@dataclass(frozen=True)
class ClippedQKV:
    """A QKV projection whose numbers are cut off at -limit and limit (DBRX, OLMoE)."""

    qkv: Callable[[Tensor], Tensor]
    limit: float
    ops: Ops

    def __call__(self, x_TH: Tensor) -> Tensor:
        return self.ops.clamp(self.qkv(x_TH), self.limit)
