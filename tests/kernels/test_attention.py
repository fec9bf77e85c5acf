"""Paged attention with RoPE against the definition, written out in float64."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from native import rope_tables
from toptwo_kernels.ops import AttentionSpec, HeadShape, KVCache, Ops, Rope, StepBatch
from toptwo_kernels.reference.rope import apply_rope
from toptwo_kernels.registry import load_backend

THETA = 10_000.0
SHAPE = HeadShape(num_heads=6, num_kv_heads=2, head_dim=8)
SPEC = AttentionSpec(SHAPE, 0.3)
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


def attend(
    ops: Ops,
    spec: AttentionSpec,
    qkvs: list[Tensor],
    rows: Rows,
    kv: KVCache,
    rope: Rope,
    block_size: int = 16,
) -> Tensor:
    """Attention of the rows' last tokens, after a step of its own for what comes before them.

    qkvs: of all tokens of each row's context, [L, (N + 2M), D]; blocks are scattered over the cache.
    """
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
            out = ops.attention(qkv, rope, kv, plan, spec)
    return out.unflatten(1, (spec.shape.num_heads, spec.shape.head_dim))


def define(q_QND: Tensor, k_LMD: Tensor, v_LMD: Tensor, spec: AttentionSpec) -> Tensor:
    """What the last Q tokens of a context get, one query and one head at a time, in float64."""
    num_queries, num_heads, _ = q_QND.shape
    context, num_kv_heads, _ = k_LMD.shape
    out = torch.empty(num_queries, num_heads, v_LMD.shape[2], dtype=torch.float64)
    for query in range(num_queries):
        end = context - num_queries + query + 1
        start = 0 if spec.window is None else max(0, end - spec.window)
        for head in range(num_heads):
            kv_head = head * num_kv_heads // num_heads
            scores = k_LMD[start:end, kv_head].double() @ q_QND[query, head].double() * spec.scale
            if spec.soft_cap is not None:
                scores = spec.soft_cap * (scores / spec.soft_cap).tanh()
            weights = (scores - scores.max()).exp()
            total = weights.sum()
            if spec.sinks_N is not None:
                total += (spec.sinks_N[head].double() - scores.max()).exp()
            out[query, head] = weights / total @ v_LMD[start:end, kv_head].double()
    return out


def paged_case(
    ops: Ops,
    rows: Rows,
    spec: AttentionSpec = SPEC,
    dtype: torch.dtype = torch.float32,
    *,
    block_size: int = 16,
    turned: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(got, expected) attention of the rows over scattered blocks of a cache that is full of NaN.

    turned: how many dimensions of a head turn; all by default.
    """
    shape, turned = spec.shape, turned or spec.shape.head_dim
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
        q, k = (
            torch.cat((turn(t[..., :turned], torch.arange(context)), t[..., turned:]), -1) for t in (q, k)
        )
        expected.append(define(q[-count:], k.to(dtype), v.to(dtype), spec))
    rope = rope_tables(max(context for context, _ in rows), turned, THETA)
    return attend(ops, spec, qkvs, rows, kv, rope, block_size).double(), torch.cat(expected)


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
    got, expected = paged_case(
        ops, [(40, 23), (17, 1)], AttentionSpec(HeadShape(num_heads, 2, head_dim), 0.3)
    )
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


SINKS = torch.tensor([0.5, -3.0, 4.0, 0.0, -torch.inf, 1.5])
WINDOWS = [1, 2, 15, 16, 17, 31, 32, 33, 70, 1000]


@pytest.mark.parametrize("rows", MANY_ROWS)
@pytest.mark.parametrize("window", WINDOWS)
def test_a_window_ends_what_a_token_sees(ops: Ops, rows: Rows, window: int) -> None:
    got, expected = paged_case(ops, rows, replace(SPEC, window=window))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", MANY_ROWS)
@pytest.mark.parametrize("soft_cap", [0.1, 2.0, 50.0])
def test_a_soft_cap_bounds_scores(ops: Ops, rows: Rows, soft_cap: float) -> None:
    got, expected = paged_case(ops, rows, replace(SPEC, scale=2.0, soft_cap=soft_cap))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", MANY_ROWS)
def test_sinks_take_their_part_of_the_softmax(ops: Ops, rows: Rows) -> None:
    got, expected = paged_case(ops, rows, replace(SPEC, sinks_N=SINKS))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", WINDOWS)
def test_window_soft_cap_and_sinks_together(ops: Ops, window: int) -> None:
    spec = AttentionSpec(SHAPE, 1.0, window, soft_cap=1.5, sinks_N=SINKS)
    got, expected = paged_case(ops, [(70, 37), (33, 1), (48, 48)], spec)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sink", [-1e4, 1e4])
def test_a_sink_of_any_size_keeps_numbers_finite(ops: Ops, sink: float) -> None:
    """One that outweighs everything leaves nothing; one that weighs nothing changes nothing."""
    plain, _ = paged_case(ops, [(40, 23)])
    got, _ = paged_case(ops, [(40, 23)], replace(SPEC, sinks_N=torch.full((6,), sink)))
    torch.testing.assert_close(got, torch.zeros_like(plain) if sink > 0 else plain)


@pytest.mark.parametrize(("head_dim", "turned"), [(16, 8), (64, 16), (40, 20), (24, 2), (32, 32)])
def test_the_first_dimensions_turn_alone(ops: Ops, head_dim: int, turned: int) -> None:
    spec = AttentionSpec(HeadShape(4, 2, head_dim), 0.3)
    got, expected = paged_case(ops, [(40, 23), (17, 1)], spec, turned=turned)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cache_in_half_precision_rounds_keys_and_values_only(ops: Ops, dtype: torch.dtype) -> None:
    got, expected = paged_case(ops, [(40, 23), (17, 1)], dtype=dtype)
    # A key that lies between two numbers may be rounded either way.
    torch.testing.assert_close(got, expected, atol=1e-2 if dtype == torch.bfloat16 else 1e-3, rtol=0)


def test_groups_are_cut_to_bound_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toptwo_kernels.reference.plan.MAX_GATHERED_TOKENS", 16)
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
    expected = attend(ops, SPEC, turned, rows, kv, NO_ROPE)
    untouched = attend(ops, SPEC, qkvs, rows, kv, NO_ROPE)
    assert (untouched - expected).abs().max() > 0.01
    got = attend(ops, SPEC, qkvs, rows, kv, ROPE)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
