"""KV blocks: who holds which, which are free, and which free ones still hold a reusable prefix.

Knows block ids, reference counts and content hashes; must not know requests, tensors or tokens'
meaning. A block is either referenced (by one or more sequences that share a prefix) or free. A free
block keeps its content until it is handed out again, least recently used first.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence


def root_hash(scope: str) -> bytes:
    """The parent hash of a sequence's first block: sequences share blocks only within a scope."""
    return hashlib.sha256(b"toptwo prefix cache\0" + scope.encode()).digest()


def hash_block(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Content hash of a full block: SHA-256 over its parent's hash and its tokens.

    Cryptographic, because a collision would hand one caller another caller's KV.
    """
    return hashlib.sha256(parent + array("q", token_ids).tobytes()).digest()


class BlockPool:
    """A fixed number of equal KV blocks with reference counts and a prefix cache."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._references = [0] * num_blocks
        self._free = OrderedDict.fromkeys(range(num_blocks))  # next to be handed out first
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def find_prefix(self, hashes: Iterable[bytes]) -> list[int]:
        """Blocks that hold the longest cached prefix of a chain of block hashes."""
        found = []
        for block_hash in hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            found.append(block)
        return found

    def count_free(self, blocks: Iterable[int]) -> int:
        """How many of the given blocks are free, and would leave the free list if shared."""
        return sum(self._references[block] == 0 for block in blocks)

    def share(self, blocks: Iterable[int]) -> None:
        """Take one more reference to each block."""
        for block in blocks:
            self._references[block] += 1
            self._free.pop(block, None)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks; what they cached is forgotten. The caller checks `num_free`."""
        if count > len(self._free):
            raise ValueError(f"{count} blocks wanted, {len(self._free)} free")
        taken = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            self._forget(block)
            self._references[block] = 1
            taken.append(block)
        return taken

    def release(self, blocks: Sequence[int]) -> None:
        """Give back one reference to each block of a sequence, given in sequence order."""
        # Last block first: a prefix's tail is reused first, its more widely shared head last.
        for block in reversed(blocks):
            if self._references[block] <= 0:
                raise ValueError(f"block {block} is released but not held")
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                # Without content worth keeping it goes to the front, before any cached block.
                self._free.move_to_end(block, last=self._hash_of[block] is not None)

    def register(self, block: int, block_hash: bytes) -> None:
        """Make a full, computed block findable by its content hash; the first one of a hash stays."""
        if self._hash_of[block] is None and block_hash not in self._block_of:
            self._hash_of[block] = block_hash
            self._block_of[block_hash] = block

    def _forget(self, block: int) -> None:
        block_hash = self._hash_of[block]
        if block_hash is not None:
            del self._block_of[block_hash]
            self._hash_of[block] = None
