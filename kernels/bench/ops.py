"""Every op of the native backend, beside the bandwidth and the peak of the machine it runs on.

Rows of one token are bound by memory and told in GB/s and percent of the read bandwidth; rows of many
tokens are bound by arithmetic and told in GOP/s and percent of the float32 or int8 peak, whichever its
format could reach.

Run: make bench-ops            or: python kernels/bench/ops.py --formats int8,int4 --tokens 1,16,512
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from machine import Machine, measure_machine, median_seconds
from rich.console import Console
from rich.progress import track
from rich.table import Table

from toptwo_kernels.cpu import create
from toptwo_kernels.ops import (
    QUANTIZED,
    AttentionSpec,
    ExpertWeights,
    HeadShape,
    KVShape,
    LatentShape,
    LatentSpec,
    Rope,
    RouterSpec,
    RouterWeights,
    StepBatch,
)

HIDDEN, FFN, EXPERTS, TOP_K, VOCAB = 1024, 3072, 8, 2, 49_152
HEADS = HeadShape(16, 4, 64)
LATENTS = LatentShape(16, 512, 64)
CONTEXT, WINDOW = 512, 128
COLD_BYTES = 256 << 20  # different weights in turn, so that none stays in a cache


@dataclass(frozen=True)
class Result:
    """seconds of one call; bytes that it reads at least; operations (a multiply-add is two)."""

    op: str
    weights: str
    tokens: int
    seconds: float
    bytes: int
    operations: int


class Bench:
    """One op at a time, over enough copies of its weights that they come from memory."""

    def __init__(self, num_threads: int) -> None:
        self.ops: Any = create(num_threads, pinned=True)

    def time(self, calls: list[Any]) -> float:
        """Median seconds of one of the recorded calls, which are replayed in turn."""
        runs = [self.ops.record(call, self.tokens) for call in calls]
        batch = self.batch

        def replay() -> None:
            for run in runs:
                run(batch)

        return median_seconds(replay, 5) / len(runs)

    def measure(self, formats: list[str], tokens: int) -> Iterator[Result]:
        self.tokens, self.batch = tokens, decode_batch(tokens)
        for weights in formats:
            yield self.linear(weights, "qkv", (HEADS.num_heads + 2 * HEADS.num_kv_heads) * HEADS.head_dim)
            yield self.experts(weights)
            if weights != "int4":
                yield self.linear(weights, "lm_head", VOCAB)
            yield self.linear_per_head(weights)
        yield self.attention(torch.float16)
        yield self.attention(torch.float16, WINDOW)
        yield self.latent_attention(torch.float16)
        yield self.small("rms_norm")
        yield self.small("route")

    def linear(self, weights: str, name: str, rows: int) -> Result:
        dense = torch.randn(rows, HIDDEN) / 32
        matrices = [self.ops.pack(dense, weights)]
        size = matrices[0].data.nbytes
        matrices += [self.ops.pack(dense, weights) for _ in range(COLD_BYTES // size)]
        x = torch.randn(self.tokens, HIDDEN)
        calls = [lambda plan, m=m: self.ops.linear(x, m) for m in matrices]
        operations = 2 * self.tokens * rows * HIDDEN
        return Result(name, weights, self.tokens, self.time(calls), size, operations)

    def linear_per_head(self, weights: str) -> Result:
        """From a head's query to the latent space."""
        heads, cols = LATENTS.num_heads, 128
        dense = torch.randn(heads, LATENTS.latent_dim, cols) / 11
        matrices = [self.ops.pack(dense, weights)]
        matrices += [self.ops.pack(dense, weights) for _ in range(COLD_BYTES // matrices[0].data.nbytes)]
        x = torch.randn(self.tokens, heads * (cols + LATENTS.rope_dim))
        calls = [lambda plan, m=m: self.ops.linear_per_head(x, m) for m in matrices]
        operations = 2 * self.tokens * dense.numel()
        size = matrices[0].data.nbytes
        return Result("linear_per_head", weights, self.tokens, self.time(calls), size, operations)

    def experts(self, weights: str) -> Result:
        gate_up, down = torch.randn(EXPERTS, 2 * FFN, HIDDEN) / 32, torch.randn(EXPERTS, HIDDEN, FFN) / 55
        stacks = [
            ExpertWeights(self.ops.pack(gate_up, weights, paired=True), self.ops.pack(down, weights))
            for _ in range(1 + COLD_BYTES // (gate_up.numel() + down.numel()))
        ]
        x = torch.randn(self.tokens, HIDDEN)
        router = RouterWeights(self.ops.pack(torch.randn(EXPERTS, HIDDEN) / 32, "float32"))
        routing = self.ops.route(x, router, RouterSpec(EXPERTS, TOP_K))
        calls = [lambda plan, s=s: self.ops.experts(x, routing, s) for s in stacks]
        active = len(routing.ids_TK.unique())
        size = (stacks[0].gate_up.data.nbytes + stacks[0].down.data.nbytes) * active // EXPERTS
        operations = 2 * self.tokens * TOP_K * 3 * FFN * HIDDEN
        return Result("experts", weights, self.tokens, self.time(calls), size, operations)

    def cache(self, shape: KVShape, dtype: torch.dtype) -> Any:
        kv = self.ops.allocate_kv(self.tokens * (CONTEXT // 16 + 1), 16, shape, dtype)
        for part in kv:
            part.zero_()
        return kv

    def attention(self, dtype: torch.dtype, window: int | None = None) -> Result:
        rope, kv = rope_tables(HEADS.head_dim), self.cache(HEADS, dtype)
        spec = AttentionSpec(HEADS, 0.125, window)
        qkv = torch.randn(self.tokens, (HEADS.num_heads + 2 * HEADS.num_kv_heads) * HEADS.head_dim)
        call = lambda plan: self.ops.attention(qkv, rope, kv, plan, spec)  # noqa: E731
        context = window or CONTEXT
        size = self.tokens * context * HEADS.kv_size * dtype.itemsize
        operations = 4 * self.tokens * context * HEADS.num_heads * HEADS.head_dim
        kind = f"KV {name_of(dtype)}, {'window' if window else 'context'} {context}"
        return Result("attention", kind, self.tokens, self.time([call]), size, operations)

    def latent_attention(self, dtype: torch.dtype) -> Result:
        rope, kv = rope_tables(LATENTS.rope_dim), self.cache(LATENTS, dtype)
        spec = LatentSpec(LATENTS, 0.07)
        q = torch.randn(self.tokens, LATENTS.num_heads * LATENTS.kv_size)
        latents = torch.randn(self.tokens, LATENTS.kv_size)
        call = lambda plan: self.ops.latent_attention(q, latents, rope, kv, plan, spec)  # noqa: E731
        size = self.tokens * CONTEXT * LATENTS.kv_size * dtype.itemsize
        operations = 2 * self.tokens * CONTEXT * LATENTS.num_heads * (LATENTS.kv_size + LATENTS.latent_dim)
        kind = f"KV {name_of(dtype)}, context {CONTEXT}"
        return Result("latent_attention", kind, self.tokens, self.time([call]), size, operations)

    def small(self, name: str) -> Result:
        x, weight = torch.randn(self.tokens, HIDDEN), torch.ones(HIDDEN)
        router = RouterWeights(self.ops.pack(torch.randn(EXPERTS, HIDDEN), "float32"))
        if name == "rms_norm":
            calls = [lambda plan: self.ops.rms_norm(x, weight, 1e-5)] * 50
        else:
            calls = [lambda plan: self.ops.route(x, router, RouterSpec(EXPERTS, TOP_K)).weights_TK] * 50
        return Result(name, "float32", self.tokens, self.time(calls), x.nbytes, 0)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def rope_tables(dim: int) -> Rope:
    angles = torch.outer(torch.arange(CONTEXT + 1.0), 10_000.0 ** -(torch.arange(0, dim, 2) / dim))
    return Rope(angles.cos(), angles.sin())


def decode_batch(tokens: int) -> StepBatch:
    """Every token its own sequence, at the end of a context of CONTEXT tokens."""
    per_row = CONTEXT // 16 + 1
    tables = torch.arange(tokens * per_row).view(tokens, per_row)
    return StepBatch(
        ids_T=torch.zeros(tokens, dtype=torch.int64),
        positions_T=torch.full((tokens,), CONTEXT),
        slots_T=tables[:, CONTEXT // 16] * 16,
        query_starts_R1=torch.arange(tokens + 1),
        context_lens_R=torch.full((tokens,), CONTEXT + 1),
        block_tables_RB=tables,
        block_size=16,
        selected_S=torch.arange(tokens),
    )


def show(results: list[Result], machine: Machine) -> Table:
    table = Table("op", "weights", "tokens", "time", "reads", "of bandwidth", "computes", "of peak")
    for r in results:
        peak = max(machine.int8_peak, machine.fp32_peak) if r.weights in QUANTIZED else machine.fp32_peak
        bandwidth, rate = r.bytes / r.seconds, r.operations / r.seconds
        table.add_row(
            r.op,
            r.weights,
            str(r.tokens),
            f"{r.seconds * 1e6:,.1f} us",
            f"{bandwidth / 1e9:.1f} GB/s",
            f"{bandwidth / machine.read_bandwidth:.0%}",
            f"{rate / 1e9:.0f} GOP/s" if rate else "",
            f"{rate / peak:.0%}" if rate else "",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--formats", default="float32,bfloat16,int8,int4")
    parser.add_argument("--tokens", default="1,4,16,512")
    parser.add_argument("--threads", type=int, default=None)
    arguments = parser.parse_args()
    machine = measure_machine(arguments.threads)
    console = Console(width=110)
    console.print(str(machine), highlight=False)
    bench = Bench(machine.num_threads)
    results: list[Result] = []
    for tokens in track([int(t) for t in arguments.tokens.split(",")], "measuring", transient=True):
        results += bench.measure(arguments.formats.split(","), tokens)
    console.print(show(results, machine))


if __name__ == "__main__":
    main()
