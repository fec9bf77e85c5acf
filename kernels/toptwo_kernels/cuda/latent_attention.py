"""Attention over latent vectors: one KV head for all query heads, whose values are part of its keys."""

from __future__ import annotations

from typing import cast

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from toptwo_kernels.cuda.attention import Attended, attend
from toptwo_kernels.cuda.device import Device
from toptwo_kernels.cuda.plan import Plan
from toptwo_kernels.ops import KVCache, LatentSpec, Rope

_TURNED_HEADS = 16  # of a token, in one program


def latent_attention(
    device: Device, q_TX: Tensor, kv_TX: Tensor, rope: Rope, kv: KVCache, plan: object, spec: LatentSpec
) -> Tensor:
    """See `ops.Ops.latent_attention`."""
    step, shape = cast(Plan, plan), spec.shape
    half = rope.cos_LD.shape[1]
    # One program more than the heads need, for the latent vector.
    turn_latent_kernel[(len(q_TX), triton.cdiv(shape.num_heads, _TURNED_HEADS) + 1)](
        q_TX, kv_TX, kv[0], rope.cos_LD, rope.sin_LD, step.positions_T, step.slots_T,
        NUM_HEADS=shape.num_heads, LATENT=shape.latent_dim, WIDTH=shape.kv_size,
        HALF=half, HALF_PAD=triton.next_power_of_2(half), WIDTH_PAD=triton.next_power_of_2(shape.kv_size),
        HEADS=_TURNED_HEADS, PDL=device.pdl, num_warps=4, launch_pdl=device.pdl,
    )  # fmt: skip
    form = Attended(
        num_heads=shape.num_heads,
        num_kv_heads=1,
        key=shape.latent_dim,
        rest=shape.rope_dim,
        value=shape.latent_dim,
        stride=shape.num_heads * shape.kv_size,
        scale=spec.scale,
    )
    return attend(device, q_TX, kv, step, form)


@triton.jit
def turn_latent_kernel(
    q_ptr: tl.tensor, x_ptr: tl.tensor, kv_ptr: tl.tensor, cos_ptr: tl.tensor, sin_ptr: tl.tensor,
    positions_ptr: tl.tensor, slots_ptr: tl.tensor,
    NUM_HEADS: tl.constexpr, LATENT: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr,
    HALF_PAD: tl.constexpr, WIDTH_PAD: tl.constexpr, HEADS: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """Turn the heads of q [T, N WIDTH] where they lie, and what x [T, WIDTH] has on its way to the cache.

    Dimension LATENT + i turns with LATENT + HALF + i. Grid: tokens, parts of HEADS heads and one for x.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + token).to(tl.int64)
    i = tl.arange(0, HALF_PAD)
    cos = tl.load(cos_ptr + position * HALF + i, mask=i < HALF, other=0.0)
    sin = tl.load(sin_ptr + position * HALF + i, mask=i < HALF, other=0.0)
    if tl.program_id(1) < tl.num_programs(1) - 1:
        head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
        q = q_ptr + (token * NUM_HEADS + head[:, None]) * WIDTH + LATENT + i
        mask = (head < NUM_HEADS)[:, None] & (i < HALF)
        a = tl.load(q, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(q + HALF, mask=mask, other=0.0).to(tl.float32)
        tl.store(q, (a * cos - b * sin).to(q_ptr.dtype.element_ty), mask=mask)
        tl.store(q + HALF, (b * cos + a * sin).to(q_ptr.dtype.element_ty), mask=mask)
        return
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if slot < 0:
        return
    x, kept = x_ptr + token * WIDTH, kv_ptr + slot * WIDTH
    at = tl.arange(0, WIDTH_PAD)
    stays = (at < LATENT) | ((at >= LATENT + 2 * HALF) & (at < WIDTH))
    tl.store(kept + at, tl.load(x + at, mask=stays, other=0.0).to(kv_ptr.dtype.element_ty), mask=stays)
    a = tl.load(x + LATENT + i, mask=i < HALF, other=0.0).to(tl.float32)
    b = tl.load(x + LATENT + HALF + i, mask=i < HALF, other=0.0).to(tl.float32)
    turned = (a * cos - b * sin).to(x_ptr.dtype.element_ty)
    tl.store(kept + LATENT + i, turned.to(kv_ptr.dtype.element_ty), mask=i < HALF)
    turned = (b * cos + a * sin).to(x_ptr.dtype.element_ty)
    tl.store(kept + LATENT + HALF + i, turned.to(kv_ptr.dtype.element_ty), mask=i < HALF)
