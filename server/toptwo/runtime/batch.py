"""From a StepPlan to the tensors of a step.

`SlotTable` remembers, per running sequence, what plans do not repeat: its tokens, its block table
and its sampling parameters. `build_batch` is the only place that turns slots into token rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from toptwo.messages import LogprobsWanted, NewSequence, Row, SamplingParams, StepPlan
from toptwo_kernels.ops import StepBatch


@dataclass(frozen=True, eq=False)
class Draw:
    """A token that was drawn for a slot: tokens_R[at], which may still be on its way to the host.

    admission: which of the sequences that had the slot it is for.
    """

    admission: int
    tokens_R: torch.Tensor
    at: int


class SlotTable:
    """State of the sequences that hold a slot, as arrays over slots."""

    def __init__(self, num_slots: int, max_len: int, block_size: int) -> None:
        self.block_size = block_size
        self.tokens = np.zeros((num_slots, max_len), np.int64)
        self.blocks = np.zeros((num_slots, -(-max_len // block_size)), np.int64)
        self.num_blocks = [0] * num_slots
        self.num_prompt_tokens = [0] * num_slots
        self.sampling: list[SamplingParams] = [SamplingParams(seed=0)] * num_slots
        self.stop_token_ids: list[list[int]] = [[]] * num_slots
        self.logprobs: list[LogprobsWanted] = [LogprobsWanted()] * num_slots
        self.draws: list[Draw | None] = [None] * num_slots  # the last one, until the host knows its token
        self._admissions = [0] * num_slots

    def admit(self, new: NewSequence) -> None:
        """Fill a slot; whatever it held before is gone."""
        self.tokens[new.slot, : len(new.token_ids)] = new.token_ids
        self.num_blocks[new.slot] = 0
        self.append_blocks(new.slot, new.block_ids)
        self.num_prompt_tokens[new.slot] = new.num_prompt_tokens
        self.sampling[new.slot] = new.sampling
        self.stop_token_ids[new.slot] = new.stop_token_ids
        self.logprobs[new.slot] = new.logprobs
        self.draws[new.slot] = None
        self._admissions[new.slot] += 1

    def begin_draw(self, slot: int, tokens_R: torch.Tensor, at: int) -> Draw:
        """The slot's next token is `tokens_R[at]`."""
        draw = self.draws[slot] = Draw(self._admissions[slot], tokens_R, at)
        return draw

    def end_draw(self, slot: int, draw: Draw) -> bool:
        """The host knows the token now. Whether the slot is still that of the sequence that it is for."""
        if self.draws[slot] is draw:
            self.draws[slot] = None
        return draw.admission == self._admissions[slot]

    def append_blocks(self, slot: int, block_ids: list[int]) -> None:
        count = self.num_blocks[slot]
        self.blocks[slot, count : count + len(block_ids)] = block_ids
        self.num_blocks[slot] = count + len(block_ids)


@dataclass(frozen=True)
class Selection:
    """Where the logits of a row are: `count` of the selected tokens from `first` on, the row's last ones."""

    index: int  # of the row in the plan
    row: Row
    first: int
    count: int

    @property
    def last(self) -> int:
        """The selected token behind which a row that samples draws."""
        return self.first + self.count - 1


@dataclass(frozen=True)
class Batch:
    """One step's inputs, and the rows whose logits are wanted, in the order of the selected tokens."""

    tokens: StepBatch
    selections: list[Selection]


def build_batch(plan: StepPlan, table: SlotTable) -> Batch:
    """Rows in the plan's order, their tokens one after the other."""
    for row in plan.rows:
        table.append_blocks(row.slot, row.new_block_ids)
    lengths = np.array([row.num_tokens for row in plan.rows])
    starts = np.array([row.start for row in plan.rows])
    slot_of_row = np.array([row.slot for row in plan.rows])
    query_starts = np.concatenate(([0], lengths.cumsum()))

    row_of_token = np.repeat(np.arange(len(plan.rows)), lengths)
    slot_of_token = slot_of_row[row_of_token]
    positions = np.arange(query_starts[-1]) - query_starts[row_of_token] + starts[row_of_token]
    blocks = table.blocks[slot_of_token, positions // table.block_size]
    cache_slots = blocks * table.block_size + positions % table.block_size

    context_lens = starts + lengths
    widest = -(-int(context_lens.max()) // table.block_size)
    selections = _select(plan.rows)
    # The last `count` tokens of each selected row.
    selected = [np.arange(query_starts[s.index + 1] - s.count, query_starts[s.index + 1]) for s in selections]
    ids = table.tokens[slot_of_token, positions]
    drawn_R = None
    for first, slot in zip(query_starts, slot_of_row, strict=False):
        if draw := table.draws[slot]:
            ids[first], drawn_R = -1 - draw.at, draw.tokens_R
    tokens = StepBatch(
        ids_T=torch.from_numpy(ids),
        positions_T=torch.from_numpy(positions),
        slots_T=torch.from_numpy(cache_slots),
        query_starts_R1=torch.from_numpy(query_starts),
        context_lens_R=torch.from_numpy(context_lens),
        block_tables_RB=torch.from_numpy(table.blocks[slot_of_row, :widest]),
        block_size=table.block_size,
        selected_S=torch.from_numpy(np.concatenate(selected) if selected else np.zeros(0, np.int64)),
        drawn_R=drawn_R,
    )
    return Batch(tokens, selections)


def _select(rows: list[Row]) -> list[Selection]:
    """A row that scores shows the logits of all its tokens, one that only samples those of its last."""
    selections, first = [], 0
    for index, row in enumerate(rows):
        if row.sample or row.score:
            count = row.num_tokens if row.score else 1
            selections.append(Selection(index, row, first, count))
            first += count
    return selections
