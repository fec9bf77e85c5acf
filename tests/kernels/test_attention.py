"""Paged attention, RoPE and norms of the reference backend against torch's own functions."""

from __future__ import annotations

import importlib

import pytest
import torch

from toptwo_kernels import reference
from toptwo_kernels.ops import AttentionBatch, rope_tables

BLOCK, HEADS, KV_HEADS, DIM = 4, 6, 2, 8


def paged_case(rows: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(got, expected) attention of rows of (context length, queries) over scattered blocks."""
    generator = torch.Generator().manual_seed(len(rows))
    num_blocks = sum(-(-context // BLOCK) for context, _ in rows)
    shuffled = iter(torch.randperm(num_blocks, generator=generator).tolist())
    widest = max(-(-context // BLOCK) for context, _ in rows)
    k_cache = torch.full((num_blocks, BLOCK, KV_HEADS, DIM), torch.nan)
    v_cache = k_cache.clone()
    tables, queries, expected = torch.zeros(len(rows), widest, dtype=torch.int64), [], []
    for index, (context, count) in enumerate(rows):
        q = torch.randn(count, HEADS, DIM, generator=generator)
        k, v = (torch.randn(context, KV_HEADS, DIM, generator=generator) for _ in range(2))
        table = [next(shuffled) for _ in range(-(-context // BLOCK))]
        tables[index, : len(table)] = torch.tensor(table)
        slots = torch.tensor([table[i // BLOCK] * BLOCK + i % BLOCK for i in range(context)])
        reference.write_kv(k, v, k_cache, v_cache, slots)
        visible = torch.ones(count, context, dtype=torch.bool).tril(context - count)
        kv = (t.repeat_interleave(HEADS // KV_HEADS, 1).transpose(0, 1) for t in (k, v))
        attended = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(0, 1), *kv, attn_mask=visible, scale=0.3
        )
        queries.append(q)
        expected.append(attended.transpose(0, 1))
    starts = torch.tensor([0, *(count for _, count in rows)]).cumsum(0)
    batch = AttentionBatch(starts, torch.tensor([context for context, _ in rows]), tables, BLOCK)
    plan = reference.plan_attention(batch)
    return reference.attention(torch.cat(queries), k_cache, v_cache, plan, 0.3), torch.cat(expected)


@pytest.mark.parametrize(
    "rows",
    [
        [(1, 1)],
        [(9, 9)],
        [(9, 2)],
        [(8, 1), (3, 1), (21, 1)],
        [(8, 1), (17, 17), (3, 1), (21, 5), (5, 5), (30, 5)],
    ],
)
def test_paged_attention(rows: list[tuple[int, int]]) -> None:
    got, expected = paged_case(rows)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_groups_are_cut_to_bound_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    # By its full name: on the package, `attention` is the function.
    module = importlib.import_module("toptwo_kernels.reference.attention")
    monkeypatch.setattr(module, "MAX_GATHERED_TOKENS", 16)
    got, expected = paged_case([(context, 1) for context in (3, 30, 7, 7, 2, 1, 9)])
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
    got, expected = paged_case([(40, 33), (12, 12), (17, 1)])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert 0 < largest <= 700


def test_rope_turns_pairs_by_position() -> None:
    cos, sin = rope_tables(32, DIM, 10_000.0)
    x = torch.randn(3, HEADS, DIM, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([0, 5, 31])
    got = reference.apply_rope(x, positions, cos, sin)
    torch.testing.assert_close(got[0], x[0])  # position 0 is not turned
    pairs = torch.complex(x[..., : DIM // 2], x[..., DIM // 2 :])
    angle = positions[:, None, None] * 10_000.0 ** (-torch.arange(0, DIM, 2) / DIM)
    turned = pairs * torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(got, torch.cat((turned.real, turned.imag), -1), atol=1e-5, rtol=1e-5)


def test_rms_norm() -> None:
    x, weight = torch.randn(4, 16), torch.randn(16)
    expected = torch.nn.functional.rms_norm(x, (16,), weight, 1e-5)
    torch.testing.assert_close(reference.rms_norm(x, weight, 1e-5), expected)
