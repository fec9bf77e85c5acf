"""Fused RoPE, KV write and attention over the paged cache."""

from __future__ import annotations

from torch import Tensor

from toptwo_kernels.cpu.native import DTYPES
from toptwo_kernels.cpu.tape import StepArrays, Tape
from toptwo_kernels.ops import AttentionSpec, KVCache, Rope, StepBatch


def plan_step(tape: Tape, batch: StepBatch) -> object:
    """See `ops.Ops.plan_step`."""
    return StepArrays(batch)


def attention(
    tape: Tape, qkv_TX: Tensor, rope: Rope, kv: KVCache, plan: object, spec: AttentionSpec
) -> Tensor:
    """See `ops.Ops.attention`."""
    shape = spec.shape
    if shape.head_dim % 8:
        raise ValueError(f"the CPU backend needs a head dimension that 8 divides, not {shape.head_dim}")
    out = tape.empty(qkv_TX, shape.num_heads * shape.head_dim)
    k, v = kv
    angles = rope.cos_LD, rope.sin_LD, rope.cos_LD.shape[1]
    heads = shape.num_heads, shape.num_kv_heads, shape.head_dim
    rule = spec.scale, spec.window or 0, spec.soft_cap or 0.0, spec.sinks_N
    tape.emit("attention", qkv_TX, *angles, k, v, DTYPES[k.dtype], *heads, *rule, out, step=plan)
    return out
