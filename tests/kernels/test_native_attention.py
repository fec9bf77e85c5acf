"""Attention of the native backend against the reference, over a cache of NaN wherever nothing was written."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from native import (
    BLOCK,
    INSTRUCTION_SETS,
    PagedAttention,
    backend,
    chunked,
    heads_spec,
    normal,
    rope_tables,
)
from toptwo_kernels import reference
from toptwo_kernels.ops import AttentionSpec, HeadShape, LatentShape, LatentSpec, StepBatch

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


def both(
    isa: str,
    spec: HeadShape | AttentionSpec | LatentSpec,
    dtype: torch.dtype,
    steps: Steps,
    lengths: list[int] = LENGTHS,
) -> None:
    """Run the steps on both backends; compare every output and what was written to the cache."""
    if isinstance(spec, HeadShape):
        spec = heads_spec(spec, 3.0)
    turned = spec.shape.rope_dim if isinstance(spec, LatentSpec) else spec.shape.head_dim
    rope = rope_tables(max(lengths), turned)
    got, expected = (
        PagedAttention(ops, spec, lengths, rope, dtype=dtype) for ops in (backend(isa), reference)
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
    for values, truth in zip(got.kv[1:], expected.kv[1:], strict=True):
        assert torch.equal(values.transpose(1, 2).nan_to_num(9), truth.nan_to_num(9))
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
        paged = PagedAttention(backend(isa), heads_spec(shape), [length], rope_tables(length, 8))
        qkv = paged.sequences[0].inputs_LX
        qkv[:] = normal(length, 24) / 10
        # The rotation keeps lengths, not products: a key near a query's own position stays beside it.
        paged.rope.cos_LD.fill_(1)
        paged.rope.sin_LD.fill_(0)
        qkv[:, :8] = 1.0
        qkv[strongest, 8:16] = 400.0
        out = chunked(paged, length)
        assert out.isfinite().all()
        torch.testing.assert_close(out[strongest:], qkv[strongest, 16:].expand(length - strongest, -1))


# --- Windows, soft caps, sinks --------------------------------------------------------------------

FEATURES: list[dict[str, Any]] = [
    *({"window": window} for window in (1, 2, 15, 16, 17, 31, 33, 69)),
    {"soft_cap": 1.5},
    {"sinks_N": normal(6, seed=9)},
    {"window": 20, "soft_cap": 5.0, "sinks_N": 3 * normal(6, seed=9)},
]


@every_instruction_set
@pytest.mark.parametrize("features", FEATURES, ids=str)
def test_features(isa: str, features: dict[str, Any]) -> None:
    for dtype in DTYPES:
        both(isa, heads_spec(HeadShape(6, 2, 24), 3.0, **features), dtype, STEPS)


@every_instruction_set
def test_every_window_over_every_length(isa: str) -> None:
    for window in range(1, 36):
        both(isa, heads_spec(HeadShape(1, 1, 8), window=window), torch.float32, [[(0, 35)]], [35])


@every_instruction_set
def test_a_long_context_in_a_window(isa: str) -> None:
    steps = [[(0, 700), (1, 30)], [(0, 500), (1, 1)], [(0, 1), (1, 1)], [(0, 99)]]
    both(isa, heads_spec(HeadShape(4, 2, 16), window=130), torch.float16, steps, [1300, 32])


@every_instruction_set
@pytest.mark.parametrize("window", [1, 5, 16, 17, 40])
def test_what_left_the_window_is_not_read(isa: str, window: int) -> None:
    """Neither a number of it, nor where in the cache its blocks were."""
    length, spec = 100, heads_spec(HeadShape(4, 2, 16), window=window)

    class Forgetful(PagedAttention):
        def _batch(self, rows: list[tuple[int, int]]) -> StepBatch:
            batch = super()._batch(rows)
            sequence, first_seen = self.sequences[0], max(0, self.sequences[0].num_done + 1 - window)
            blocks = sequence.blocks[: first_seen // BLOCK]
            batch.block_tables_RB[0, : len(blocks)] = 1 << 40
            for part in self.kv:
                part[blocks] = torch.nan
            if first_seen % BLOCK:
                partly = sequence.blocks[first_seen // BLOCK]
                self.kv[0][partly, ..., : first_seen % BLOCK] = torch.nan
                self.kv[1][partly, :, : first_seen % BLOCK] = torch.nan
            return batch

    for sizes in ((1,), (33, 7, 1), (60, 40)):
        kept, forgotten = (
            chunked(kind(backend(isa), spec, [length], rope_tables(length, 16)), *sizes)
            for kind in (PagedAttention, Forgetful)
        )
        assert torch.equal(forgotten, kept)


@every_instruction_set
@pytest.mark.parametrize("soft_cap", [1.0, 30.0])
def test_scores_of_any_size_are_capped(isa: str, soft_cap: float) -> None:
    """Two tokens whose scores differ by less than the cap's last bits, and by far more than it."""
    for size in (1e-6, 1e-3, 0.3, 3.0, 30.0, 1e4, 1e20):
        spec = AttentionSpec(HeadShape(1, 1, 8), 1.0, soft_cap=soft_cap)
        paged = PagedAttention(backend(isa), spec, [2], rope_tables(2, 8))
        paged.rope.cos_LD.fill_(1)
        paged.rope.sin_LD.fill_(0)
        qkv = paged.sequences[0].inputs_LX
        qkv[:] = 0
        qkv[:, 0] = 1.0  # q
        qkv[0, 8], qkv[1, 8] = size, -size  # k
        qkv[0, 16:] = 1.0  # v
        capped = soft_cap * (torch.tensor([size, -size]).double() / soft_cap).tanh()
        expected = capped.softmax(0)[0].expand(8)
        torch.testing.assert_close(
            chunked(paged, 2)[1].double(), expected, rtol=3e-7 * (1 + soft_cap), atol=0
        )


