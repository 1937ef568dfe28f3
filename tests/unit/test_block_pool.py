"""The block pool: counts, eviction order, and that misuse is an error, never corruption."""

from __future__ import annotations

import pytest
from engine_support import scaled
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from setpoint.engine.block_pool import BlockPool, OutOfBlocksError


def pool_of(num_blocks: int) -> tuple[BlockPool, list[bytes]]:
    evicted: list[bytes] = []
    return BlockPool(num_blocks, evicted.append), evicted


def test_released_blocks_come_back_and_an_empty_pool_says_so() -> None:
    pool, _ = pool_of(2)
    first, second = pool.acquire(), pool.acquire()
    assert {first, second} == {0, 1}
    with pytest.raises(OutOfBlocksError):
        pool.acquire()
    pool.release(first)
    assert pool.acquire() == first


def test_blank_blocks_go_first_then_the_least_recently_used_cached_ones() -> None:
    pool, evicted = pool_of(4)
    blocks = [pool.acquire() for _ in range(4)]
    for block in blocks[:3]:
        pool.publish(block, b"key%d" % block)
    for block in (blocks[1], blocks[3], blocks[0], blocks[2]):
        pool.release(block)
    pool.retain(blocks[1])  # used again: now the most recent
    pool.release(blocks[1])
    assert [pool.acquire() for _ in range(4)] == [blocks[3], blocks[0], blocks[2], blocks[1]]
    assert evicted == [b"key%d" % block for block in (blocks[0], blocks[2], blocks[1])]


def test_a_retained_cached_block_is_not_evicted() -> None:
    pool, evicted = pool_of(1)
    block = pool.acquire()
    pool.publish(block, b"key")
    pool.release(block)
    pool.retain(block)
    with pytest.raises(OutOfBlocksError):
        pool.acquire()
    assert not evicted


def test_misuse_raises() -> None:
    pool, _ = pool_of(2)
    block = pool.acquire()
    pool.release(block)
    with pytest.raises(RuntimeError, match="twice"):
        pool.release(block)
    with pytest.raises(KeyError):
        pool.retain(block)  # blank: nothing to share
    with pytest.raises(RuntimeError, match="publish"):
        pool.publish(block, b"key")
    block = pool.acquire()
    pool.publish(block, b"key")
    with pytest.raises(RuntimeError, match="publish"):
        pool.publish(block, b"other")


def test_integrity_check_sees_a_wrong_count() -> None:
    pool, _ = pool_of(2)
    block = pool.acquire()
    pool.check_integrity([block])
    with pytest.raises(AssertionError, match="counted"):
        pool.check_integrity([])
    with pytest.raises(AssertionError, match="counted"):
        pool.check_integrity([block, block])


def test_evict_cached_blanks_the_free_ones_only() -> None:
    pool, evicted = pool_of(2)
    used, free = pool.acquire(), pool.acquire()
    pool.publish(used, b"used")
    pool.publish(free, b"free")
    pool.release(free)
    pool.evict_cached()
    assert evicted == [b"free"]
    assert pool.num_cached == 0
    pool.check_integrity([used])


class PoolMachine(RuleBasedStateMachine):
    """Random legal use of eight blocks; the model is the list of references we hold."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: dict[bytes, int] = {}
        self.pool = BlockPool(8, lambda key: self.keys.pop(key) and None)
        self.held: list[int] = []
        self.count = 0

    @precondition(lambda self: self.pool.num_free > 0)
    @rule()
    def acquire(self) -> None:
        block = self.pool.acquire()
        assert block not in self.held
        assert block not in self.keys.values()
        self.held.append(block)

    @precondition(lambda self: self.held)
    @rule(pick=st.integers(0, 1 << 30))
    def release(self, pick: int) -> None:
        self.pool.release(self.held.pop(pick % len(self.held)))

    @precondition(lambda self: self.held)
    @rule(pick=st.integers(0, 1 << 30))
    def publish(self, pick: int) -> None:
        block = self.held[pick % len(self.held)]
        if block not in self.keys.values():
            self.count += 1
            key = b"%d" % self.count
            self.keys[key] = block
            self.pool.publish(block, key)

    @precondition(lambda self: self.keys)
    @rule(pick=st.integers(0, 1 << 30))
    def share(self, pick: int) -> None:
        block = list(self.keys.values())[pick % len(self.keys)]
        self.pool.retain(block)
        self.held.append(block)

    @invariant()
    def counts_agree(self) -> None:
        self.pool.check_integrity(self.held)
        assert self.pool.num_free + self.pool.num_used == 8
        assert self.pool.num_used == len(set(self.held))
        assert self.pool.published() == {block: key for key, block in self.keys.items()}


PoolMachine.TestCase.settings = settings(max_examples=scaled(25), stateful_step_count=40, deadline=None)
test_random_use = PoolMachine.TestCase


def test_shared_blocks_count_as_younger_and_protected_ones_go_last() -> None:
    pool, evicted = pool_of(40)
    blocks = [pool.acquire() for _ in range(40)]
    for block in blocks:
        pool.publish(block, b"%d" % block)
    shared, protected, plain = blocks[0], blocks[1], blocks[2:]
    pool.share(shared)
    pool.protect(protected, True)
    for block in blocks:
        pool.release(block)
    for _ in range(20):
        pool.acquire()
    assert evicted == [b"%d" % block for block in plain[:20]]
    taken = [pool.acquire() for _ in range(18)]
    assert shared not in taken
    assert [pool.acquire(), pool.acquire()] == [shared, protected]
    assert pool.num_free == 0


def test_a_block_that_lost_its_protection_goes_first() -> None:
    pool, evicted = pool_of(4)
    blocks = [pool.acquire() for _ in range(4)]
    for block in blocks:
        pool.publish(block, b"%d" % block)
        pool.protect(block, block == blocks[3])
        pool.release(block)
    pool.protect(blocks[3], False)
    assert pool.acquire() == blocks[3]
    assert evicted == [b"%d" % blocks[3]]
