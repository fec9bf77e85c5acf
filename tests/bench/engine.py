"""The engine on a GPU, without HTTP: decode steps, prompts, and what a step costs outside the GPU.

Weights are made up on the device in the shape of a published model, so that nothing large travels. Every
figure stands beside its roofline: the bytes that a step must read (weights of the experts that were chosen,
and every row's KV) over the measured read bandwidth, or operations over the measured matrix peak.

Run: python tests/bench/engine.py --random-weights mixtral-8x7b --quantization int8
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "kernels" / "bench")]
from card import Card, measure_card, median_seconds

from published import MIXTRAL_8X7B
from toptwo.engine.blocks import BlockPool
from toptwo.engine.scheduler import Scheduler, SchedulerLimits
from toptwo.messages import GenerateRequest, SamplingParams, StepResult
from toptwo.models.checkpoint import WeightSpec
from toptwo.models.registry import read_config
from toptwo.runtime.build import Runtime, build_runtime
from toptwo.runtime.formats import BITS, format_of
from toptwo.settings import Settings
from toptwo_kernels.ops import StepBatch

MODELS = {"mixtral-8x7b": MIXTRAL_8X7B}
STEPS = 20


@dataclass(frozen=True)
class Line:
    """One row of the table: what was run, tokens per second, and the share of the roofline."""

    what: str
    seconds: float
    tokens: int
    floor: float
    note: str = ""


class Bench:
    """A model of random weights, and its shape in numbers."""

    def __init__(self, runtime: Runtime, specs: list[WeightSpec], card: Card) -> None:
        self.runtime, self.card = runtime, card
        info = runtime.info
        dtype: Any = info.dtype
        self.num_experts, self.experts_per_token, self.dense_bytes, self.expert_bytes = 0, 0, 0.0, 0.0
        self.active_weights = 0.0
        for spec in specs:
            size = math.prod(spec.shape)
            in_bytes = size * BITS[format_of(spec.role, info.quantization, dtype)] / 8
            if len(spec.shape) == 3:
                self.num_experts = spec.shape[0]
                self.expert_bytes += in_bytes / spec.shape[0]  # of one expert in every layer
            elif spec.name != "embed":  # a few rows of it are read
                self.dense_bytes += in_bytes
                self.active_weights += size
        self.experts_per_token = MIXTRAL_8X7B["num_experts_per_tok"]
        experts = sum(math.prod(s.shape) / s.shape[0] for s in specs if len(s.shape) == 3)
        self.active_weights += experts * self.experts_per_token
        self.kv_bytes = info.kv_cache_bytes / (info.num_blocks * info.block_size)
        for layer in runtime.kv_cache:
            for part in layer:
                part.view(torch.uint8).random_(0, 48) if part.dtype.itemsize == 1 else part.normal_()

    def decode(self, rows: int, context: int) -> Line:
        """One decode step of `rows` sequences in the middle of their answers."""
        batch = self._batch([context] * rows, [1] * rows)
        step = self.runtime.step
        before = self._expert_tokens()
        step(batch)
        torch.cuda.synchronize()
        chosen = (self._expert_tokens() - before > 0).sum(1).float().mean().item()
        for _ in range(3):
            step(batch)
        torch.cuda.synchronize()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(STEPS):
            step(batch)
        end.record()
        torch.cuda.synchronize()
        read = self.dense_bytes + chosen * self.expert_bytes + rows * context * self.kv_bytes
        floor = max(read / self.card.read_bandwidth, 2 * rows * self.active_weights / self.card.bf16_peak)
        note = f"{read / 1e9:.1f} GB, {chosen:.2f} experts a layer"
        seconds = start.elapsed_time(end) / STEPS / 1e3
        return Line(f"decode, {rows} x {context}", seconds, rows, floor, note)

    def prefill(self, tokens: int) -> Line:
        """A prompt in one step."""
        batch = self._batch([tokens], [tokens])
        seconds = median_seconds(lambda: self.runtime.step(batch), 5)
        operations = 2 * tokens * self.active_weights
        return Line(f"prompt of {tokens}", seconds, tokens, operations / self.card.bf16_peak)

    def serve(self, rows: int, context: int, tokens: int) -> tuple[Line, float]:
        """The scheduler and the runner as the engine runs them, a step planned while one runs; prompts, then
        decode steps. Returns the decode line, and prompt tokens per second."""
        info = self.runtime.info
        limits = SchedulerLimits(
            info.vocab_size, info.max_model_len, info.max_num_seqs, info.max_step_tokens, False
        )
        scheduler = Scheduler(limits, BlockPool(info.num_blocks, info.block_size))
        for index in range(rows):
            prompt = [(index * 7919 + position * 31) % info.vocab_size for position in range(context)]
            sampling = SamplingParams(seed=index, temperature=0.8, top_p=0.9)
            scheduler.add(GenerateRequest(str(index), prompt, sampling, tokens))
        launched: deque[tuple[int, Callable[[], StepResult]]] = deque()
        began, steps, in_prompts = time.perf_counter(), [], 0.0
        last = began
        while scheduler.has_work or launched:
            plan = scheduler.plan()
            if plan:
                decoding = all(row.num_tokens == 1 for row in plan.rows)
                launched.append((len(plan.rows) * decoding, self.runtime.runner.launch(plan)))
            if len(launched) > (1 if plan else 0):
                decoding_rows, result = launched.popleft()
                scheduler.apply(result())
                now = time.perf_counter()
                if decoding_rows == rows:
                    steps.append(now - last)
                elif not steps:
                    in_prompts = now - began
                last = now
        seconds = statistics.median(steps[3:])
        return Line(f"engine, {rows} x {context}", seconds, rows, math.nan), rows * context / in_prompts

    def _batch(self, contexts: list[int], queries: list[int]) -> StepBatch:
        """Rows whose last tokens run, in blocks of their own that lie in no order."""
        info = self.runtime.info
        size = info.block_size
        needed = [-(-context // size) for context in contexts]
        if sum(needed) > info.num_blocks:
            sys.exit(f"the KV cache has {info.num_blocks} blocks and {sum(needed)} are needed")
        order = torch.randperm(info.num_blocks)[: sum(needed)].split(needed)
        table = torch.zeros(len(contexts), max(needed), dtype=torch.int64)
        for row, blocks in enumerate(order):
            table[row, : len(blocks)] = blocks
        rows = torch.repeat_interleave(torch.arange(len(contexts)), torch.tensor(queries))
        positions = torch.cat([torch.arange(c - q, c) for c, q in zip(contexts, queries, strict=True)])
        ends = torch.tensor(queries).cumsum(0)
        return StepBatch(
            ids_T=torch.randint(info.vocab_size, (len(rows),)),
            positions_T=positions,
            slots_T=table[rows, positions // size] * size + positions % size,
            query_starts_R1=torch.cat((torch.zeros(1, dtype=torch.int64), ends)),
            context_lens_R=torch.tensor(contexts),
            block_tables_RB=table,
            block_size=size,
            selected_S=ends - 1,
        )

    def _expert_tokens(self) -> torch.Tensor:
        return torch.tensor(list(self.runtime.runner.expert_tokens().values()))


def load(arguments: argparse.Namespace) -> tuple[Runtime, list[WeightSpec]]:
    """The model and what it consists of."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        raw = dict(MODELS[arguments.random_weights])
        if arguments.layers:
            raw["num_hidden_layers"] = arguments.layers
        (directory / "config.json").write_text(json.dumps(raw))
        architecture, config = read_config(directory)
        settings = Settings(
            device="cuda",
            random_weights=True,
            quantization=arguments.quantization,
            kv_dtype=arguments.kv_dtype,
            max_model_len=max(arguments.context * 2, arguments.prefill),
            max_num_seqs=max(arguments.batches),
            max_step_tokens=max(4096, arguments.prefill),
        )
        return build_runtime(settings, directory, own_process=True), list(architecture.weight_map(config))


