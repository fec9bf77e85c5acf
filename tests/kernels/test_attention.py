"""Paged attention with RoPE, and norms, against torch's own functions."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from toptwo_kernels.ops import HeadShape, KVCache, Ops, Rope, StepBatch, rope_tables
from toptwo_kernels.reference.rope import apply_rope
from toptwo_kernels.registry import load_backend

THETA = 10_000.0
SHAPE = HeadShape(num_heads=6, num_kv_heads=2, head_dim=8)
ROPE = rope_tables(128, SHAPE.head_dim, THETA)
NO_ROPE = Rope(torch.ones(128, SHAPE.head_dim // 2), torch.zeros(128, SHAPE.head_dim // 2))

Rows = list[tuple[int, int]]
"""(context length, queries) of each row of a step; the queries are the context's last tokens."""


def turn(x_TND: Tensor, positions_T: Tensor) -> Tensor:
    """RoPE by its definition: dimensions i and i + D/2 are a complex number, turned by position * theta_i."""
    dim = x_TND.shape[-1]
    pairs = torch.complex(x_TND[..., : dim // 2], x_TND[..., dim // 2 :])
    angle = positions_T[:, None, None] * THETA ** (-torch.arange(0, dim, 2) / dim)
    turned = pairs * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag), -1)


def step_of(parts: list[tuple[int, int]], tables: list[list[int]], block_size: int) -> StepBatch:
    """The step of the tokens [start, end) of every row; a row with none is left out."""
    chosen = [(part, table) for part, table in zip(parts, tables, strict=True) if part[0] < part[1]]
    positions = [torch.arange(start, end) for (start, end), _ in chosen]
    slots = [
        torch.tensor(table)[at // block_size] * block_size + at % block_size
        for at, (_, table) in zip(positions, chosen, strict=True)
    ]
    tables_RB = torch.zeros(len(chosen), max(len(table) for _, table in chosen), dtype=torch.int64)
    for row, (_, table) in zip(tables_RB, chosen, strict=True):
        row[: len(table)] = torch.tensor(table)
    return StepBatch(
        ids_T=torch.zeros(sum(len(at) for at in positions), dtype=torch.int64),
        positions_T=torch.cat(positions),
        slots_T=torch.cat(slots),
        query_starts_R1=torch.tensor([0, *(len(at) for at in positions)]).cumsum(0),
        context_lens_R=torch.tensor([end for (_, end), _ in chosen]),
        block_tables_RB=tables_RB,
        block_size=block_size,
        selected_S=torch.zeros(0, dtype=torch.int64),
    )


def attend(ops: Ops, qkvs: list[Tensor], rows: Rows, kv: KVCache, block_size: int, rope: Rope) -> Tensor:
    """Attention of the rows' last tokens, after a step of its own for what comes before them.

    qkvs: of all tokens of each row's context, [L, (N + 2M), D]; blocks are scattered over the cache.
    """
    shape = HeadShape(qkvs[0].shape[1] - 2 * SHAPE.num_kv_heads, SHAPE.num_kv_heads, qkvs[0].shape[2])
    generator = torch.Generator().manual_seed(len(rows))
    shuffled = iter(torch.randperm(len(kv[0]), generator=generator).tolist())
    tables = [[next(shuffled) for _ in range(-(-context // block_size))] for context, _ in rows]
    out = torch.empty(0)
    for parts in (
        [(0, context - count) for context, count in rows],
        [(context - count, context) for context, count in rows],
    ):
        if any(start < end for start, end in parts):
            qkv = torch.cat([qkv[slice(*part)] for qkv, part in zip(qkvs, parts, strict=True)]).flatten(1)
            plan = ops.plan_step(step_of(parts, tables, block_size))
            out = ops.attention(qkv, rope, kv, plan, shape, 0.3)
    return out.unflatten(1, (shape.num_heads, shape.head_dim))


def paged_case(
    ops: Ops, rows: Rows, block_size: int = 16, shape: HeadShape = SHAPE, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """(got, expected) attention of the rows over scattered blocks of a cache that is full of NaN."""
    generator = torch.Generator().manual_seed(len(rows))
    num_blocks = sum(-(-context // block_size) for context, _ in rows)
    kv = ops.allocate_kv(num_blocks, block_size, shape, dtype)
    for cache in kv:
        cache.fill_(torch.nan)
    counts = [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads]
    qkvs = [torch.randn(context, sum(counts), shape.head_dim, generator=generator) for context, _ in rows]
    expected = []
    for qkv, (context, count) in zip(qkvs, rows, strict=True):
        q, k, v = qkv.split(counts, dim=1)
        positions = torch.arange(context)
        q, k, v = turn(q, positions)[-count:], turn(k, positions).to(dtype).float(), v.to(dtype).float()
        visible = torch.ones(count, context, dtype=torch.bool).tril(context - count)
        shared = (t.repeat_interleave(shape.num_heads // shape.num_kv_heads, 1) for t in (k, v))
        attended = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(0, 1), *(t.transpose(0, 1) for t in shared), attn_mask=visible, scale=0.3
        )
        expected.append(attended.transpose(0, 1))
    rope = rope_tables(max(context for context, _ in rows), shape.head_dim, THETA)
    return attend(ops, qkvs, rows, kv, block_size, rope), torch.cat(expected)


MANY_ROWS: list[Rows] = [
    [(1, 1)],
    [(9, 9)],
    [(9, 2)],
    [(8, 1), (3, 1), (21, 1)],
    [(8, 1), (17, 17), (3, 1), (21, 5), (5, 5), (30, 5)],
    [(16, 1), (32, 16), (33, 1), (70, 37), (48, 48)],
]


@pytest.mark.parametrize("rows", MANY_ROWS)
def test_paged_attention(ops: Ops, rows: Rows) -> None:
    got, expected = paged_case(ops, rows)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", MANY_ROWS)
def test_the_reference_has_blocks_of_any_size(rows: Rows) -> None:
    got, expected = paged_case(load_backend("reference"), rows, block_size=4)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("num_heads", "head_dim"), [(2, 8), (2, 40), (8, 64), (14, 96), (4, 128)])
def test_heads_of_many_shapes(ops: Ops, num_heads: int, head_dim: int) -> None:
    got, expected = paged_case(ops, [(40, 23), (17, 1)], shape=HeadShape(num_heads, 2, head_dim))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cache_in_half_precision_rounds_keys_and_values_only(ops: Ops, dtype: torch.dtype) -> None:
    got, expected = paged_case(ops, [(40, 23), (17, 1)], dtype=dtype)
    # A key that lies between two numbers may be rounded either way.
    torch.testing.assert_close(got, expected, atol=1e-2 if dtype == torch.bfloat16 else 1e-3, rtol=0)


def test_groups_are_cut_to_bound_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    # By its full name: on the package, `attention` is the function.
    module = importlib.import_module("toptwo_kernels.reference.attention")
    monkeypatch.setattr(module, "MAX_GATHERED_TOKENS", 16)
    rows = [(context, 1) for context in (3, 30, 7, 7, 2, 1, 9)]
    got, expected = paged_case(load_backend("reference"), rows)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_queries_are_cut_to_bound_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("toptwo_kernels.reference.attention")
    monkeypatch.setattr(module, "MAX_SCORES", 700)
    largest = 0
    softmax = torch.Tensor.softmax

    def watch(scores: torch.Tensor, dim: int) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, scores.numel())
        return softmax(scores, dim)

    monkeypatch.setattr(torch.Tensor, "softmax", watch)
    got, expected = paged_case(load_backend("reference"), [(40, 33), (12, 12), (17, 1)])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert 0 < largest <= 700


def test_rope_turns_pairs_by_position() -> None:
    x = torch.randn(3, SHAPE.num_heads, SHAPE.head_dim, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([0, 5, 31])
    got = apply_rope(x, positions, ROPE)
    torch.testing.assert_close(got[0], x[0])  # position 0 is not turned
    torch.testing.assert_close(got, turn(x, positions), atol=1e-5, rtol=1e-5)


def test_attention_turns_queries_and_keys_by_position(ops: Ops) -> None:
    """With tables that turn nothing, the same comes of queries and keys that were turned before."""
    counts = [SHAPE.num_heads, SHAPE.num_kv_heads, SHAPE.num_kv_heads]
    rows = [(40, 23), (17, 1)]
    generator = torch.Generator().manual_seed(0)
    qkvs = [torch.randn(context, sum(counts), SHAPE.head_dim, generator=generator) for context, _ in rows]
    turned = []
    for qkv in qkvs:
        q, k, v = qkv.split(counts, dim=1)
        positions = torch.arange(len(qkv))
        turned.append(torch.cat((turn(q, positions), turn(k, positions), v), 1))
    kv = ops.allocate_kv(5, 16, SHAPE, torch.float32)
    expected = attend(ops, turned, rows, kv, 16, NO_ROPE)
    untouched = attend(ops, qkvs, rows, kv, 16, NO_ROPE)
    assert (untouched - expected).abs().max() > 0.01
    torch.testing.assert_close(attend(ops, qkvs, rows, kv, 16, ROPE), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [16, 20, 61])
def test_rms_norm(ops: Ops, size: int) -> None:
    x, weight = torch.randn(4, size), torch.randn(size)
    expected = torch.nn.functional.rms_norm(x, (size,), weight, 1e-5)
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-5), expected)


@pytest.mark.parametrize("size", [16, 20, 61])
def test_layer_norm(ops: Ops, size: int) -> None:
    x, weight = torch.randn(4, size) + 3, torch.randn(size)
    expected = torch.nn.functional.layer_norm(x, (size,), weight, eps=1e-5)
    torch.testing.assert_close(ops.layer_norm(x, weight, 1e-5), expected, atol=1e-5, rtol=1e-5)
