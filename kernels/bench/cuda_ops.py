"""Every op of the CUDA backend in the shapes of Mixtral-8x7B, beside the limits of the card it runs on.

A few tokens are bound by memory and told in TB/s and percent of the read bandwidth; many tokens are bound by
arithmetic and told in TFLOP/s and percent of the bf16 peak. An op is captured several times in one CUDA
graph, each time with other weights, so that nothing comes from a cache and gaps between launches count.

Run: python kernels/bench/cuda_ops.py --formats bfloat16,int8 --tokens 1,8,64,2048
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from card import Card, measure_card, median_seconds

from toptwo_kernels.cuda.backend import create
from toptwo_kernels.ops import (
    AttentionSpec,
    ExpertWeights,
    HeadShape,
    Rope,
    RouterSpec,
    RouterWeights,
    Routing,
    StepBatch,
)

HIDDEN, FFN, EXPERTS, TOP_K, VOCAB = 4096, 14336, 8, 2, 32_000
HEADS = HeadShape(32, 8, 128)
CONTEXT, BLOCK = 1024, 16
COLD_BYTES = 400 << 20  # several times the second-level cache
FORMAT_BYTES = {"bfloat16": 2.0, "int8": 1.0625, "int4": 0.59375, "fp8": 1.0}


@dataclass(frozen=True)
class Result:
    """seconds of one call; bytes that it must read; operations (a multiply-add is two)."""

    op: str
    weights: str
    tokens: int
    seconds: float
    bytes: float
    operations: float


class Bench:
    """One op at a time."""

    def __init__(self) -> None:
        self.ops: Any = create()

    def time(self, calls: list[Callable[[], object]]) -> float:
        """Seconds of one of the calls, which follow each other in a graph."""
        for call in calls:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = [call() for call in calls]
        seconds = median_seconds(graph.replay) / len(calls)
        del kept
        return seconds

    def linear(self, name: str, out: int, inputs: int, fmt: str, tokens: int) -> Result:
        size = out * inputs * FORMAT_BYTES[fmt]
        copies = max(2, int(COLD_BYTES // size) + 1)
        weights = [self.ops.pack(_normal(out, inputs), fmt) for _ in range(copies)]
        x = _normal(tokens, inputs)
        seconds = self.time([lambda w=w: self.ops.linear(x, w) for w in weights])
        return Result(name, fmt, tokens, seconds, size, 2.0 * tokens * out * inputs)

    def experts(self, fmt: str, tokens: int) -> Result:
        stacks = []
        for _ in range(2):
            gate_up = self.ops.pack(_normal(EXPERTS, 2 * FFN, HIDDEN), fmt, paired=True)
            stacks.append(ExpertWeights(gate_up, self.ops.pack(_normal(EXPERTS, HIDDEN, FFN), fmt)))
        ids = torch.rand(tokens, EXPERTS, device="cuda").topk(TOP_K).indices.int().contiguous()
        routing = Routing(ids, torch.full((tokens, TOP_K), 0.5, device="cuda"))
        x = _normal(tokens, HIDDEN)
        seconds = self.time([lambda s=s: self.ops.experts(x, routing, s) for s in stacks])
        weights = 3.0 * FFN * HIDDEN
        read = len(ids.unique()) * weights * FORMAT_BYTES[fmt]
        return Result("experts", fmt, tokens, seconds, read, 2 * TOP_K * tokens * weights)

    def attention(self, rows: int) -> Result:
        """Decoding rows in the middle of CONTEXT tokens."""
        width = CONTEXT // BLOCK
        table = torch.randperm(rows * width).view(rows, width)
        batch = StepBatch(
            ids_T=torch.zeros(rows, dtype=torch.int64),
            positions_T=torch.full((rows,), CONTEXT - 1),
            slots_T=table[:, -1] * BLOCK + BLOCK - 1,
            query_starts_R1=torch.arange(rows + 1),
            context_lens_R=torch.full((rows,), CONTEXT),
            block_tables_RB=table,
            block_size=BLOCK,
            selected_S=torch.arange(rows),
        )
        plan = self.ops.plan_step(batch)
        size = CONTEXT * rows * HEADS.kv_size * 2
        caches = []
        for _ in range(max(2, COLD_BYTES // size + 1)):
            cache = self.ops.allocate_kv(rows * width, BLOCK, HEADS, torch.bfloat16)
            for part in cache:
                part.normal_()
            caches.append(cache)
        angles = torch.rand(CONTEXT, HEADS.head_dim // 2, device="cuda")
        rope, spec = Rope(angles.cos(), angles.sin()), AttentionSpec(HEADS, HEADS.head_dim**-0.5)
        qkv = _normal(rows, (HEADS.num_heads + 2 * HEADS.num_kv_heads) * HEADS.head_dim)
        calls = [lambda c=c: self.ops.attention(qkv, rope, c, plan, spec) for c in caches]
        operations = 4.0 * rows * CONTEXT * HEADS.num_heads * HEADS.head_dim
        return Result(f"attention, {CONTEXT} back", "bfloat16", rows, self.time(calls), size, operations)

    def small(self, tokens: int) -> list[Result]:
        """What reads no weights to speak of: its seconds are what counts."""
        x, y, norm = _normal(tokens, HIDDEN), _normal(tokens, HIDDEN), torch.ones(HIDDEN, device="cuda")
        router = RouterWeights(self.ops.pack(_normal(EXPERTS, HIDDEN).float(), "float32"))
        spec = RouterSpec(EXPERTS, TOP_K)
        moved = 2.0 * tokens * HIDDEN
        calls: list[tuple[str, Callable[[], object], float]] = [
            ("rms_norm", lambda: self.ops.rms_norm(x, norm, 1e-5), 2 * moved),
            ("add", lambda: self.ops.add(x, y), 3 * moved),
            ("route", lambda: self.ops.route(x, router, spec), moved + 4 * EXPERTS * HIDDEN),
        ]
        return [
            Result(name, "", tokens, self.time([call] * 20), size, 2.0 * tokens * HIDDEN)
            for name, call, size in calls
        ]


def measure(bench: Bench, formats: list[str], token_counts: list[int]) -> list[Result]:
    results = []
    width = (HEADS.num_heads + 2 * HEADS.num_kv_heads) * HEADS.head_dim
    for tokens in token_counts:
        for fmt in formats:
            results.append(bench.linear("qkv", width, HIDDEN, fmt, tokens))
            results.append(bench.linear("out", HIDDEN, HIDDEN, fmt, tokens))
            results.append(bench.linear("lm_head", VOCAB, HIDDEN, fmt, tokens))
            results.append(bench.experts(fmt, tokens))
            torch.cuda.empty_cache()
        if tokens <= 512:
            results.append(bench.attention(tokens))
        results += bench.small(tokens)
    return results


def show(results: list[Result], card: Card) -> None:
    print(f"{'op':20} {'weights':9} {'tokens':>6} {'us':>9} {'TB/s':>6} {'TFLOP/s':>8} {'of limit':>9}")
    for r in results:
        bandwidth, rate = r.bytes / r.seconds, r.operations / r.seconds
        share = max(bandwidth / card.read_bandwidth, rate / card.bf16_peak)
        print(
            f"{r.op:20} {r.weights:9} {r.tokens:6d} {r.seconds * 1e6:9.1f} {bandwidth / 1e12:6.2f} "
            f"{rate / 1e12:8.1f} {share:9.0%}"
        )


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * shape[-1] ** -0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--formats", default="bfloat16,int8,int4,fp8")
    parser.add_argument("--tokens", default="1,8,64,256,2048")
    arguments = parser.parse_args()
    card = measure_card()
    print(card)
    formats = arguments.formats.split(",")
    show(measure(Bench(), formats, [int(count) for count in arguments.tokens.split(",")]), card)


if __name__ == "__main__":
    main()
