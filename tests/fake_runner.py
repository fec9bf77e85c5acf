"""A runner without a model that checks every plan: the fake of waist 2.

Its "KV cache" stores, per block and offset, which token at which position was written there. Before a
row runs, everything the row may attend to is looked up and compared with the sequence's own tokens, so
a stale, foreign or missing block fails at once. Its "model" is a hash of all tokens so far: the same
sequence gives the same tokens however it is cut into steps.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

from toptwo.messages import NewSequence, StepPlan, StepResult

VOCAB = 50


def next_token(token_ids: Sequence[int]) -> int:
    """What the fake model answers to a context."""
    return zlib.crc32(repr(list(token_ids)).encode()) % VOCAB


def generate(prompt_ids: Sequence[int], max_tokens: int, stop_token_ids: Sequence[int] = ()) -> list[int]:
    """What a request must get, whatever else the engine does."""
    tokens = list(prompt_ids)
    for _ in range(max_tokens):
        tokens.append(next_token(tokens))
        if tokens[-1] in stop_token_ids:
            break
    return tokens[len(prompt_ids) :]


class CheckingRunner:
    """Executes plans on token lists."""

    def __init__(self, num_slots: int, num_blocks: int, block_size: int, max_step_tokens: int) -> None:
        self.num_slots = num_slots
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.max_step_tokens = max_step_tokens
        self.overlaps = False
        self.steps = 0
        self.cache: dict[tuple[int, int], tuple[int, int]] = {}
        self.tokens: dict[int, list[int]] = {}
        self.tables: dict[int, list[int]] = {}

    def launch(self, plan: StepPlan) -> Callable[[], StepResult]:
        result = self.execute(plan)
        return lambda: result

    def execute(self, plan: StepPlan) -> StepResult:
        self.steps += 1
        assert plan.rows, "an empty plan"
        assert sum(row.num_tokens for row in plan.rows) <= self.max_step_tokens
        assert len({row.slot for row in plan.rows}) == len(plan.rows), "two rows in one slot"
        for new in plan.admitted:
            self._admit(new)
        results = []
        for row in plan.rows:
            assert row.num_tokens >= 1
            tokens, table = self.tokens[row.slot], self.tables[row.slot]
            table += row.new_block_ids
            end = row.start + row.num_tokens
            assert end <= len(tokens), "a row runs past the known tokens"
            assert len(table) * self.block_size >= end, "a row has no block to write to"
            assert all(0 <= block < self.num_blocks for block in table)
            for position in range(row.start):
                assert self.cache[self._place(table, position)] == (position, tokens[position])
            for position in range(row.start, end):
                self.cache[self._place(table, position)] = (position, tokens[position])
            assert row.sample == (end == len(tokens))
            token = next_token(tokens) if row.sample else -1
            if row.sample:
                tokens.append(token)
            results.append(token)
        return StepResult(plan.step, results)

    def expert_tokens(self) -> dict[int, list[int]]:
        return {0: [self.steps, 0]}

    def _admit(self, new: NewSequence) -> None:
        assert 0 <= new.slot < self.num_slots
        self.tokens[new.slot] = list(new.token_ids)
        self.tables[new.slot] = list(new.block_ids)

    def _place(self, table: list[int], position: int) -> tuple[int, int]:
        return table[position // self.block_size], position % self.block_size
