"""Orders of eviction that were tried beside `setpoint.engine.eviction`, and the best that could be (`Clairvoyant`).

`push(block, uses, is_shared)`: its last user is gone, `uses` times it was found again so far; shared are blocks that
different prompts went on from. `remove`: found again. `pop`: the one to give up. `known_uses`: of a block that was
given up, what is still remembered.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from typing import Protocol


class Order(Protocol):
    def push(self, block: int, uses: int, is_shared: bool) -> None: ...
    def remove(self, block: int) -> None: ...
    def pop(self) -> int: ...
    def known_uses(self, block: int) -> int: ...


class _Queues:
    """Least recently used first in each of some queues."""

    def __init__(self, count: int) -> None:
        self.queues: list[OrderedDict[int, int]] = [OrderedDict() for _ in range(count)]
        self.place: dict[int, int] = {}

    def put(self, block: int, queue: int, value: int = 0) -> None:
        self.place[block] = queue
        self.queues[queue][block] = value

    def remove(self, block: int) -> int:
        return self.queues[self.place.pop(block)].pop(block)

    def take_from(self, queue: int) -> int:
        block, _ = self.queues[queue].popitem(last=False)
        del self.place[block]
        return block

    def known_uses(self, block: int) -> int:
        return 0


class LeastRecent(_Queues):
    def __init__(self, capacity: int) -> None:
        super().__init__(1)

    def push(self, block: int, uses: int, is_shared: bool) -> None:
        self.put(block, 0)

    def pop(self) -> int:
        return self.take_from(0)


class Segmented(_Queues):
    """SLRU: what was found again lives in a protected segment of at most `share` of the capacity."""

    def __init__(self, capacity: int, share: float = 0.5) -> None:
        super().__init__(2)
        self.limit = int(capacity * share)

    def push(self, block: int, uses: int, is_shared: bool) -> None:
        self.put(block, 1 if uses else 0)
        while len(self.queues[1]) > self.limit:
            self.put(self.take_from(1), 0)

    def pop(self) -> int:
        return self.take_from(0 if self.queues[0] else 1)


class LeastUsed(_Queues):
    """By number of uses, then least recently used; uses never age."""

    def __init__(self, capacity: int) -> None:
        super().__init__(8)

    def push(self, block: int, uses: int, is_shared: bool) -> None:
        self.put(block, min(uses, 7))

    def pop(self) -> int:
        return self.take_from(next(index for index, queue in enumerate(self.queues) if queue))


class Ghosts(_Queues):
    """S3-FIFO's idea for prefixes: a small queue for the unproven, a large one for the rest, names of the given up."""

    def __init__(self, capacity: int, share: float = 0.1) -> None:
        super().__init__(2)
        self.limit = max(int(capacity * share), 1)
        self.ghosts: OrderedDict[int, int] = OrderedDict()
        self.capacity = capacity

    def push(self, block: int, uses: int, is_shared: bool) -> None:
        self.put(block, 1 if uses else 0, uses)

    def pop(self) -> int:
        queue = 0 if self.queues[0] and (len(self.queues[0]) > self.limit or not self.queues[1]) else 1
        block = self.take_from(queue)
        if queue == 0:
            self.ghosts[block] = 1
            if len(self.ghosts) > self.capacity:
                self.ghosts.popitem(last=False)
        return block

    def known_uses(self, block: int) -> int:
        return self.ghosts.pop(block, 0)


