"""What tests of the native backend share: its instruction sets, weights, and steps over a paged cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toptwo_kernels import cpu
from toptwo_kernels.cpu.linear import unpack
from toptwo_kernels.cpu.native import FORMATS as NATIVE_FORMATS
from toptwo_kernels.ops import (
    AttentionSpec,
    HeadShape,
    LatentSpec,
    Matrix,
    Rope,
    Routing,
    StepBatch,
    WeightFormat,
)

torch.set_num_threads(1)  # a second pool of threads would fight the one under test

FORMATS: tuple[WeightFormat, ...] = tuple(NATIVE_FORMATS)
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


def rope_tables(length: int, dim: int, theta: float = 10_000.0) -> Rope:
    """cos and sin of position * theta^(-2i/dim)."""
    inverse = theta ** -(torch.arange(0, dim, 2).double() / dim)
    angles = torch.outer(torch.arange(length).double(), inverse)
    return Rope(angles.cos().float(), angles.sin().float())


def heads_spec(shape: HeadShape, sharpness: float = 1.0, **features: Any) -> AttentionSpec:
    """The usual scale, times `sharpness`; features: what else an AttentionSpec has."""
    return AttentionSpec(shape, sharpness * shape.head_dim**-0.5, **features)


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
    """What attention is given of a sequence, and which blocks of the cache are its own."""

    inputs_LX: Tensor
    blocks: list[int]
    num_done: int = 0
    outputs: list[Tensor] = field(default_factory=list)


class PagedAttention:
    """Sequences that attend step by step over one paged cache of scattered blocks, full of NaN at first.

    A row of the inputs is q, k and v [(N + 2M) D], or q and the latent vector with its key [(N + 1) (C + R)].
    """

    def __init__(
        self,
        ops: Any,
        spec: AttentionSpec | LatentSpec,
        lengths: list[int],
        rope: Rope,
        *,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        self.ops, self.spec, self.rope = ops, spec, rope
        shape = spec.shape
        counts = [-(-length // BLOCK) for length in lengths]
        order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(seed)).tolist()
        self.kv = ops.allocate_kv(sum(counts), BLOCK, shape, dtype)
        for part in self.kv:
            part.fill_(torch.nan)
        if isinstance(shape, HeadShape):
            width = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
        else:
            width = (shape.num_heads + 1) * shape.kv_size
        self.sequences = []
        for index, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            self.sequences.append(CachedSequence(normal(length, width, seed=seed + index), order[:count]))
            order = order[count:]

    def step(self, rows: list[tuple[int, int]]) -> None:
        """Attend to the next tokens: pairs of a sequence's index and how many of its tokens."""
        batch, parts = self._batch(rows), []
        for index, count in rows:
            sequence = self.sequences[index]
            parts.append(sequence.inputs_LX[sequence.num_done : sequence.num_done + count])
            sequence.num_done += count
        out = self._attend(torch.cat(parts), self.ops.plan_step(batch))  # a copy, as it may be overwritten
        for (index, count), part in zip(rows, out.split([count for _, count in rows]), strict=True):
            self.sequences[index].outputs.append(part)
            assert len(part) == count

    def _attend(self, inputs: Tensor, plan: object) -> Tensor:
        spec = self.spec
        if isinstance(spec, AttentionSpec):
            attended: Tensor = self.ops.attention(inputs, self.rope, self.kv, plan, spec)
            return attended
        q, latents = inputs.split((spec.shape.num_heads * spec.shape.kv_size, spec.shape.kv_size), 1)
        given = q.contiguous(), latents.contiguous(), self.rope, self.kv, plan, spec
        latent: Tensor = self.ops.latent_attention(*given)
        return latent

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
    length, done, step = len(paged.sequences[index].inputs_LX), 0, 0
    while done < length:
        size = min(sizes[min(step, len(sizes) - 1)], length - done)
        paged.step([(index, size)])
        done, step = done + size, step + 1
    return paged.result(index)
