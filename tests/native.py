"""What tests of the native backend share: its instruction sets, weights, and steps over a paged cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from toptwo_kernels import cpu
from toptwo_kernels.cpu.linear import unpack
from toptwo_kernels.ops import HeadShape, Matrix, Rope, Routing, StepBatch, WeightFormat

torch.set_num_threads(1)  # a second pool of threads would fight the one under test

FORMATS: tuple[WeightFormat, ...] = get_args(WeightFormat)
BLOCK = 16


def has_avx2() -> bool:
    """By the system's word, not the extension's: kernels that were not built must be missed."""
    path = Path("/proc/cpuinfo")
    return path.exists() and " avx2 " in path.read_text()


# Kernels of this list that the extension lacks make tests fail, not skip.
INSTRUCTION_SETS = ["scalar", *(["avx2"] if has_avx2() else [])]


@cache
def backend(instruction_set: str, num_threads: int = 1) -> Any:
    return cpu.create(num_threads, instruction_set)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense(ops: Any, matrix: Matrix) -> Tensor:
    """The float64 weight [E, O, I] that a packed one stands for."""
    return unpack(ops.tape, matrix).double()


def random_routing(num_tokens: int, experts: list[int], top_k: int, seed: int = 0) -> Routing:
    """Distinct experts out of `experts` for every token, and weights that are no powers of two."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(num_tokens, len(experts), generator=generator).argsort(1)[:, :top_k]
    weights = 0.1 + torch.rand(num_tokens, top_k, generator=generator)
    return Routing(torch.tensor(experts)[order].contiguous(), weights)


@dataclass
class CachedSequence:
    """The q, k and v [L, (N + 2M) D] of a sequence, and which blocks of the cache are its own."""

    qkv_LX: Tensor
    blocks: list[int]
    num_done: int = 0
    outputs: list[Tensor] = field(default_factory=list)


class PagedAttention:
    """Sequences that attend step by step over one paged cache of scattered blocks, full of NaN at first."""

    def __init__(
        self,
        ops: Any,
        shape: HeadShape,
        lengths: list[int],
        rope: Rope,
        *,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        sharpness: float = 1.0,
    ) -> None:
        self.ops, self.shape, self.rope = ops, shape, rope
        self.scale = sharpness * shape.head_dim**-0.5
        counts = [-(-length // BLOCK) for length in lengths]
        order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(seed)).tolist()
        self.kv = ops.allocate_kv(sum(counts), BLOCK, shape, dtype)
        for part in self.kv:
            part.fill_(torch.nan)
        width = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
        self.sequences = []
        for index, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            self.sequences.append(CachedSequence(normal(length, width, seed=seed + index), order[:count]))
            order = order[count:]

    def step(self, rows: list[tuple[int, int]]) -> None:
        """Attend to the next tokens: pairs of a sequence's index and how many of its tokens."""
        batch, parts = self._batch(rows), []
        for index, count in rows:
            sequence = self.sequences[index]
            parts.append(sequence.qkv_LX[sequence.num_done : sequence.num_done + count])
            sequence.num_done += count
        qkv = torch.cat(parts)  # a copy, as it may be overwritten
        plan = self.ops.plan_step(batch)
        out = self.ops.attention(qkv, self.rope, self.kv, plan, self.shape, self.scale)
        for (index, count), part in zip(rows, out.split([count for _, count in rows]), strict=True):
            self.sequences[index].outputs.append(part)
            assert len(part) == count

    def result(self, index: int = 0) -> Tensor:
        return torch.cat(self.sequences[index].outputs)

    def _batch(self, rows: list[tuple[int, int]]) -> StepBatch:
        positions, slots, starts, contexts = [], [], [0], []
        for index, count in rows:
            sequence = self.sequences[index]
            for position in range(sequence.num_done, sequence.num_done + count):
                positions.append(position)
                slots.append(sequence.blocks[position // BLOCK] * BLOCK + position % BLOCK)
            starts.append(starts[-1] + count)
            contexts.append(sequence.num_done + count)
        widest = max(-(-context // BLOCK) for context in contexts)
        # Entries behind a context's last block mean nothing, and must not be followed.
        tables = torch.full((len(rows), widest), 1 << 40)
        for row, ((index, _), context) in enumerate(zip(rows, contexts, strict=True)):
            used = self.sequences[index].blocks[: -(-context // BLOCK)]
            tables[row, : len(used)] = torch.tensor(used)
            if not hasattr(self.ops, "tape"):
                tables[row, len(used) :] = 0  # the reference gathers before it masks
        return StepBatch(
            ids_T=torch.zeros(len(positions), dtype=torch.int64),
            positions_T=torch.tensor(positions),
            slots_T=torch.tensor(slots),
            query_starts_R1=torch.tensor(starts),
            context_lens_R=torch.tensor(contexts),
            block_tables_RB=tables,
            block_size=BLOCK,
            selected_S=torch.tensor(starts[1:]) - 1,
        )


def chunked(paged: PagedAttention, *sizes: int, index: int = 0) -> Tensor:
    """The output of one sequence in chunks of the given sizes; the last is repeated to the end."""
    length, done, step = len(paged.sequences[index].qkv_LX), 0, 0
    while done < length:
        size = min(sizes[min(step, len(sizes) - 1)], length - done)
        paged.step([(index, size)])
        done, step = done + size, step + 1
    return paged.result(index)
