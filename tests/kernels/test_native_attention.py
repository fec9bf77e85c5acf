"""Attention of the native backend against the reference, over a cache of NaN wherever nothing was written."""

from __future__ import annotations

import pytest
import torch

from native import BLOCK, INSTRUCTION_SETS, PagedAttention, backend, chunked, normal
from toptwo_kernels import reference
from toptwo_kernels.ops import HeadShape, StepBatch, rope_tables

every_instruction_set = pytest.mark.parametrize("isa", INSTRUCTION_SETS)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# A key that lies between two halves may be rounded either way, by the last bit of its turning.
LARGEST = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
MEAN = {torch.float32: 1e-6, torch.float16: 1e-5, torch.bfloat16: 4e-5}

# Rows of (sequence, tokens) of steps over sequences of 40, 21 and 70 tokens: prompts, chunks, decoding, all.
Steps = list[list[tuple[int, int]]]
LENGTHS = [40, 21, 70]
STEPS = [
    [(0, 17)],
    [(2, 33), (0, 1), (1, 20)],
    [(1, 1), (0, 1), (2, 1)],
    [(0, 20), (2, 16)],
    [(2, 20), (0, 1)],
]


def both(isa: str, shape: HeadShape, dtype: torch.dtype, steps: Steps, lengths: list[int] = LENGTHS) -> None:
    """Run the steps on both backends; compare every output and what was written to the cache."""
    rope = rope_tables(max(lengths), shape.head_dim, 10_000.0)
    got, expected = (
        PagedAttention(ops, shape, lengths, rope, dtype=dtype, sharpness=3.0)
        for ops in (backend(isa), reference)
    )
    for step in steps:
        got.step(step)
        expected.step(step)
    for index in range(len(lengths)):
        error = (got.result(index) - expected.result(index)).abs()
        largest = float(expected.result(index).abs().max())
        assert error.max() <= LARGEST[dtype] * largest
        assert error.mean() <= MEAN[dtype] * largest
    for mine, truth in zip(got.kv, expected.kv, strict=True):
        # Keys and values in their slots, and not a number beside them.
        assert torch.equal(mine.isnan().sum(), truth.isnan().sum())
    values = got.kv[1].transpose(1, 2)
    assert torch.equal(values.nan_to_num(9), expected.kv[1].nan_to_num(9))
    keys = got.kv[0].permute(0, 3, 1, 2).float()
    torch.testing.assert_close(keys, expected.kv[0].float(), rtol=2**-7, atol=1e-5, equal_nan=True)


@every_instruction_set
@pytest.mark.parametrize("head_dim", [8, 16, 64, 128])
@pytest.mark.parametrize("per_kv_head", [1, 2, 3, 4, 8])
def test_groups_of_heads(isa: str, head_dim: int, per_kv_head: int) -> None:
    for dtype in DTYPES:
        both(isa, HeadShape(2 * per_kv_head, 2, head_dim), dtype, STEPS)


@every_instruction_set
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "heads", [HeadShape(1, 1, 24), HeadShape(3, 3, 40), HeadShape(5, 1, 32), HeadShape(8, 2, 72)]
)
def test_other_shapes(isa: str, dtype: torch.dtype, heads: HeadShape) -> None:
    both(isa, heads, dtype, STEPS)


@every_instruction_set
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33])
def test_contexts_at_the_edges_of_blocks(isa: str, length: int) -> None:
    for steps in ([[(0, length)]], [[(0, 1)]] * length, [[(0, length - 1)] * (length > 1), [(0, 1)]]):
        both(isa, HeadShape(4, 2, 16), torch.float32, [step for step in steps if step], lengths=[length])


@every_instruction_set
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_contexts(isa: str, dtype: torch.dtype) -> None:
    steps = [[(0, 700), (1, 30)], [(0, 500), (1, 1)], [(0, 1), (1, 1)], [(0, 99)]]
    both(isa, HeadShape(4, 2, 16), dtype, steps, lengths=[1300, 32])


@every_instruction_set
def test_one_token_that_outweighs_all_others(isa: str) -> None:
    """Scores far apart, in either order: the running maximum must neither overflow nor forget."""
    shape, length = HeadShape(1, 1, 8), 200
    for strongest in (0, 15, 16, 100, 199):
        paged = PagedAttention(backend(isa), shape, [length], rope_tables(length, 8, 1e4))
        qkv = paged.sequences[0].qkv_LX
        qkv[:] = normal(length, 24) / 10
        # The rotation keeps lengths, not products: a key near a query's own position stays beside it.
        paged.rope.cos_LD.fill_(1)
        paged.rope.sin_LD.fill_(0)
        qkv[:, :8] = 1.0
        qkv[strongest, 8:16] = 400.0
        out = chunked(paged, length)
        assert out.isfinite().all()
        torch.testing.assert_close(out[strongest:], qkv[strongest, 16:].expand(length - strongest, -1))


def test_a_head_dimension_that_vectors_do_not_divide_is_refused() -> None:
    shape = HeadShape(1, 1, 12)
    with pytest.raises(ValueError, match="head dimension that 8 divides, not 12"):
        PagedAttention(backend("scalar"), shape, [4], rope_tables(4, 12, 1e4)).step([(0, 4)])
    with pytest.raises(ValueError, match=f"blocks of {BLOCK} tokens, not 32"):
        backend("scalar").allocate_kv(4, 32, shape, torch.float32)


@every_instruction_set
def test_embed_and_select(isa: str) -> None:
    ops = backend(isa)
    plan = ops.plan_step(
        StepBatch(
            ids_T=torch.tensor([3, 0, 36, 3]),
            positions_T=torch.arange(4),
            slots_T=torch.arange(4),
            query_starts_R1=torch.tensor([0, 4]),
            context_lens_R=torch.tensor([4]),
            block_tables_RB=torch.zeros(1, 1, dtype=torch.int64),
            block_size=BLOCK,
            selected_S=torch.tensor([3, 1]),
        )
    )
    weight = normal(37, 50)
    for weight_format in ("float32", "bfloat16", "float16", "int8"):
        expected = reference.pack(weight, weight_format).data[0].float()
        got = ops.embed(ops.pack(weight, weight_format), plan)
        assert torch.equal(got, expected[[3, 0, 36, 3]])
        assert torch.equal(ops.select(got, plan), expected[[3, 0]])


@every_instruction_set
@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
@pytest.mark.parametrize("size", [1, 7, 8, 64, 203])
def test_norms(isa: str, name: str, size: int) -> None:
    weight = normal(size, seed=1)
    for num_tokens in (1, 3, 40):
        x = 5 * normal(num_tokens, size) + 2
        got, expected = (getattr(ops, name)(x, weight, 1e-5) for ops in (backend(isa), reference))
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(backend(isa).add(x, got.clone()), x + got)
