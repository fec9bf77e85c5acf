"""Attention over the paged KV cache: turn queries and keys, store keys and values, attend split by split.

`attend` is the part that attention over latents has in common: which kernels run, and on tiles of what size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import e, log2
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from toptwo_kernels.cuda.device import Device
from toptwo_kernels.cuda.plan import QUERY_TILE, SPLIT, Plan
from toptwo_kernels.cuda.splits import decode_kernel, join_kernel, prompt_kernel
from toptwo_kernels.ops import AttentionSpec, KVCache, Rope

_LOG2_E = log2(e)
_PROGRAMS_PER_PROCESSOR = 8  # of the decode kernel; memory is kept busy by what several have on its way
_TURNED_HEADS = 8  # of a token, in one program
_NARROW = 128  # widest key whose queries and sums for 128 rows fit the registers of 8 warps
_SMALLEST_DOT = 16


@dataclass(frozen=True)
class Attended:
    """What is attended to.

    key, rest: numbers that a KV head keeps of a token, first and behind; all of them meet a query's.
    value: how many numbers of a token are summed up; with a rest they are the key's own.
    stride: how long a row of queries is; its heads lie one after the other from its start.
    """

    num_heads: int
    num_kv_heads: int
    key: int
    rest: int
    value: int
    stride: int
    scale: float
    window: int | None = None
    soft_cap: float | None = None
    sinks_N: Tensor | None = None

    @property
    def group(self) -> int:
        """Query heads that read one KV head."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True)
class Tile:
    """rows: of queries times heads. keys: of a context. columns: of the values."""

    rows: int
    keys: int
    columns: int
    num_warps: int
    num_stages: int

    @classmethod
    def fitting(cls, form: Attended, element_size: int, *, decoding: bool) -> Tile:
        """What the registers and the shared memory of a processor hold.

        Both kinds of steps have tiles of as many keys, and warps that each have all keys of a query or all
        of them a part: their sums are the same then.
        """
        key, value = _padded(form.key), _padded(form.value)
        narrow = key <= _NARROW
        if element_size == 4:
            return cls(64, 32 if narrow else 16, min(value, 256), 4 if narrow else 8, 1)
        if narrow:
            return cls(64, 64, value, 4, 2) if decoding else cls(128, 64, value, 8, 3)
        return cls(64, 32, value if decoding else min(value, 256), 8, 2)


def attention(
    device: Device, qkv_TX: Tensor, rope: Rope, kv: KVCache, plan: object, spec: AttentionSpec
) -> Tensor:
    """See `ops.Ops.attention`."""
    step, shape = cast(Plan, plan), spec.shape
    num_heads = shape.num_heads + 2 * shape.num_kv_heads
    half = rope.cos_LD.shape[1]
    turn_kernel[(len(qkv_TX), triton.cdiv(num_heads, _TURNED_HEADS))](
        qkv_TX, *kv, rope.cos_LD, rope.sin_LD, step.positions_T, step.slots_T,
        NUM_HEADS=shape.num_heads, NUM_KV_HEADS=shape.num_kv_heads, DIM=shape.head_dim,
        HALF=half, HALF_PAD=triton.next_power_of_2(half), REST_PAD=_power(shape.head_dim - 2 * half),
        HEADS=_TURNED_HEADS, BLOCK_SIZE=step.block_size,
        PDL=device.pdl, num_warps=4, launch_pdl=device.pdl,
    )  # fmt: skip
    form = Attended(
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        key=shape.head_dim,
        rest=0,
        value=shape.head_dim,
        stride=num_heads * shape.head_dim,
        scale=spec.scale,
        window=spec.window,
        soft_cap=spec.soft_cap,
        sinks_N=spec.sinks_N,
    )
    return attend(device, qkv_TX, kv, step, form)


