"""In which order free blocks that still hold something are given up.

Least recently used first, with one thing that recency does not know: a block that *different* prompts went on from (a
system prompt, a document) is found again by whoever comes, one of a single line of turns by that line alone. The former
count as younger than they are. `benchmarks/eviction.py` compares this with other orders.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from enum import IntEnum

SHARED_WEIGHT = 8  # a shared block is kept so many times as long as another that nobody asks for


class Rank(IntEnum):
    PLAIN = 0
    SHARED = 1
    PROTECTED = 2  # of a session: after all others


class EvictionOrder:
    """Every operation takes constant time. Ages are counted in blocks given up."""

    def __init__(self) -> None:
        self._now = 0
        self._queues: tuple[OrderedDict[int, int], ...] = tuple(
            OrderedDict() for _ in Rank
        )  # block -> when it was freed
        self._ranks: dict[int, Rank] = {}

    def __len__(self) -> int:
        return len(self._ranks)

    def __contains__(self, block: object) -> bool:
        return block in self._ranks

    def __iter__(self) -> Iterator[int]:
        for queue in self._queues:
            yield from queue

    def push(self, block: int, rank: Rank = Rank.PLAIN) -> None:
        """It was used until now."""
        self._ranks[block] = rank
        self._queues[rank][block] = self._now

    def remove(self, block: int) -> None:
        """It is used again. KeyError: it is not here."""
        del self._queues[self._ranks.pop(block)][block]

    def pop(self) -> int:
        """The one to give up now. KeyError: there is none."""
        block, _ = self._oldest().popitem(last=False)
        del self._ranks[block]
        self._now += 1
        return block

    def _oldest(self) -> OrderedDict[int, int]:
        """The queue whose first block goes next."""
        plain, shared, protected = self._queues
        if plain and shared:
            plain_age = self._now - next(iter(plain.values()))
            shared_age = self._now - next(iter(shared.values()))
            return plain if SHARED_WEIGHT * plain_age >= shared_age else shared
        return plain or shared or protected

    def rerank(self, block: int, rank: Rank) -> None:
        """Move a block to another queue: to its end, but to the front of the plain one."""
        if self._ranks[block] is not rank:
            self.remove(block)
            self.push(block, rank)
            if rank is Rank.PLAIN:
                self._queues[rank][block] = next(iter(self._queues[rank].values()))
                self._queues[rank].move_to_end(block, last=False)
