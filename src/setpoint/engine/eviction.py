"""In which order free blocks that still hold something are given up."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

NORMAL, PROTECTED = 0, 1


class EvictionOrder:
    """Least recently used first, and the protected ones after all others. Every operation takes constant time."""

    def __init__(self) -> None:
        self._queues: tuple[OrderedDict[int, None], ...] = (OrderedDict(), OrderedDict())
        self._ranks: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._ranks)

    def __contains__(self, block: object) -> bool:
        return block in self._ranks

    def __iter__(self) -> Iterator[int]:
        for queue in self._queues:
            yield from queue

    def push(self, block: int, rank: int = NORMAL) -> None:
        """It was used until now."""
        self._ranks[block] = rank
        self._queues[rank][block] = None

    def remove(self, block: int) -> None:
        """It is used again. KeyError: it is not here."""
        del self._queues[self._ranks.pop(block)][block]

    def pop(self) -> int:
        """The one to give up now."""
        queue = self._queues[NORMAL] or self._queues[PROTECTED]
        block, _ = queue.popitem(last=False)
        del self._ranks[block]
        return block

    def rerank(self, block: int, rank: int) -> None:
        """Move a block to the queue of another rank: to its end, or to its front where it lost its protection."""
        if self._ranks[block] != rank:
            self.remove(block)
            self.push(block, rank)
            self._queues[rank].move_to_end(block, last=rank == PROTECTED)