@triton.jit
def turn_kernel(
    x_ptr: tl.tensor, k_ptr: tl.tensor, v_ptr: tl.tensor, cos_ptr: tl.tensor, sin_ptr: tl.tensor,
    positions_ptr: tl.tensor, slots_ptr: tl.tensor,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr,
    HALF_PAD: tl.constexpr, REST_PAD: tl.constexpr, HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:  # fmt: skip
    """Turn q where it lies in x [T, (N + 2M) DIM]; turn k and copy it and v to the cache [B, M, S, DIM].

    Dimension i turns with HALF + i; those from 2 HALF on stay. Grid: tokens, parts of HEADS heads.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    is_q = head < NUM_HEADS
    is_v = head >= NUM_HEADS + NUM_KV_HEADS
    is_head = head < NUM_HEADS + 2 * NUM_KV_HEADS
    slot = tl.load(slots_ptr + token).to(tl.int64)
    is_k, is_v = is_head & ~is_q & ~is_v & (slot >= 0), is_head & is_v & (slot >= 0)
    kv_head = (head - NUM_HEADS) % NUM_KV_HEADS
    place = ((slot // BLOCK_SIZE * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + slot % BLOCK_SIZE)[:, None] * DIM
    x = x_ptr + token * ((NUM_HEADS + 2 * NUM_KV_HEADS) * DIM) + head[:, None] * DIM
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    kept: tl.constexpr = k_ptr.dtype.element_ty

    i = tl.arange(0, HALF_PAD)
    position = tl.load(positions_ptr + token).to(tl.int64)
    cos = tl.load(cos_ptr + position * HALF + i, mask=i < HALF, other=0.0)
    sin = tl.load(sin_ptr + position * HALF + i, mask=i < HALF, other=0.0)
    mask = is_head[:, None] & (i < HALF)
    first, second = tl.load(x + i, mask=mask, other=0.0), tl.load(x + HALF + i, mask=mask, other=0.0)
    a, b = first.to(tl.float32), second.to(tl.float32)
    turned, turned_second = (a * cos - b * sin).to(dtype), (b * cos + a * sin).to(dtype)
    tl.store(x + i, turned, mask=mask & is_q[:, None])
    tl.store(x + HALF + i, turned_second, mask=mask & is_q[:, None])
    tl.store(k_ptr + place + i, turned.to(kept), mask=mask & is_k[:, None])
    tl.store(k_ptr + place + HALF + i, turned_second.to(kept), mask=mask & is_k[:, None])
    tl.store(v_ptr + place + i, first.to(kept), mask=mask & is_v[:, None])
    tl.store(v_ptr + place + HALF + i, second.to(kept), mask=mask & is_v[:, None])
    if DIM > 2 * HALF:
        i = 2 * HALF + tl.arange(0, REST_PAD)
        rest = tl.load(x + i, mask=is_head[:, None] & (i < DIM), other=0.0).to(kept)
        tl.store(k_ptr + place + i, rest, mask=is_k[:, None] & (i < DIM))
        tl.store(v_ptr + place + i, rest, mask=is_v[:, None] & (i < DIM))


def attend(device: Device, q_TX: Tensor, kv: KVCache, plan: Plan, form: Attended) -> Tensor:
    """What every query finds in its row's context, [T, N * value].

    kv: keys and values, or one tensor that is both.
    """
    element_size = max(q_TX.element_size(), kv[0].element_size())
    tile = Tile.fitting(form, element_size, decoding=plan.shape.is_decoding)
    out_TX = torch.empty(len(q_TX), form.num_heads * form.value, dtype=q_TX.dtype, device=device.torch_device)
    run = _attend_rows if plan.shape.is_decoding else _attend_tiles
    run(device, (q_TX, kv[0], kv[-1], out_TX), plan, form, tile)
    return out_TX


def _attend_rows(device: Device, tensors: tuple[Tensor, ...], plan: Plan, form: Attended, tile: Tile) -> None:
    """One query a row: splits of contexts in parallel, joined by a second kernel."""
    q_TX, keys, values, out_TX = tensors
    num_items, heads = plan.shape.items, min(_power(form.group), tile.rows)
    empty = partial(torch.empty, dtype=torch.float32, device=device.torch_device)
    m_IN, total_IN = empty(num_items, form.num_heads), empty(num_items, form.num_heads)
    acc_INV = empty(num_items, form.num_heads, form.value)
    parts = form.num_kv_heads * triton.cdiv(form.group, heads), triton.cdiv(form.value, tile.columns)
    wanted = triton.cdiv(_PROGRAMS_PER_PROCESSOR * device.num_processors, parts[0] * parts[1])
    decode_kernel[(min(wanted, num_items), *parts)](
        q_TX, keys, values, m_IN, total_IN, acc_INV,
        plan.item_rows_I, plan.item_splits_I, plan.item_starts_R1, plan.context_lens_R, plan.block_tables_RB,
        plan.shape.rows, plan.shape.blocks, *_scales(form),
        HEADS=heads, **_constants(device, plan, form, tile),
    )  # fmt: skip
    join_kernel[(plan.shape.rows, form.num_heads)](
        m_IN, total_IN, acc_INV, plan.item_starts_R1, _sinks(form, m_IN), out_TX,
        NUM_HEADS=form.num_heads, VALUE=form.value, VALUE_PAD=_power(form.value), HEADS=1,
        HAS_SINKS=form.sinks_N is not None, PDL=device.pdl, num_warps=1, **_launch(device),
    )  # fmt: skip


def _attend_tiles(
    device: Device, tensors: tuple[Tensor, ...], plan: Plan, form: Attended, tile: Tile
) -> None:
    """Any number of queries a row."""
    q_TX, keys, values, out_TX = tensors
    heads = min(_power(form.group), tile.rows)
    queries = tile.rows // heads
    parts = form.num_kv_heads * triton.cdiv(form.group, heads), triton.cdiv(form.value, tile.columns)
    prompt_kernel[(plan.shape.tiles * triton.cdiv(QUERY_TILE, queries), *parts)](
        q_TX, keys, values, out_TX, _sinks(form, q_TX),
        plan.tile_rows_Y, plan.tile_queries_Y, plan.query_starts_R1, plan.context_lens_R,
        plan.block_tables_RB, plan.shape.blocks, *_scales(form),
        HEADS=heads, QUERIES=queries, QUERY_TILE=QUERY_TILE, HAS_SINKS=form.sinks_N is not None,
        **_constants(device, plan, form, tile),
    )  # fmt: skip


def _constants(device: Device, plan: Plan, form: Attended, tile: Tile) -> dict[str, Any]:
    """What both kernels over contexts are compiled for."""
    return {
        "Q_STRIDE": form.stride,
        "NUM_HEADS": form.num_heads,
        "GROUP": form.group,
        "SPLIT": SPLIT,
        "KEY": form.key,
        "REST": form.rest,
        "VALUE": form.value,
        "KEY_PAD": _padded(form.key),
        "REST_PAD": _padded(form.rest),
        "COLUMNS": tile.columns,
        "ROWS": tile.rows,
        "BLOCK_L": tile.keys,
        "BLOCK_SIZE": plan.block_size,
        "BLOCK_STRIDE": form.num_kv_heads * plan.block_size * (form.key + form.rest),
        "WINDOW": form.window or 0,
        "HAS_CAP": form.soft_cap is not None,
        "PDL": device.pdl,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        **_launch(device),
    }


def _scales(form: Attended) -> tuple[float, float]:
    """The factor on q . k and, with a cap, the one on what comes of it: scores in units of log 2.

    tanh(x) is (1 - e) / (1 + e) with e = exp2(-2 x / ln 2).
    """
    if form.soft_cap is None:
        return form.scale * _LOG2_E, 1.0
    return 2.0 * form.scale / form.soft_cap * _LOG2_E, form.soft_cap * _LOG2_E


def _sinks(form: Attended, instead: Tensor) -> Tensor:
    return instead if form.sinks_N is None else form.sinks_N


def _launch(device: Device) -> dict[str, Any]:
    return {"launch_pdl": device.pdl, "enable_fp_fusion": False}


def _power(number: int) -> int:
    return int(triton.next_power_of_2(max(1, number)))


def _padded(size: int) -> int:
    """As many numbers as tl.dot takes."""
    return max(_SMALLEST_DOT, _power(size))
