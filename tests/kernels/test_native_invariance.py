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

from native import FORMATS, INSTRUCTION_SETS, PagedAttention, backend, chunked, normal, random_routing
from schedules import Run, request, run, strangers
from tiny import write_mixtral
from toptwo.messages import GenerateRequest
from toptwo_kernels.ops import HeadShape, RouterSpec, Routing, StepBatch, WeightFormat, rope_tables

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
    x = normal(ROWS, shape[1])
    check_rows(isa, lambda ops, rows: ops.linear(x[rows], matrix))


@every_instruction_set
@every_format
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_experts(isa: str, weight_format: WeightFormat, top_k: int) -> None:
    """Wider than one chunk of rows, so that threads share an expert."""
    hidden, ffn = 140, 76
    ops = backend(isa)
    gate_up = ops.pack(normal(5, 2 * ffn, hidden), weight_format, paired=True)
    down = ops.pack(normal(5, hidden, ffn), weight_format)
    x, routing = normal(ROWS, hidden), random_routing(ROWS, list(range(5)), top_k)

    def compute(ops: Any, rows: Tensor) -> Tensor:
        part = Routing(routing.ids_TK[rows], routing.weights_TK[rows])
        result: Tensor = ops.experts(x[rows], part, gate_up, down, "silu")
        return result

    check_rows(isa, compute)


@every_instruction_set
@pytest.mark.parametrize(
    "spec",
    [
        RouterSpec(40, 8),
        RouterSpec(5, 2, over_selected=True, renormalize=False),
        RouterSpec(13, 3, score="sigmoid", renormalize=False, scale=2.5),
    ],
    ids=str,
)
def test_route(isa: str, spec: RouterSpec) -> None:
    router = backend(isa).pack(normal(spec.num_experts, 50), "float32")
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


@every_instruction_set
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [HeadShape(6, 2, 16), HeadShape(4, 1, 40), HeadShape(2, 2, 64)], ids=str)
def test_attention(isa: str, dtype: torch.dtype, heads: HeadShape) -> None:
    """A whole prompt, chunks of any size, one token at a time, alone and in company, on any threads."""
    rope = rope_tables(256, heads.head_dim, 10_000.0)

    def sequences(threads: int = 1, lengths: tuple[int, ...] = (LENGTH,)) -> PagedAttention:
        # seed 0 for all: the first sequence is the same whoever comes after it, if not its blocks
        return PagedAttention(backend(isa, threads), heads, list(lengths), rope, dtype=dtype, sharpness=4.0)

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


# --- Recorded and eager ---------------------------------------------------------------------------


@every_instruction_set
@every_format
@pytest.mark.parametrize("threads", [1, 2])
def test_a_recorded_step_is_the_eager_one(isa: str, weight_format: WeightFormat, threads: int) -> None:
    """Every operation, in the order of a model's layer, for steps of many sizes on one recording."""
    ops, heads, max_tokens = backend(isa, threads), HeadShape(4, 2, 8), 40
    hidden, ffn, vocab = 36, 20, 50
    rope = rope_tables(64, 8, 1e4)
    table, head = (ops.pack(normal(vocab, hidden, seed=seed), weight_format) for seed in (1, 2))
    qkv = ops.pack(normal(64, hidden, seed=3), weight_format)
    out = ops.pack(normal(hidden, 32, seed=4), weight_format)
    router = ops.pack(normal(5, hidden, seed=5), "float32")
    gate_up = ops.pack(normal(5, 2 * ffn, hidden, seed=6), weight_format, paired=True)
    down = ops.pack(normal(5, hidden, ffn, seed=7), weight_format)
    weight = normal(hidden, seed=8)

    def forward(plan: object, kv: Any) -> Tensor:
        x = ops.embed(table, plan)
        for _ in range(2):  # the second time, buffers are used again
            attended = ops.attention(
                ops.linear(ops.rms_norm(x, weight, 1e-5), qkv), rope, kv, plan, heads, 0.5
            )
            x = ops.add(x, ops.linear(attended, out))
            normed = ops.layer_norm(x, weight, 1e-5)
            routing = ops.route(normed, router, RouterSpec(5, 2))
            x = ops.add(x, ops.experts(normed, routing, gate_up, down, "silu"))
        selected = ops.select(x, plan)
        result: Tensor = ops.linear(ops.rms_norm(selected, weight, 1e-5), head)
        return result

    caches = [ops.allocate_kv(4, 16, heads, torch.float32) for _ in range(2)]
    replay = ops.record(lambda plan: forward(plan, caches[0]), max_tokens)
    done = 0
    for size, wanted in ((1, [0]), (40, [39, 0, 7]), (3, []), (2, [0, 1])):
        batch = StepBatch(
            ids_T=torch.arange(done, done + size) % vocab,
            positions_T=torch.arange(done, done + size),
            slots_T=torch.arange(done, done + size),
            query_starts_R1=torch.tensor([0, size]),
            context_lens_R=torch.tensor([done + size]),
            block_tables_RB=torch.arange(4)[None],
            block_size=16,
            selected_S=torch.tensor(wanted, dtype=torch.int64),
        )
        done += size
        eager = forward(ops.plan_step(batch), caches[1])
        assert eager.shape == (len(wanted), vocab)
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