class Hazard(_Queues):
    """Give up the block that is least likely to be found again soon: by its class (uses so far) and its age.

    Ages are counted in blocks handed out. Per class and power of two of the age it is counted how many blocks were
    found again there and how many got that far; of the classes' oldest blocks the one with the lowest rate goes.
    """

    def __init__(self, capacity: int, classes: int = 6, ghosts: float = 2.0) -> None:
        super().__init__(classes)
        self.classes = classes
        self.now = 0
        self.found = [[0.0] * 64 for _ in range(classes)]
        self.left = [[0.0] * 64 for _ in range(classes)]  # by any way out, at that age
        self.rates = [[1.0] * 64 for _ in range(classes)]
        self.events = 0
        self.ghosts: OrderedDict[int, tuple[int, int]] = OrderedDict()
        self.num_ghosts = int(capacity * ghosts)

    def push(self, block: int, uses: int, is_shared: bool) -> None:
        self.put(block, min(uses, self.classes - 1), self.now)

    def remove(self, block: int) -> int:
        queue = self.place[block]
        since = super().remove(block)
        self._count(queue, since, True)
        return since

    def pop(self) -> int:
        self.now += 1
        best, lowest = -1, 0.0
        for index, queue in enumerate(self.queues):
            if queue:
                since = next(iter(queue.values()))
                rate = self.rates[index][(self.now - since).bit_length()]
                if best < 0 or rate < lowest:
                    best, lowest = index, rate
        block = next(iter(self.queues[best]))
        since = self.queues[best][block]
        self.take_from(best)
        self.ghosts[block] = (best, since)
        if len(self.ghosts) > self.num_ghosts:
            _, (queue, since) = self.ghosts.popitem(last=False)
            self._count(queue, since, False)
        return block

    def known_uses(self, block: int) -> int:
        """A block comes back that was given up: it would have been found, at this age."""
        self.now += 0
        ghost = self.ghosts.pop(block, None)
        if ghost is None:
            return 0
        self._count(ghost[0], ghost[1], True)
        return ghost[0] + 1

    def _count(self, queue: int, since: int, found: bool) -> None:
        age = (self.now - since).bit_length()
        self.left[queue][age] += 1
        self.found[queue][age] += found
        self.events += 1
        if self.events % 256 == 0:
            self._rate()

    def _rate(self) -> None:
        for index in range(self.classes):
            reached = 0.0
            for age in range(63, -1, -1):
                reached += self.left[index][age]
                width = 1 << max(age - 1, 0)
                self.rates[index][age] = (self.found[index][age] + 0.5) / (reached + 1.0) / width
        if self.events % 65536 == 0:
            for counts in (*self.found, *self.left):
                counts[:] = [count / 2 for count in counts]


class AgesByClass(_Queues):
    """The block that is oldest for its class: ages, in blocks handed out, are divided by the class's weight."""

    def __init__(self, weights: tuple[float, ...]) -> None:
        super().__init__(len(weights))
        self.weights = weights
        self.now = 0

    def push(self, block: int, uses: int, is_shared: bool) -> None:
        self.put(block, self.class_of(uses, is_shared), self.now)

    def class_of(self, uses: int, is_shared: bool) -> int:
        raise NotImplementedError

    def pop(self) -> int:
        self.now += 1
        best, oldest = -1, -1.0
        for index, queue in enumerate(self.queues):
            if queue:
                age = (self.now - next(iter(queue.values()))) / self.weights[index]
                if age > oldest:
                    best, oldest = index, age
        return self.take_from(best)


class AgesByUse(AgesByClass):
    """Classes by how often a block was found again."""

    def class_of(self, uses: int, is_shared: bool) -> int:
        return min(uses, len(self.weights) - 1)


class AgesByBranch(AgesByClass):
    """Two classes: blocks that different prompts went on from, and those of one line of turns."""

    def class_of(self, uses: int, is_shared: bool) -> int:
        return int(is_shared)


class Clairvoyant:
    """Belady's: the block that is needed again last. `next_use` is kept by the simulation."""

    def __init__(self, capacity: int) -> None:
        self.next_use: dict[int, float] = {}
        self.heap: list[tuple[float, int, int]] = []
        self.present: dict[int, int] = {}
        self.stamp = 0

    def push(self, block: int, uses: int, is_shared: bool) -> None:
        self.stamp += 1
        self.present[block] = self.stamp
        heapq.heappush(self.heap, (-self.next_use.get(block, float("inf")), self.stamp, block))

    def remove(self, block: int) -> None:
        del self.present[block]

    def pop(self) -> int:
        while True:
            _, stamp, block = heapq.heappop(self.heap)
            if self.present.get(block) == stamp:
                del self.present[block]
                return block

    def known_uses(self, block: int) -> int:
        return 0
