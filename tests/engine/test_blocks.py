"""The block pool as a state machine: references, free list and prefix cache never disagree."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from toptwo.engine.blocks import BlockPool, hash_block, root_hash

NUM_BLOCKS = 8


class PoolMachine(RuleBasedStateMachine):
    """Holders allocate, share and release; a model of plain dicts says what must be true."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, 4)
        self.holders: list[list[int]] = []
        self.content: dict[bytes, int] = {}
        self.serial = 0

    @rule(count=st.integers(0, 4))
    def allocate(self, count: int) -> None:
        if count > self.pool.num_free:
            with pytest.raises(ValueError, match="free"):
                self.pool.allocate(count)
            return
        blocks = self.pool.allocate(count)
        assert len(set(blocks)) == count
        assert not set(blocks) & {block for holder in self.holders for block in holder}
        self.content = {key: block for key, block in self.content.items() if block not in blocks}
        self.holders.append(blocks)

    @precondition(lambda self: any(self.holders))
    @rule(data=st.data())
    def register(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from([b for holder in self.holders for b in holder]))
        self.serial += 1
        key = hash_block(root_hash(""), [self.serial])
        self.pool.register(block, key)
        if block not in self.content.values():
            self.content[key] = block

    @precondition(lambda self: self.content)
    @rule(data=st.data())
    def share_cached(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.content)))
        found = self.pool.find_prefix([key])
        assert found == [self.content[key]]
        self.pool.share(found)
        self.holders.append(found)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.pool.release(self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1))))

    @invariant()
    def free_and_held_add_up(self) -> None:
        held = {block for holder in self.holders for block in holder}
        assert self.pool.num_free == NUM_BLOCKS - len(held)

    @invariant()
    def what_is_cached_is_found(self) -> None:
        for key, block in self.content.items():
            assert self.pool.find_prefix([key]) == [block]


PoolMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase


def test_uncached_blocks_are_handed_out_before_cached_ones_and_those_oldest_first() -> None:
    pool = BlockPool(4, 4)
    a, b, c, d = pool.allocate(4)
    for block, name in ((a, b"a"), (c, b"c")):
        pool.register(block, name)
    for block in (a, b, c, d):
        pool.release([block])
    assert set(pool.allocate(2)) == {b, d}
    assert pool.allocate(2) == [a, c]


def test_the_hash_depends_on_scope_parent_and_tokens() -> None:
    chains = {
        hash_block(hash_block(root_hash(scope), first), second)
        for scope in ("", "k")
        for first in ([1, 2], [2, 1])
        for second in ([3, 4], [34])
    }
    assert len(chains) == 8


def test_releasing_what_is_not_held_is_an_error() -> None:
    pool = BlockPool(2, 4)
    with pytest.raises(ValueError, match="not held"):
        pool.release([0])