def show(bench: Bench, lines: list[Line]) -> None:
    table = Table("run", "ms", "tokens/s", "roofline ms", "share", "")
    for line in lines:
        table.add_row(
            line.what,
            f"{line.seconds * 1e3:.2f}",
            f"{line.tokens / line.seconds:,.0f}",
            "" if math.isnan(line.floor) else f"{line.floor * 1e3:.2f}",
            "" if math.isnan(line.floor) else f"{line.floor / line.seconds:.0%}",
            line.note,
        )
    Console(width=120).print(table)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--random-weights", choices=sorted(MODELS), default="mixtral-8x7b")
    parser.add_argument("--quantization", default="none", choices=["none", "int8", "int4", "fp8"])
    parser.add_argument("--kv-dtype", default="auto", choices=["auto", "fp8"])
    parser.add_argument("--batches", type=_numbers, default=[1, 8, 64, 256])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--prefill", type=int, default=2048)
    parser.add_argument("--engine-rows", type=_numbers, default=[64])
    parser.add_argument("--layers", type=int, help="fewer than the model has, for a quick look")
    arguments = parser.parse_args()
    card = measure_card()
    print(card)
    began = time.perf_counter()
    runtime, specs = load(arguments)
    print(
        f"{arguments.random_weights}, {arguments.quantization}: ready in {time.perf_counter() - began:.1f} s"
    )
    bench = Bench(runtime, specs, card)
    lines = [bench.decode(rows, arguments.context) for rows in arguments.batches]
    lines.append(bench.prefill(arguments.prefill))
    for rows in arguments.engine_rows:
        gpu = bench.decode(rows, arguments.context + 16)
        line, prompts = bench.serve(rows, arguments.context, 32)
        outside = 1 - gpu.seconds / line.seconds
        note = f"{outside:.1%} outside the GPU's step; prompts at {prompts:,.0f} tokens/s"
        lines.append(Line(line.what, line.seconds, line.tokens, line.floor, note))
    show(bench, lines)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


if __name__ == "__main__":
    main()
