"""Latent attention against its definition, which makes keys and values of every head, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from toptwo.layers.context import StepContext
from toptwo.layers.linear import Linear
from toptwo.layers.mla import LatentAttention, LowRankQuery
from toptwo.layers.norm import RMSNorm
from toptwo.layers.rope import RopeConfig
from toptwo_kernels.ops import LatentShape, LatentSpec, Ops, StepBatch
from toptwo_kernels.registry import BACKENDS, load_backend

HIDDEN, HEADS, NOPE, ROPE, LATENT, VALUE = 40, 3, 24, 8, 16, 32
THETA, EPS, SCALE, BLOCK, NUM_BLOCKS = 1000.0, 1e-6, 0.4, 16, 8

Row = tuple[int, int, int]
"""A sequence, and the first of its tokens that a step computes, and the one behind the last."""
TABLES = [[5, 2, 7], [5, 0, 3]]  # blocks of the sequences, which share their first one


@dataclass(frozen=True)
class Matrices:
    """What a checkpoint holds, at random; without a rank, `query` is one matrix."""

    query: list[Tensor]
    query_norm: Tensor | None
    latent: Tensor
    latent_norm: Tensor
    keys_values: Tensor
    out: Tensor


def random_matrices(generator: torch.Generator, rank: int | None) -> Matrices:
    def normal(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) / columns**0.5

    query_rows = HEADS * (NOPE + ROPE)
    return Matrices(
        query=[normal(rank, HIDDEN), normal(query_rows, rank)] if rank else [normal(query_rows, HIDDEN)],
        query_norm=1 + 0.3 * torch.randn(rank, generator=generator) if rank else None,
        latent=normal(LATENT + ROPE, HIDDEN),
        latent_norm=1 + 0.3 * torch.randn(LATENT, generator=generator),
        keys_values=normal(HEADS * (NOPE + VALUE), LATENT),
        out=normal(HIDDEN, HEADS * VALUE),
    )


def definition(x_LH: Tensor, matrices: Matrices) -> Tensor:
    """Equations 9 to 19 of arXiv 2405.04434, with RMS norms of the compressed vectors (section 3.1.2)."""
    x, length = x_LH.double(), len(x_LH)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight

    def turn(x: Tensor) -> Tensor:
        angle = torch.arange(length)[:, None, None] * THETA ** (-torch.arange(0, ROPE, 2).double() / ROPE)
        turned = torch.complex(x[..., : ROPE // 2], x[..., ROPE // 2 :]) * torch.polar(
            torch.ones_like(angle), angle
        )
        return torch.cat((turned.real, turned.imag), -1)

    q = x @ matrices.query[0].double().T
    if matrices.query_norm is not None:
        q = norm(q, matrices.query_norm) @ matrices.query[1].double().T
    q_nope, q_rope = q.view(length, HEADS, -1).split((NOPE, ROPE), -1)
    latent, k_rope = (x @ matrices.latent.double().T).split((LATENT, ROPE), -1)
    keys_values = norm(latent, matrices.latent_norm) @ matrices.keys_values.double().T
    k_nope, v = keys_values.view(length, HEADS, -1).split((NOPE, VALUE), -1)
    k = torch.cat((k_nope, turn(k_rope[:, None]).expand(-1, HEADS, -1)), -1)
    q = torch.cat((q_nope, turn(q_rope)), -1)
    scores = torch.einsum("qnd,knd->nqk", q, k) * SCALE
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    probabilities = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("nqk,knd->qnd", probabilities, v).flatten(1) @ matrices.out.double().T


def build(matrices: Matrices, ops: Ops) -> LatentAttention:
    linears = [Linear(ops.pack(weight, "float32"), ops) for weight in matrices.query]
    query: Linear | LowRankQuery = linears[0]
    if matrices.query_norm is not None:
        query = LowRankQuery(linears[0], RMSNorm(matrices.query_norm, EPS, ops), linears[1])
    keys_values = matrices.keys_values.view(HEADS, NOPE + VALUE, LATENT)
    return LatentAttention(
        layer=0,
        spec=LatentSpec(LatentShape(HEADS, LATENT, ROPE), SCALE),
        query=query,
        latent=Linear(ops.pack(matrices.latent, "float32"), ops),
        latent_norm=matrices.latent_norm,
        eps=EPS,
        key_up=ops.pack(keys_values[:, :NOPE].transpose(1, 2), "float32"),
        value_up=ops.pack(keys_values[:, NOPE:], "float32"),
        out=Linear(ops.pack(matrices.out, "float32"), ops),
        rope=RopeConfig(THETA).tables(NUM_BLOCKS * BLOCK, ROPE),
        ops=ops,
    )


def step_of(rows: list[Row]) -> StepBatch:
    positions = [torch.arange(start, end) for _, start, end in rows]
    slots = [
        torch.tensor(TABLES[each])[at // BLOCK] * BLOCK + at % BLOCK
        for (each, _, _), at in zip(rows, positions, strict=True)
    ]
    lengths = [end - start for _, start, end in rows]
    return StepBatch(
        ids_T=torch.zeros(sum(lengths), dtype=torch.int64),
        positions_T=torch.cat(positions),
        slots_T=torch.cat(slots),
        query_starts_R1=torch.tensor([0, *lengths]).cumsum(0),
        context_lens_R=torch.tensor([end for _, _, end in rows]),
        block_tables_RB=torch.tensor([TABLES[each] for each, _, _ in rows]),
        block_size=BLOCK,
        selected_S=torch.zeros(0, dtype=torch.int64),
    )


SCHEDULES: dict[str, list[list[Row]]] = {
    "whole": [[(0, 0, 41)]],
    "chunks": [[(0, 0, 1)], [(0, 1, 17)], [(0, 17, 40)], [(0, 40, 41)]],
    "a cached prefix, then batched": [[(0, 0, 20)], [(1, 16, 41), (0, 20, 21)], [(0, 21, 41)]],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rank", [None, 20])
@pytest.mark.parametrize("steps", SCHEDULES.values(), ids=SCHEDULES)
def test_attention_is_that_of_unfolded_keys_and_values(
    backend: str, rank: int | None, steps: list[list[Row]]
) -> None:
    ops, generator = load_backend(backend), torch.Generator()
    seed = generator.seed()  # another one every time
    matrices = random_matrices(generator, rank)
    attention = build(matrices, ops)
    cache = ops.allocate_kv(NUM_BLOCKS, BLOCK, attention.spec.shape, torch.float32)
    assert len(cache) == 1
    assert cache[0].numel() == NUM_BLOCKS * BLOCK * (LATENT + ROPE)  # a token costs no more
    cache[0].fill_(torch.nan)
    shared = torch.randn(BLOCK, HIDDEN, generator=generator)
    inputs = [torch.cat((shared, torch.randn(25, HIDDEN, generator=generator))) for _ in TABLES]
    for rows in steps:
        context = StepContext(ops.plan_step(step_of(rows)), [cache])
        out = attention(torch.cat([inputs[each][start:end] for each, start, end in rows]), context)
        for (each, start, end), got in zip(
            rows, out.split([end - start for _, start, end in rows]), strict=True
        ):
            expected = definition(inputs[each], matrices)[start:end]
            error = float((got - expected).abs().max())
            assert error < 2e-5, f"seed {seed}, tokens {start} to {end} of sequence {each}"
