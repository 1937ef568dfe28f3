"""The KV blocks of one group: reference counts, and a free list in eviction order.

A block is *used* (referenced by at least one sequence) or *free*. A free block is *blank*, or *cached*: published in
the prefix cache and kept until its space is needed. Blank blocks are handed out first, then cached ones in the order
of `eviction.py`. Nothing here knows tokens or sequences.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from setpoint.engine.eviction import EvictionOrder, Rank


class OutOfBlocksError(RuntimeError):
    """No free block. The scheduler asks `num_free` first, so a client never sees this."""


class BlockPool:
    """`on_evict(key)` is called when a published block loses its content to a new owner."""

    def __init__(self, num_blocks: int, on_evict: Callable[[bytes], None]) -> None:
        self.num_blocks = num_blocks
        self._on_evict = on_evict
        self._blank = list(range(num_blocks - 1, -1, -1))  # a stack: the warmest block first
        self._cached = EvictionOrder()
        self._refs = [0] * num_blocks
        self._keys: list[bytes | None] = [None] * num_blocks
        self._is_shared = bytearray(num_blocks)
        self._is_protected = bytearray(num_blocks)

    @property
    def num_free(self) -> int:
        """Blocks that `acquire` can still hand out, cached ones included."""
        return len(self._blank) + len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    def is_free(self, block: int) -> bool:
        return self._refs[block] == 0

    def acquire(self) -> int:
        """A block with one reference and no content; evicts a cached block when none is blank."""
        if self._blank:
            block = self._blank.pop()
        elif self._cached:
            block = self._cached.pop()
            self._forget(block)
        else:
            raise OutOfBlocksError("no free KV block")
        self._refs[block] = 1
        return block

    def retain(self, block: int) -> None:
        """One more reference to a used or cached block."""
        if self._refs[block] == 0:
            self._cached.remove(block)  # KeyError: a blank block has no content to share
        self._refs[block] += 1

    def release(self, block: int) -> None:
        """Drop one reference. At zero the block is free: cached if it was published, else blank."""
        if self._refs[block] <= 0:
            raise RuntimeError("KV block released twice")
        self._refs[block] -= 1
        if self._refs[block] == 0:
            if self._keys[block] is None:
                self._blank.append(block)
            else:
                self._cached.push(block, self._rank(block))

    def publish(self, block: int, key: bytes) -> None:
        """The content of a used block is now findable under `key`."""
        if self._refs[block] <= 0 or self._keys[block] is not None:
            raise RuntimeError("only a used, unpublished KV block can be published")
        self._keys[block] = key

    def published(self) -> dict[int, bytes]:
        """Block id -> key of every findable block."""
        return {block: key for block, key in enumerate(self._keys) if key is not None}

    def evict_cached(self) -> None:
        """Blank every free block; used ones lose nothing until they are released."""
        for block in list(self._cached):
            self._cached.remove(block)
            self._forget(block)
            self._blank.append(block)

    def is_protected(self, block: int) -> bool:
        return bool(self._is_protected[block])

    def protect(self, block: int, is_protected: bool) -> None:
        """Let a published block be evicted after all others, or no longer."""
        self._is_protected[block] = is_protected
        self._rerank(block)

    def share(self, block: int) -> None:
        """Different prompts went on from this published block."""
        self._is_shared[block] = True
        self._rerank(block)

    def _rank(self, block: int) -> Rank:
        if self._is_protected[block]:
            return Rank.PROTECTED
        return Rank.SHARED if self._is_shared[block] else Rank.PLAIN

    def _rerank(self, block: int) -> None:
        if block in self._cached:
            self._cached.rerank(block, self._rank(block))

    def _forget(self, block: int) -> None:
        key = self._keys[block]
        self._keys[block] = None
        self._is_shared[block] = self._is_protected[block] = False
        if key is not None:
            self._on_evict(key)

    def check_integrity(self, references: Iterable[int]) -> None:
        """Raise AssertionError unless counts equal `references`, the block ids reachable from sequences."""
        reachable = Counter(references)
        free = [*self._blank, *self._cached]
        if len(set(free)) != len(free):
            raise AssertionError("a block is in the free list twice")
        for block in range(self.num_blocks):
            if self._refs[block] != reachable[block]:
                raise AssertionError(f"block {block}: {self._refs[block]} counted, {reachable[block]} reachable")
        if {block for block in range(self.num_blocks) if self._refs[block] == 0} != set(free):
            raise AssertionError("free blocks are not exactly the unreferenced ones")
        if any((self._keys[block] is None) for block in self._cached):
            raise AssertionError("a cached block has no key")
        if any((self._keys[block] is not None) for block in self._blank):
            raise AssertionError("a blank block has a key")
        if any(self._rank(block) is not Rank.PLAIN for block in self._blank):
            raise AssertionError("a blank block is protected or shared")
