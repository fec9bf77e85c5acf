"""Grouped-query attention over the paged KV cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from toptwo.layers.context import StepContext
from toptwo.layers.linear import Linear
from toptwo.layers.rope import RotaryEmbedding
from toptwo_kernels.ops import Ops


@dataclass(frozen=True)
class HeadShape:
    """Query heads N, KV heads M, and the dimension D of each."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Attention:
    """QKV projection (rows: all q heads, all k heads, all v heads), RoPE, attention, output projection."""

    layer: int
    shape: HeadShape
    qkv: Linear
    out: Linear
    rope: RotaryEmbedding
    ops: Ops

    def __call__(self, x_TH: Tensor, step: StepContext) -> Tensor:
        heads = self.shape
        qkv = self.qkv(x_TH).view(len(x_TH), -1, heads.head_dim)
        counts = [heads.num_heads, heads.num_kv_heads, heads.num_kv_heads]
        q_TND, k_TMD, v_TMD = torch.split(qkv, counts, dim=1)
        q_TND = self.rope(q_TND, step.positions_T)
        k_TMD = self.rope(k_TMD, step.positions_T)

        k_cache, v_cache = step.kv_cache[self.layer]
        self.ops.write_kv(k_TMD, v_TMD, k_cache, v_cache, step.slots_T)
        scale = heads.head_dim**-0.5
        attended = self.ops.attention(q_TND, k_cache, v_cache, step.attention_plan, scale)
        return self.out(attended.flatten(1))
