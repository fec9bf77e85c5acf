"""Sequences that attend step by step over the CUDA backend's paged cache, and what they should get."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from toptwo_kernels.ops import AttentionSpec, HeadShape, LatentSpec, Rope, StepBatch

if TYPE_CHECKING:
    from toptwo_kernels.cuda.device import Device

BLOCK = 16
THETA = 10_000.0

Spec = AttentionSpec | LatentSpec
Rows = list[tuple[int, int]]
"""Pairs of a sequence's index and how many of its tokens are attended to in a step."""

# Prompts, chunks, decoding, all in company.
_STEPS: list[Rows] = [
    [(0, 66)],
    [(1, 7), (0, 17), (2, 64)],
    [(2, 1), (0, 1), (1, 1)],
    [(2, 7), (0, 1), (1, 12)],
    [(2, 1), (0, 1), (1, 1)],
    [(0, 20)],
    [(2, 1)],
]
_TIMES_ON_A_CARD = 9


@pytest.fixture
def short_splits(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes its time: there, short contexts have several splits."""
    if device.interpreted:
        for module in ("plan", "attention"):
            monkeypatch.setattr(f"toptwo_kernels.cuda.{module}.SPLIT", 64)


def steps(device: Device) -> list[Rows]:
    """Of three sequences; longer ones on a card."""
    times = 1 if device.interpreted else _TIMES_ON_A_CARD
    return [[(index, count * times if count > 1 else 1) for index, count in rows] for rows in _STEPS]


def lengths(device: Device) -> list[int]:
    """Of the sequences of `steps`, a little more than they attend to."""
    totals = [0, 0, 0]
    for rows in steps(device):
        for index, count in rows:
            totals[index] += count
    return [total + 5 for total in totals]


def rope_tables(length: int, dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2i/dim), in float64."""
    angles = torch.outer(torch.arange(length).double(), THETA ** -(torch.arange(0, dim, 2).double() / dim))
    return angles.cos(), angles.sin()


@dataclass
class Sequence:
    """inputs_LX: q, k and v of each token, or q and the latent vector with its key."""

    inputs_LX: Tensor
    blocks: list[int]
    num_done: int = 0
    outputs: list[Tensor] = field(default_factory=list)

    def result(self) -> Tensor:
        return torch.cat(self.outputs)


class Paged:
    """Sequences over scattered blocks of a cache that is full of NaN at first.

    turned: how many dimensions turn; by default all that may. inputs: of an earlier one, to attend again.
    """

    def __init__(
        self,
        device: Device,
        normal: Callable[..., Tensor],
        spec: Spec,
        lengths: list[int],
        *,
        dtype: torch.dtype = torch.float32,
        kv_dtype: torch.dtype | None = None,
        turned: int | None = None,
        inputs: list[Tensor] | None = None,
    ) -> None:
        from toptwo_kernels.cuda.kv_cache import allocate_kv

        shape = spec.shape
        self.device, self.spec, self.kv_dtype = device, spec, kv_dtype or dtype
        heads = isinstance(shape, HeadShape)
        self.turned = turned or (shape.head_dim if heads else shape.rope_dim)
        cos, sin = (table.float().to(device.torch_device) for table in rope_tables(max(lengths), self.turned))
        self.rope = Rope(cos, sin)
        if heads:
            width = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
        else:
            width = (shape.num_heads + 1) * shape.kv_size
        counts = [-(-length // BLOCK) for length in lengths]
        order = torch.randperm(sum(counts)).tolist()
        self.kv = allocate_kv(device, sum(counts), BLOCK, shape, self.kv_dtype)
        for part in self.kv:
            part.view(torch.uint8).fill_(0xFF)  # NaN in every format
        self.sequences = []
        for index, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            given = inputs[index] if inputs else normal(length, width, dtype=dtype)
            self.sequences.append(Sequence(given, order[:count]))
            order = order[count:]

    @property
    def inputs(self) -> list[Tensor]:
        return [sequence.inputs_LX for sequence in self.sequences]

    def step(self, rows: Rows, room: int = 0) -> Tensor:
        """Attend to the next tokens.

        room: rows of a static plan whose padding the step is filled up with. Returns the padding's results.
        """
        from toptwo_kernels.cuda.plan import StaticPlan, plan_step

        batch, parts = self.batch(rows), []
        for index, count in rows:
            sequence = self.sequences[index]
            parts.append(sequence.inputs_LX[sequence.num_done : sequence.num_done + count])
            sequence.num_done += count
        plan = plan_step(self.device, batch)
        if room:
            static = StaticPlan(self.device, room, batch.block_tables_RB.shape[1] + 3, BLOCK)
            static.fill(batch)
            plan = static.plan
            parts.append(torch.full_like(parts[0], torch.nan).expand(room - len(rows), -1))
        sizes = [count for _, count in rows]
        results = self._attend(torch.cat(parts), plan).split([*sizes, room - len(rows) if room else 0])
        for (index, _), part in zip(rows, results[:-1], strict=True):
            self.sequences[index].outputs.append(part)
        return results[-1]

    def _attend(self, inputs: Tensor, plan: object) -> Tensor:
        from toptwo_kernels.cuda.attention import attention
        from toptwo_kernels.cuda.latent_attention import latent_attention

        spec = self.spec
        if isinstance(spec, AttentionSpec):
            return attention(self.device, inputs, self.rope, self.kv, plan, spec)
        q, latents = inputs.split((spec.shape.num_heads * spec.shape.kv_size, spec.shape.kv_size), 1)
        given = q.contiguous(), latents.contiguous(), self.rope, self.kv, plan, spec
        return latent_attention(self.device, *given)

    def batch(self, rows: Rows) -> StepBatch:
        positions, slots, starts, contexts = [], [], [0], []
        for index, count in rows:
            sequence = self.sequences[index]
            for position in range(sequence.num_done, sequence.num_done + count):
                positions.append(position)
                slots.append(sequence.blocks[position // BLOCK] * BLOCK + position % BLOCK)
            starts.append(starts[-1] + count)
            contexts.append(sequence.num_done + count)
        # Entries behind a context's last block mean nothing, and must not be followed.
        tables = torch.full((len(rows), -(-max(contexts) // BLOCK)), 1 << 30)
        for row, ((index, _), context) in enumerate(zip(rows, contexts, strict=True)):
            used = self.sequences[index].blocks[: -(-context // BLOCK)]
            tables[row, : len(used)] = torch.tensor(used)
        return StepBatch(
            ids_T=torch.arange(len(positions)) + 5,
            positions_T=torch.tensor(positions),
            slots_T=torch.tensor(slots),
            query_starts_R1=torch.tensor(starts),
            context_lens_R=torch.tensor(contexts),
            block_tables_RB=tables,
            block_size=BLOCK,
            selected_S=torch.tensor(starts[1:]) - 1,
        )

    def expected(self, index: int) -> Tensor:
        """By the definition, in float64, of queries and keys that are rounded as they are kept."""
        sequence, spec = self.sequences[index], self.spec
        inputs_LX = sequence.inputs_LX[: sequence.num_done].cpu()
        if isinstance(spec, AttentionSpec):
            shape = spec.shape
            counts = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
            q, k, v = inputs_LX.unflatten(1, (-1, shape.head_dim)).split(counts, 1)
            q, k = self._turn(q, 0), self._turn(k, 0)
        else:
            heads = self._turn(inputs_LX.unflatten(1, (-1, spec.shape.kv_size)), spec.shape.latent_dim)
            q, k = heads[:, :-1], heads[:, -1:]
            v = k[..., : spec.shape.latent_dim]
        k, v = k.to(self.kv_dtype), v.to(self.kv_dtype)
        return define(q.double(), k.double(), v.double(), spec)

    def _turn(self, x_LND: Tensor, start: int) -> Tensor:
        cos, sin = (table[:, None] for table in rope_tables(len(x_LND), self.turned))
        half = self.turned // 2
        turned = x_LND.double()
        a, b = turned[..., start : start + half].clone(), turned[..., start + half : start + 2 * half].clone()
        turned[..., start : start + half] = a * cos - b * sin
        turned[..., start + half : start + 2 * half] = b * cos + a * sin
        return turned.to(x_LND.dtype)


def define(q_LND: Tensor, k_LMD: Tensor, v_LMD: Tensor, spec: Spec) -> Tensor:
    """Causal attention of every token of a sequence, [L, N * D]."""
    length, num_heads, _ = q_LND.shape
    k_LND, v_LND = (t.repeat_interleave(num_heads // t.shape[1], 1) for t in (k_LMD, v_LMD))
    scores_NQL = torch.einsum("qnd,lnd->nql", q_LND, k_LND) * spec.scale
    back = torch.arange(length)[:, None] - torch.arange(length)
    visible, sinks_N = back >= 0, None
    if isinstance(spec, AttentionSpec):
        sinks_N = spec.sinks_N
        if spec.soft_cap is not None:
            scores_NQL = spec.soft_cap * (scores_NQL / spec.soft_cap).tanh()
        if spec.window is not None:
            visible &= back < spec.window
    scores_NQL = scores_NQL.masked_fill(~visible, -torch.inf)
    if sinks_N is not None:
        sinks = sinks_N.cpu().double()[:, None, None].expand(-1, length, 1)
        scores_NQL = torch.cat((scores_NQL, sinks), -1)
    weights_NQL = scores_NQL.softmax(-1)[..., :length]
    return torch.einsum("nql,lnd->qnd", weights_NQL, v_LND).flatten(1)
