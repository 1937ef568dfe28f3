"""The KV blocks of all groups and the prefix tree over them, seen from a sequence.

The scheduler asks here for room; nothing else touches block tables. Writing is safe without copies: a shared block
is always full, and a sequence writes only at positions from `num_computed`, which a hit leaves on a block boundary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial

from setpoint.engine.block_pool import BlockPool
from setpoint.engine.kv_saves import KVSaves
from setpoint.engine.lower_tiers import Fetch, LowerTiers, Missing, Prefix
from setpoint.engine.plan import KVRestore, RunnerInfo
from setpoint.engine.prefix_tree import PrefixHit, PrefixTree, first_visible_block
from setpoint.engine.sequence import Restore, Sequence


def ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


class KVCache:
    """`lower` is what lies below the pool, if anything does."""

    def __init__(self, info: RunnerInfo, *, prefix_caching: bool = True, lower: LowerTiers | None = None) -> None:
        self.block_size = info.block_size
        self.prefix_caching = prefix_caching
        self.windows = tuple(group.window for group in info.kv_groups)
        self._windowed = [(group, window) for group, window in enumerate(self.windows) if window is not None]
        self.lower = lower if prefix_caching else None
        self.tree = PrefixTree(info.kv_groups, info.block_size, secret=None if lower is None else lower.secret)
        self.pools = tuple(
            BlockPool(group.num_blocks, partial(self._evicted, index)) for index, group in enumerate(info.kv_groups)
        )
        self._protections: dict[tuple[int, bytes], int] = {}  # by group and key: how many sessions want it kept
        self.saves = None if self.lower is None else KVSaves(self.tree, self.lower, info.kv_groups, info.block_size)

    @property
    def capacity_tokens(self) -> int | None:
        """Longest sequence that fits when it is alone; None = any length (every group is windowed)."""
        fits = [
            pool.num_blocks * self.block_size
            for pool, window in zip(self.pools, self.windows, strict=True)
            if window is None or pool.num_blocks < self._window_blocks(window)
        ]
        return min(fits, default=None)

    @property
    def usage(self) -> float:
        """Referenced share of the fullest group, 0..1."""
        return max(pool.num_used / pool.num_blocks for pool in self.pools)

    def _window_blocks(self, window: int) -> int:
        """Most blocks that one token's window can touch."""
        return ceil_div(window - 1, self.block_size) + 1

    def blocks_needed(self, num_tokens: int, group: int) -> int:
        """Blocks with which a sequence of this length can be computed to its end, if only token by token."""
        window = self.windows[group]
        needed = ceil_div(num_tokens, self.block_size)
        return needed if window is None else min(needed, self._window_blocks(window))

    def match(self, seq: Sequence, now: float = 0.0) -> PrefixHit | None:
        """The longest prefix of a waiting sequence that is cached and may be used; None while some of it is fetched."""
        num_blocks = seq.max_cached // self.block_size if self.prefix_caching else 0
        self._extend_keys(seq, num_blocks)
        hit = self.tree.match(seq.block_keys[:num_blocks], seq.owner.root_key, seq.token_ids)
        if self.lower is None or hit.num_blocks == num_blocks:
            return hit
        return self._reach(self.lower, seq, hit, num_blocks, now)

    def _reach(self, lower: LowerTiers, seq: Sequence, hit: PrefixHit, num_blocks: int, now: float) -> PrefixHit | None:
        """The hit made longer by what lower tiers hold; None while it is read from disk."""
        prefix = self._prefix(seq, num_blocks)
        reached = lower.reach(hit, prefix, seq.fetch)
        if isinstance(reached, Missing):
            saved_tokens = (reached.num_blocks - hit.num_blocks) * self.block_size
            seq.fetch = lower.begin_fetch(reached.wanted, saved_tokens, now)
            if seq.fetch is not None:
                return None
            reached = lower.reach(hit, prefix, Fetch(set(), now, 0.0, 0))
        return reached if isinstance(reached, PrefixHit) else hit

    def _prefix(self, seq: Sequence, num_blocks: int) -> Prefix:
        keys, root, size = seq.block_keys[:num_blocks], seq.owner.root_key, self.block_size

        def tokens(index: int) -> bytes:
            return self.tree.pack(seq.token_ids[index * size : (index + 1) * size])

        def resident(index: int) -> list[int | None]:
            return self.tree.resident(keys[index], keys[index - 1] if index else root, tokens(index))

        return Prefix(keys, root, tokens, resident)

    @staticmethod
    def is_fetching(seq: Sequence, now: float) -> bool:
        """Whether a waiting sequence should step aside for what is read from disk for it."""
        return seq.fetch is not None and not seq.fetch.is_over(now)

    def can_admit(self, seq: Sequence, hit: PrefixHit, running: Iterable[Sequence]) -> bool:
        """Whether all known tokens of `seq` fit beside what the running sequences still need, and one block each.

        Admitting on less would preempt the newcomer within a few steps and compute its prompt again.
        """
        running = list(running)
        for group, pool in enumerate(self.pools):
            reserve = len(running)
            for other in running:
                held = len(other.block_tables[group]) - other.first_live[group]
                if other.restore is not None:
                    held -= sum(1 for _, awaited, _ in other.restore.pending if awaited == group)
                reserve += max(0, self.blocks_needed(other.num_tokens, group) - held)
            found = [block for block in hit.block_tables[group] if block >= 0]
            free = pool.num_free - sum(map(pool.is_free, found))
            if max(1, self.blocks_needed(seq.num_tokens, group) - len(found)) + reserve > free:
                return False
        return True

    def take_hit(self, seq: Sequence, hit: PrefixHit) -> None:
        """Start a sequence at the end of its cached prefix, or with room for what it restores first."""
        for group, (pool, found) in enumerate(zip(self.pools, hit.block_tables, strict=True)):
            first = first_visible_block(hit.num_blocks * self.block_size, self.windows[group], self.block_size)
            seq.first_live[group] = min(first, hit.num_blocks)
            for block in found:
                if block >= 0:
                    pool.retain(block)
                seq.block_tables[group].append(block)
        seq.num_computed = hit.num_blocks * self.block_size
        seq.num_published = hit.num_blocks
        if hit.restores:
            num_restored = (hit.num_blocks - hit.restores[0][0]) * self.block_size
            seq.restore = Restore(seq.num_computed, num_restored, deque(hit.restores))
            seq.num_computed = seq.num_published = 0
        self._end_fetch(seq)

    def restore(self, seq: Sequence, max_bytes: int) -> list[KVRestore]:
        """The next blocks to restore, as far as some are free; after the last the sequence stands behind its prefix."""
        restore, moves = seq.restore, []
        assert restore is not None
        while restore.pending and max_bytes > 0:
            index, group, payload = restore.pending[0]
            if not self.pools[group].num_free:
                break
            restore.pending.popleft()
            block = seq.block_tables[group][index] = self.pools[group].acquire()
            moves.append(KVRestore(seq.seq_id, group, block, payload))
            max_bytes -= len(payload)
        if not restore.pending:
            seq.num_computed, seq.restore = restore.num_tokens, None
        return moves

    def _end_fetch(self, seq: Sequence) -> None:
        if seq.fetch is not None and self.lower is not None:
            self.lower.end_fetch(seq.fetch)
            seq.fetch = None

    def grow(self, seq: Sequence, num_tokens: int) -> int:
        """Make the tables cover positions below `num_tokens`, or as many as there are blocks; returns how many."""
        size = self.block_size
        if min(map(len, seq.block_tables)) * size >= num_tokens:  # nearly every decode
            return num_tokens
        target = ceil_div(num_tokens, size)
        for table, pool in zip(seq.block_tables, self.pools, strict=True):
            target = min(target, len(table) + pool.num_free)
        for table, pool in zip(seq.block_tables, self.pools, strict=True):
            while len(table) < target:
                table.append(pool.acquire())
        return min(num_tokens, min(map(len, seq.block_tables)) * size)

    def settle(self, seq: Sequence) -> None:
        """After a step: publish the blocks that became full, let go of those that no later token can see."""
        if self.prefix_caching and seq.num_computed // self.block_size > seq.num_published:
            self._publish(seq)
        for group, window in self._windowed:
            self._trim(seq, group, window)

    def _publish(self, seq: Sequence) -> None:
        size = self.block_size
        num_full = seq.num_computed // size
        self._extend_keys(seq, num_full)
        for index in range(seq.num_published, num_full):
            key = seq.block_keys[index]
            parent = seq.block_keys[index - 1] if index else seq.owner.root_key
            tokens = self.tree.pack(seq.token_ids[index * size : (index + 1) * size])
            blocks = [table[index] for table in seq.block_tables]
            taken = self.tree.publish(key, parent, tokens, blocks)
            for group, (pool, block, took) in enumerate(zip(self.pools, blocks, taken, strict=True)):
                if took:
                    pool.publish(block, key)
                    if (group, key) in self._protections:
                        pool.protect(block, True)
                    if self.tree.is_shared(key):
                        pool.share(block)
                    if self.saves is not None:
                        self.saves.published(group, key)
        seq.num_published = num_full
        while self.tree.newly_shared:
            for pool, held in zip(self.pools, self.tree.newly_shared.pop().blocks, strict=True):
                if held is not None:
                    pool.share(held)

    def _evicted(self, group: int, key: bytes) -> None:
        if self.saves is not None:
            self.saves.evicted(group, key)
        self.tree.evict(group, key)

    def protect(self, keys: list[bytes], num_prompt_blocks: int) -> None:
        """Evict the blocks of a prefix after all others, until `unprotect` was called as often."""
        for group, key in self._visible_from(keys, num_prompt_blocks):
            count = self._protections.get((group, key), 0)
            self._protections[group, key] = count + 1
            if not count:
                self._set_protected(group, key, True)

    def unprotect(self, keys: list[bytes], num_prompt_blocks: int) -> None:
        for group, key in self._visible_from(keys, num_prompt_blocks):
            self._protections[group, key] -= 1
            if not self._protections[group, key]:
                del self._protections[group, key]
                self._set_protected(group, key, False)

    def _visible_from(self, keys: list[bytes], num_blocks: int) -> Iterator[tuple[int, bytes]]:
        """Per group: the blocks of a prefix that the tokens behind its first `num_blocks` see."""
        for group, window in enumerate(self.windows):
            first = first_visible_block(num_blocks * self.block_size, window, self.block_size)
            for key in keys[first:]:
                yield group, key

    def _set_protected(self, group: int, key: bytes, is_protected: bool) -> None:
        node = self.tree.find(key)
        block = None if node is None else node.blocks[group]
        if block is not None:
            self.pools[group].protect(block, is_protected)

    def _trim(self, seq: Sequence, group: int, window: int) -> None:
        table = seq.block_tables[group]
        first = min(first_visible_block(seq.num_computed, window, self.block_size), len(table))
        for index in range(seq.first_live[group], first):
            block, table[index] = table[index], -1
            self.pools[group].release(block)
        seq.first_live[group] = max(first, seq.first_live[group])

    def release(self, seq: Sequence) -> None:
        """Give back every block, the deepest first: eviction then eats prefixes from their ends."""
        for pool, table in zip(self.pools, seq.block_tables, strict=True):
            while table:
                block = table.pop()
                if block >= 0:
                    pool.release(block)
        seq.first_live = [0] * len(self.pools)
        seq.num_computed = 0
        seq.num_published = 0
        seq.restore = None
        self._end_fetch(seq)

    def _extend_keys(self, seq: Sequence, num_blocks: int) -> None:
        size = self.block_size
        for index in range(len(seq.block_keys), num_blocks):
            parent = seq.block_keys[-1] if index else seq.owner.root_key
            tokens = self.tree.pack(seq.token_ids[index * size : (index + 1) * size])
            seq.block_keys.append(self.tree.chain_key(parent, tokens))

    def check_integrity(self, holders: Iterable[Sequence]) -> None:
        """Raise AssertionError unless pools, tables and tree agree. For tests: walks everything."""
        holders = list(holders)
        for group, pool in enumerate(self.pools):
            pool.check_integrity(block for seq in holders for block in seq.block_tables[group] if block >= 0)
            if pool.published() != self.tree.published(group):
                raise AssertionError("pool and prefix tree disagree on what is published")
            for block, key in pool.published().items():
                if pool.is_protected(block) != ((group, key) in self._protections):
                    raise AssertionError("a block is protected that no session wants, or not that one does")
        for seq in holders:
            for table, first in zip(seq.block_tables, seq.first_live, strict=True):
                holes = sum(block < 0 for block in table[first:])
                if any(block >= 0 for block in table[:first]) or (holes and seq.restore is None):
                    raise AssertionError("a block table has a hole")
                if len(table) * self.block_size < seq.num_computed:
                    raise AssertionError("a block table is shorter than what was computed")
        if self.lower is not None:
            self.lower.check_integrity()
