"""Beyond its values, the native backend promises that a row never depends on its company, bit by bit.

Not on the other rows of the step, their number or its place among them; not on the chunks of a prompt; not
on the number of threads; not on whether the step was recorded. Everything here is compared by equality.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from every_operation import EveryOperation
from native import (
    FORMATS,
    INSTRUCTION_SETS,
    PagedAttention,
    backend,
    chunked,
    heads_spec,
    normal,
    random_routing,
    rope_tables,
)
from schedules import Run, request, run, strangers
from tiny import write_mixtral
from toptwo.messages import GenerateRequest
from toptwo_kernels.ops import (
    Activation,
    AttentionSpec,
    ExpertWeights,
    HeadShape,
    LatentShape,
    LatentSpec,
    RouterSpec,
    RouterWeights,
    Routing,
    StepBatch,
    WeightFormat,
)

THREADS = (1, 2, 3)
ROWS = 32

every_instruction_set = pytest.mark.parametrize("isa", INSTRUCTION_SETS)
every_format = pytest.mark.parametrize("weight_format", FORMATS)

# From a backend and the rows of the batch that take part, by their indices, to their results.
Compute = Callable[[Any, Tensor], Tensor]


def check_rows(isa: str, compute: Compute) -> None:
    """Every row alone, in batches of every size at every position, and on several threads."""
    everyone = torch.arange(ROWS)
    whole = compute(backend(isa), everyone)
    assert len(whole.unique(dim=0)) == ROWS  # rows that are alike would prove nothing
    for threads in THREADS:
        ops = backend(isa, threads)
        assert torch.equal(compute(ops, everyone), whole)
        often = torch.tensor([5] * 300)  # the same row everywhere
        assert torch.equal(compute(ops, often), whole[often])
        order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(threads))
        assert torch.equal(compute(ops, order), whole[order])
        # Threads that outnumber processors take turns slowly: a few batches, where one thread does all.
        for row in range(ROWS) if threads == 1 else (0, 13, 31):
            assert torch.equal(compute(ops, everyone[row : row + 1])[0], whole[row])
        for size in (2, 3, 4, 5, 6, 7, 8, 9, 15, 31) if threads == 1 else (3, 9):
            for first in range(0, ROWS - size + 1, 5 if threads == 1 else 11):
                part = slice(first, first + size)
                assert torch.equal(compute(ops, everyone[part]), whole[part]), f"{size} rows from {first}"


@every_instruction_set
@every_format
@pytest.mark.parametrize("shape", [(203, 100), (8, 31)], ids=str)
def test_linear(isa: str, weight_format: WeightFormat, shape: tuple[int, int]) -> None:
    matrix = backend(isa).pack(normal(*shape), weight_format)
    x, bias = normal(ROWS, shape[1]), normal(shape[0], seed=1)
    check_rows(isa, lambda ops, rows: ops.linear(x[rows], matrix, bias))


@every_instruction_set
@every_format
def test_linear_per_head(isa: str, weight_format: WeightFormat) -> None:
    matrix = backend(isa).pack(normal(3, 70, 40), weight_format)
    x = normal(ROWS, 3 * (40 + 5))
    check_rows(isa, lambda ops, rows: ops.linear_per_head(x[rows], matrix))


@every_instruction_set
@every_format
@pytest.mark.parametrize(
    ("top_k", "activation", "biased"),
    [
        (1, "silu", False),
        (4, "silu", False),
        (2, "silu", True),
        (2, "gelu_tanh", True),
        (2, "clamped_swiglu", True),
    ],
)
def test_experts(
    isa: str, weight_format: WeightFormat, top_k: int, activation: Activation, biased: bool
) -> None:
    """Wider than one chunk of rows, so that threads share an expert."""
    hidden, ffn = 140, 76
    ops = backend(isa)
    weights = ExpertWeights(
        ops.pack(normal(5, 2 * ffn, hidden), weight_format, paired=True),
        ops.pack(normal(5, hidden, ffn), weight_format),
        activation,
        normal(5, 2 * ffn, seed=1) if biased else None,
        normal(5, hidden, seed=2) if biased else None,
    )
    x, routing = normal(ROWS, hidden), random_routing(ROWS, list(range(5)), top_k)

    def compute(ops: Any, rows: Tensor) -> Tensor:
        part = Routing(routing.ids_TK[rows], routing.weights_TK[rows])
        result: Tensor = ops.experts(x[rows], part, weights)
        return result

    check_rows(isa, compute)


@every_instruction_set
@pytest.mark.parametrize(
    "spec",
    [
        RouterSpec(40, 8),
        RouterSpec(5, 2, over_selected=True, renormalize=False),
        RouterSpec(13, 3, score="sigmoid", renormalize=False, scale=2.5),
        RouterSpec(64, 6, "sigmoid", num_groups=8, top_groups=3, group_score="best_two"),
        RouterSpec(16, 2, score="sparsemixer", jitter=0.3),
        RouterSpec(9, 9),
    ],
    ids=str,
)
def test_route(isa: str, spec: RouterSpec) -> None:
    biases = normal(2, spec.num_experts, seed=1)
    router = RouterWeights(backend(isa).pack(normal(spec.num_experts, 50) / 7, "float32"), *biases)
    x = normal(ROWS, 50)

    def compute(ops: Any, rows: Tensor) -> Tensor:
        routing = ops.route(x[rows], router, spec)
        return torch.cat((routing.ids_TK.double(), routing.weights_TK.double()), -1)

    check_rows(isa, compute)


@every_instruction_set
@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
@pytest.mark.parametrize("size", [5, 64, 203])
def test_norms(isa: str, name: str, size: int) -> None:
    x, weight = normal(ROWS, size), normal(size, seed=1)
    check_rows(isa, lambda ops, rows: getattr(ops, name)(x[rows], weight, 1e-5))


@every_instruction_set
def test_what_is_done_in_place(isa: str) -> None:
    x, weight, bias = normal(ROWS, 61), normal(7, seed=1), normal(61, seed=2)

    def compute(ops: Any, rows: Tensor) -> Tensor:
        y = ops.norm_slices(x[rows], weight, 1e-5, 3, 8)
        y = ops.clamp(ops.scale(y, 0.3), 0.5)
        result: Tensor = ops.layer_norm(ops.add(x[rows], y), x[0], 1e-5, bias)
        return result

    check_rows(isa, compute)


# --- Attention ------------------------------------------------------------------------------------

LENGTH = 75
# Chunks of a prompt; the last size is repeated to the end.
SIZES = [
    (LENGTH,),
    (7, 30, 38),
    (1,),
    (2,),
    (3,),
    (5,),
    (15,),
    (16,),
    (17,),
    (33,),
    (LENGTH - 1,),
    (7, 30, 1),
]


def check_sequences(isa: str, spec: AttentionSpec | LatentSpec, dtype: torch.dtype) -> None:
    """A whole prompt, chunks of any size, one token at a time, alone and in company, on any threads."""
    turned = spec.shape.rope_dim if isinstance(spec, LatentSpec) else spec.shape.head_dim
    rope = rope_tables(256, turned)

    def sequences(threads: int = 1, lengths: tuple[int, ...] = (LENGTH,)) -> PagedAttention:
        # seed 0 for all: the first sequence is the same whoever comes after it, if not its blocks
        return PagedAttention(backend(isa, threads), spec, list(lengths), rope, dtype=dtype)

    whole = chunked(sequences(), LENGTH)
    assert not whole.isnan().any()
    for threads in THREADS:
        for sizes in SIZES if threads == 1 else SIZES[:2]:
            assert torch.equal(chunked(sequences(threads), *sizes), whole), f"chunks of {sizes}"
        company = sequences(threads, (LENGTH, 3, 16, 130, 40))
        company.step([(3, 90), (0, 9)])
        company.step([(4, 17), (0, 31), (1, 2), (2, 16)])
        company.step([(0, 1), (1, 1), (4, 1), (3, 1)])
        company.step([(3, 30), (0, 1)])
        for _ in range(9):
            company.step([(3, 1), (4, 1), (0, 1)])
        company.step([(0, LENGTH - 51)])
        assert torch.equal(company.result(), whole)


every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


@every_instruction_set
@every_dtype
@pytest.mark.parametrize("heads", [HeadShape(6, 2, 16), HeadShape(4, 1, 40), HeadShape(2, 2, 64)], ids=str)
def test_attention(isa: str, dtype: torch.dtype, heads: HeadShape) -> None:
    check_sequences(isa, heads_spec(heads, 4.0), dtype)


@every_instruction_set
@pytest.mark.parametrize(
    "features",
    [
        *({"window": window} for window in (1, 5, 16, 30)),
        {"soft_cap": 2.0},
        {"sinks_N": normal(6, seed=1)},
        {"window": 21, "soft_cap": 3.0, "sinks_N": 3 * normal(6, seed=1)},
    ],
    ids=str,
)
def test_attention_with_features(isa: str, features: dict[str, Any]) -> None:
    check_sequences(isa, heads_spec(HeadShape(6, 2, 16), 4.0, **features), torch.float16)


@every_instruction_set
@every_dtype
@pytest.mark.parametrize("shape", [LatentShape(6, 24, 8), LatentShape(19, 64, 16)], ids=str)
def test_latent_attention(isa: str, dtype: torch.dtype, shape: LatentShape) -> None:
    check_sequences(isa, LatentSpec(shape, 0.6), dtype)


# --- Recorded and eager ---------------------------------------------------------------------------


@every_instruction_set
@every_format
@pytest.mark.parametrize("threads", [1, 2])
def test_a_recorded_step_is_the_eager_one(isa: str, weight_format: WeightFormat, threads: int) -> None:
    """For steps of many sizes on one recording."""
    ops, max_tokens = backend(isa, threads), 40
    model = EveryOperation(ops, weight_format)
    caches = [model.allocate() for _ in range(2)]
    replay = ops.record(lambda plan: model(plan, caches[0]), max_tokens)
    done = 0
    for size, wanted in ((1, [0]), (40, [39, 0, 7]), (3, []), (2, [0, 1])):
        batch = StepBatch(
            ids_T=torch.arange(done, done + size) % model.vocab,
            positions_T=torch.arange(done, done + size),
            slots_T=torch.arange(done, done + size),
            query_starts_R1=torch.tensor([0, size]),
            context_lens_R=torch.tensor([done + size]),
            block_tables_RB=torch.arange(4)[None],
            block_size=16,
            selected_S=torch.tensor(wanted, dtype=torch.int64),
        )
        done += size
        eager = model(ops.plan_step(batch), caches[1])
        assert eager.shape == (len(wanted), model.vocab)
        assert not eager.isnan().any()
        assert torch.equal(replay(batch), eager)
    with pytest.raises(ValueError, match="larger than the recorded one"):
        replay(
            StepBatch(
                *(torch.zeros(41, dtype=torch.int64),) * 5,
                torch.zeros(1, 1, dtype=torch.int64),
                16,
                torch.zeros(1, dtype=torch.int64),
            )
        )


# --- The whole model ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mixtral")
    write_mixtral(directory)
    return directory


WANTED = request("it", seed=7, temperature=0.8, top_p=0.9)
SETTINGS = [
    ("int8", "auto"),
    ("int4", "auto"),
    ("int8", "float32"),
    ("none", "float32"),
    ("none", "bfloat16"),
]


@pytest.mark.parametrize(("quantization", "dtype"), SETTINGS)
def test_a_request_is_computed_the_same_in_every_way(checkpoint: Path, quantization: str, dtype: str) -> None:
    def serve(*waves: list[GenerateRequest], **options: Any) -> Run:
        return run(checkpoint, *waves, quantization=quantization, dtype=dtype, backend="cpu", **options)

    alone = serve([WANTED])
    assert len(alone.tokens["it"]) == WANTED.max_tokens

    def check(got: Run) -> None:
        assert got.tokens["it"] == alone.tokens["it"]
        assert torch.equal(torch.stack(got.logits["it"]), torch.stack(alone.logits["it"]))

    check(serve([WANTED], threads=2))
    for threads in (1, 2) if (quantization, dtype) in SETTINGS[:2] else (1,):
        crowd = serve([*strangers(31), WANTED], threads=threads)
        assert crowd.largest_batch > 16
        check(crowd)
    check(serve([WANTED, *strangers(31)], max_step_tokens=64))
    for budget in (32, 33, 47):
        check(serve([WANTED], max_step_tokens=budget))
    earlier = GenerateRequest("earlier", WANTED.prompt_ids, WANTED.sampling, 3)
    cached = serve([earlier], [WANTED])
    assert cached.cached["it"] == 48
    check(cached)
    company = [request(f"s{i}", seed=i, length=40, max_tokens=60) for i in range(3)]
    for prefix_caching in (True, False):
        resumed = serve([*company, WANTED], num_blocks=16, prefix_caching=prefix_caching)
        assert "it" in resumed.preempted
        check(resumed)