# --- Latent vectors -------------------------------------------------------------------------------

LATENTS = [LatentShape(1, 8, 8), LatentShape(4, 64, 16), LatentShape(16, 512, 64), LatentShape(37, 40, 24)]


@every_instruction_set
@pytest.mark.parametrize("shape", LATENTS, ids=str)
def test_latent_attention(isa: str, shape: LatentShape) -> None:
    for dtype in DTYPES:
        both(isa, LatentSpec(shape, 3.0 * shape.kv_size**-0.5), dtype, STEPS)


@every_instruction_set
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33])
def test_latent_contexts_at_the_edges_of_blocks(isa: str, length: int) -> None:
    spec = LatentSpec(LatentShape(5, 16, 8), 0.5)
    for steps in ([[(0, length)]], [[(0, 1)]] * length, [[(0, length - 1)] * (length > 1), [(0, 1)]]):
        both(isa, spec, torch.float32, [step for step in steps if step], lengths=[length])


@every_instruction_set
def test_long_latent_contexts(isa: str) -> None:
    steps = [[(0, 700), (1, 30)], [(0, 500), (1, 1)], [(0, 1), (1, 1)], [(0, 99)]]
    both(isa, LatentSpec(LatentShape(9, 32, 16), 0.5), torch.float16, steps, lengths=[1300, 32])


def test_shapes_that_vectors_do_not_divide_are_refused() -> None:
    shape = HeadShape(1, 1, 12)
    with pytest.raises(ValueError, match="head dimension that 8 divides, not 12"):
        PagedAttention(backend("scalar"), heads_spec(shape), [4], rope_tables(4, 12)).step([(0, 4)])
    for latents in (LatentShape(1, 12, 8), LatentShape(1, 8, 12)):
        paged = PagedAttention(backend("scalar"), LatentSpec(latents, 1.0), [4], rope_tables(4, 8))
        with pytest.raises(ValueError, match="latent and rope dimensions that 8 divides, not"):
            paged.step([(0, 4)])
    for each in (shape, LatentShape(1, 8, 8)):
        with pytest.raises(ValueError, match=f"blocks of {BLOCK} tokens, not 32"):
            backend("scalar").allocate_kv(4, 32, each, torch.float32)


# --- Rows -----------------------------------------------------------------------------------------


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
