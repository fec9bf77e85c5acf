"""Decode steps as CUDA graphs, everything else op by op.

A graph has fixed sizes. A step in which every row computes one token is filled up with padding rows to the
next size of a short list, and its integers are copied to where the graph reads them; the graph is captured
when its size is first needed. What a step's work depends on beyond its size (how long contexts are, which
experts are chosen) kernels read on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from toptwo_kernels.cuda.device import Device
from toptwo_kernels.cuda.plan import Plan, StaticPlan, plan_step
from toptwo_kernels.ops import StepBatch

Forward = Callable[[object], Tensor]

LARGEST = 512  # rows; a larger step computes so much that launches do not show
_STEP_ROWS = 8  # sizes beyond 8 are multiples of it
_SMALLEST_TABLE = 64  # KV blocks per row


@dataclass(frozen=True)
class GraphSize:
    """rows: of a step, padding included. blocks: most KV blocks of a row."""

    rows: int
    blocks: int

    @classmethod
    def fitting(cls, batch: StepBatch) -> GraphSize:
        """The smallest size on the list for a decode step."""
        rows, blocks = len(batch.context_lens_R), batch.block_tables_RB.shape[1]
        rows = _next_power(rows) if rows <= _STEP_ROWS else -(-rows // _STEP_ROWS) * _STEP_ROWS
        return cls(rows, max(_SMALLEST_TABLE, _next_power(blocks)))


@dataclass(frozen=True)
class _Graph:
    """A captured step: what it reads, how it is replayed, what it writes."""

    plan: StaticPlan
    graph: torch.cuda.CUDAGraph
    logits_RV: Tensor


class Recording:
    """A model's forward pass, by graph where that is possible.

    Under the interpreter there are no graphs: decode steps run padded all the same, so that what a graph
    would read is what is tested.
    """

    def __init__(self, device: Device, forward: Forward) -> None:
        self._device = device
        self._forward = forward
        self._graphs: dict[GraphSize, _Graph] = {}
        self._pool: Any = None

    def __call__(self, batch: StepBatch) -> Tensor:
        """The float32 logits [S, V] of the step's selected tokens; valid until the next step."""
        rows = len(batch.context_lens_R)
        if not _is_decoding(batch) or rows > LARGEST:
            whole = cast(Plan, plan_step(self._device, batch))
            _insert_draws(whole, batch)
            return self._forward(whole).float()
        size = GraphSize.fitting(batch)
        if self._device.interpreted:
            plan = StaticPlan(self._device, size.rows, size.blocks, batch.block_size)
            _fill(plan, batch)
            return self._run_padded(plan)[:rows]
        graph = self._graphs.get(size) or self._capture(size, batch.block_size)
        _fill(graph.plan, batch)
        graph.graph.replay()
        return graph.logits_RV[:rows]

    def _capture(self, size: GraphSize, block_size: int) -> _Graph:
        plan = StaticPlan(self._device, size.rows, size.blocks, block_size)
        self._run_padded(plan)  # kernels are compiled, which a capture could not bear
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits_RV = self._run_padded(plan)
        self._pool = self._pool or graph.pool()
        self._graphs[size] = _Graph(plan, graph, logits_RV)
        return self._graphs[size]

    def _run_padded(self, plan: StaticPlan) -> Tensor:
        self._device.num_live = plan.num_live
        try:
            return self._forward(plan.plan).float()
        finally:
            self._device.num_live = None


def record(device: Device, forward: Forward, max_tokens: int) -> Recording:
    """`forward`, which is given a plan, for steps of at most `max_tokens` tokens."""
    return Recording(device, forward)


def _fill(plan: StaticPlan, batch: StepBatch) -> None:
    plan.fill(batch)
    _insert_draws(plan.plan, batch)


def _insert_draws(plan: Plan, batch: StepBatch) -> None:
    """Put in the ids that only the device knows; a draw that failed is -1, and its row computes anything."""
    if batch.drawn_R is not None:
        ids_T = plan.ids_T
        drawn_T = batch.drawn_R[(-1 - ids_T).clamp(min=0)].clamp(min=0).to(ids_T.dtype)
        ids_T.copy_(torch.where(ids_T < 0, drawn_T, ids_T))


def _is_decoding(batch: StepBatch) -> bool:
    """Whether every row computes one token and shows its logits."""
    return len(batch.ids_T) == len(batch.context_lens_R) == len(batch.selected_S)


def _next_power(number: int) -> int:
    return 1 << (number - 1).bit_length()
