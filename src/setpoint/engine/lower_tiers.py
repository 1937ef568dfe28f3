"""What lies below the pool of KV blocks: host memory, then a slow tier (disk). Which prefix to restore, and when.

Blocks come down when the pool loses them; those of the slow tier are also written behind, while they are still in the
pool. A waiting sequence takes a longer prefix from here where reading it costs less than computing it. What is on disk
is fetched first: the sequence steps aside meanwhile, and no longer than computing would take. Pure: names, sizes and
opaque bytes; the slow tier works elsewhere and answers at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import accumulate
from typing import Protocol

from setpoint.engine.host_tier import BlockName, BlockRecord, HostTier
from setpoint.engine.plan import RunnerInfo
from setpoint.engine.prefix_tree import PrefixHit, first_visible_block
from setpoint.engine.restore_cost import RestoreCost

MAX_STAGED_BYTES = 512 << 20  # fetched, or on their way, for sequences that wait
LAG = 0.25  # of what computing would take: so far a fetch may fall behind it before the rest is computed
FIRST_BLOCK_S = 0.02  # a disk may take so long to begin
LONGEST_WAIT_S = 5.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """A block to read, and what its record must say of itself."""

    name: BlockName
    parent: bytes
    tokens: bytes


@dataclass(frozen=True, slots=True)
class Fetched:
    name: BlockName
    payload: bytes | None  # None: it is not there after all, or was damaged
    seconds: float


class SlowTier(Protocol):
    """Blocks where reading takes longer than a step may. No method but `close` waits, none raises."""

    on_progress: Callable[
        [], None
    ]  # called from any thread when something was fetched, or there is room to store again

    def __contains__(self, name: object) -> bool: ...

    def store(self, record: BlockRecord) -> bool:
        """Keep a record, some time later; False where that is not possible now."""
        ...

    @property
    def takes_more(self) -> bool:
        """Whether `store` would accept a record now."""
        ...

    def fetch(self, wanted: Sequence[Wanted]) -> None: ...

    def forget(self, names: Iterable[BlockName]) -> None:
        """Nobody waits for these blocks any more: those that were not read yet need not be."""
        ...

    def take_fetched(self) -> list[Fetched]:
        """What has arrived since the last call."""
        ...

    def close(self, timeout_s: float) -> None:
        """Finish what was stored, for so long at most. May be called twice."""
        ...


@dataclass(frozen=True, slots=True)
class Missing:
    """What must be fetched before a prefix of `num_blocks` blocks can be restored."""

    num_blocks: int
    wanted: list[Wanted]


@dataclass(slots=True, eq=False)
class Fetch:
    """Blocks on their way to one waiting sequence.

    It waits while the disk keeps up with what computing would have done by now, but for a start of `LAG`. So whatever
    the disk does, and however it was judged before, waiting costs little more than computing everything at once.
    """

    outstanding: set[BlockName]
    began: float
    compute_s: float  # of all these blocks
    num_bytes: int
    staged: dict[BlockName, bytes] = field(default_factory=dict)
    num_arrived: int = 0

    def is_over(self, now: float) -> bool:
        if not self.outstanding:
            return True
        keeps_up = LAG + self.num_arrived / (self.num_arrived + len(self.outstanding))
        return now >= self.began + min(FIRST_BLOCK_S + self.compute_s * keeps_up, LONGEST_WAIT_S)

    def take(self, fetched: Fetched) -> None:
        self.outstanding.discard(fetched.name)
        if fetched.payload is not None:
            self.staged[fetched.name] = fetched.payload
            self.num_arrived += 1


class Place(Enum):
    DISK = "disk"


Source = int | bytes | Place | None  # a block of the pool, bytes in memory, on disk, nowhere


@dataclass(slots=True)
class Prefix:
    """The full blocks of a sequence's tokens, as the tiers are asked for them."""

    keys: Sequence[bytes]
    root: bytes
    tokens: Callable[[int], bytes]  # of a block, packed
    resident: Callable[[int], Sequence[int | None]]  # blocks of the pool, per group

    def parent(self, index: int) -> bytes:
        return self.keys[index - 1] if index else self.root


class LowerTiers:
    """Belongs to the thread that schedules."""

    def __init__(
        self,
        info: RunnerInfo,
        *,
        host_bytes: int = 0,
        disk: SlowTier | None = None,
        cost: RestoreCost | None = None,
        secret: bytes | None = None,
    ) -> None:
        self.host = HostTier(host_bytes)
        self.disk = disk
        self.cost = cost or RestoreCost()
        self.secret = secret  # of the prefix keys; None: a new one in every process
        self._windows = [group.window for group in info.kv_groups]
        self._block_bytes = [group.block_bytes for group in info.kv_groups]
        self._block_size = info.block_size
        self._fetching: dict[BlockName, list[Fetch]] = {}
        self._staged_bytes = 0

    # --- down ----------------------------------------------------------------------------------------------------

    def wants(self, name: BlockName) -> bool:
        """Whether to copy a block that the pool is about to lose."""
        if name in self.host:
            self.host.touch(name)
            return False
        return self.host.limit_bytes > 0 or self.wants_on_disk(name)

    def wants_on_disk(self, name: BlockName) -> bool:
        return self.disk is not None and self.disk.takes_more and name not in self.disk

    def keep(self, record: BlockRecord, *, is_resident: bool) -> bool:
        """Take a copy; one of a block that is still in the pool is for the disk only. False where that refused it."""
        if not is_resident:
            self.host.put(record)
        return self.disk is None or record.name in self.disk or self.disk.store(record)

    # --- up ------------------------------------------------------------------------------------------------------

    def reach(self, hit: PrefixHit, prefix: Prefix, fetch: Fetch | None) -> PrefixHit | Missing:
        """The hit made longer where that pays; or what must be fetched before it can be.

        With a `fetch` that is over nothing more is asked of the disk.
        """
        sources = self._sources(hit.num_blocks, prefix, fetch)
        num_blocks = self._best_length(hit.num_blocks, sources)
        if num_blocks == hit.num_blocks:
            if any(Place.DISK in found for found in sources):
                self.cost.left_on_disk()
            return hit
        wanted = []
        restores = []
        tables = []
        for group, found in enumerate(sources):
            first = self._first_visible(num_blocks, group)
            kept = hit.block_tables[group][min(first, hit.num_blocks) :]
            table = [-1] * (min(first, hit.num_blocks)) + list(kept)
            for index in range(hit.num_blocks, num_blocks):
                source = found[index - hit.num_blocks] if index >= first else None
                table.append(source if isinstance(source, int) else -1)
                name = (prefix.keys[index], group)
                if source is Place.DISK:
                    wanted.append((index, Wanted(name, prefix.parent(index), prefix.tokens(index))))
                elif isinstance(source, bytes):
                    restores.append((index, group, source))
                    self.host.touch(name)
            tables.append(tuple(table))
        if wanted:  # in the order of the prefix: of what comes in time, as much as possible is usable
            wanted.sort(key=lambda pair: pair[0])
            return Missing(num_blocks, [want for _, want in wanted])
        return PrefixHit(num_blocks, tuple(tables), tuple(sorted(restores, key=lambda restore: restore[:2])))

    def _sources(self, begin: int, prefix: Prefix, fetch: Fetch | None) -> list[list[Source]]:
        """Per group: where the blocks from `begin` on are, as far as any longer hit could use them."""
        sources: list[list[Source]] = [[] for _ in self._windows]
        for index in range(begin, len(prefix.keys)):
            parent, tokens, resident = prefix.parent(index), prefix.tokens(index), prefix.resident(index)
            for group, window in enumerate(self._windows):
                name = (prefix.keys[index], group)
                source: Source = resident[group]
                if source is None and fetch is not None:
                    source = fetch.staged.get(name)
                if source is None:
                    source = self.host.get(name, parent, tokens)
                if source is None and fetch is None and self.disk is not None and name in self.disk:
                    source = Place.DISK
                if source is None and window is None:  # nothing longer can be whole
                    for found in sources:
                        del found[index - begin :]
                    return sources
                sources[group].append(source)
        return sources

    def _best_length(self, begin: int, sources: list[list[Source]]) -> int:
        """The prefix length, in blocks, that saves most; `begin` where none saves anything."""
        in_memory = [_sums(found, bytes, size) for found, size in zip(sources, self._block_bytes, strict=True)]
        on_disk = [_sums(found, Place, size) for found, size in zip(sources, self._block_bytes, strict=True)]
        runs = [begin - self._first_visible(begin, group) for group in range(len(sources))]
        best, best_gain = begin, 0.0
        for num_blocks in range(begin + 1, begin + len(sources[0]) + 1):
            usable, memory_bytes, disk_bytes = True, 0, 0
            for group, found in enumerate(sources):
                runs[group] = 0 if found[num_blocks - begin - 1] is None else runs[group] + 1
                first = self._first_visible(num_blocks, group)
                usable = usable and runs[group] >= num_blocks - first
                cut = max(first - begin, 0)
                memory_bytes += in_memory[group][num_blocks - begin] - in_memory[group][cut]
                disk_bytes += on_disk[group][num_blocks - begin] - on_disk[group][cut]
            if usable:
                saved = self.cost.saved_s((num_blocks - begin) * self._block_size)
                gain = saved - self.cost.read_s(memory_bytes, disk_bytes)
                if gain > best_gain:
                    best, best_gain = num_blocks, gain
        return best

    def _first_visible(self, num_blocks: int, group: int) -> int:
        return first_visible_block(num_blocks * self._block_size, self._windows[group], self._block_size)

    # --- fetching ------------------------------------------------------------------------------------------------

    def begin_fetch(self, wanted: Sequence[Wanted], saved_tokens: int, now: float) -> Fetch | None:
        """Ask the disk for blocks; None where too much is on its way already."""
        num_bytes = sum(self._block_bytes[want.name[1]] for want in wanted)
        if self.disk is None or self._staged_bytes + num_bytes > MAX_STAGED_BYTES:
            return None
        fetch = Fetch({want.name for want in wanted}, now, self.cost.saved_s(saved_tokens), num_bytes)
        self._staged_bytes += num_bytes
        missing = [want for want in wanted if want.name not in self._fetching]
        for want in wanted:
            self._fetching.setdefault(want.name, []).append(fetch)
        self.disk.fetch(missing)
        return fetch

    def end_fetch(self, fetch: Fetch) -> None:
        """The sequence has taken what had arrived, or will not come back for it."""
        self._staged_bytes -= fetch.num_bytes
        for name in fetch.outstanding:
            self._fetching[name].remove(fetch)
        unwanted = [name for name in fetch.outstanding if not self._fetching[name]]
        for name in unwanted:
            del self._fetching[name]
        if self.disk is not None and unwanted:
            self.disk.forget(unwanted)
        fetch.outstanding.clear()
        fetch.staged.clear()

    def poll(self) -> None:
        """Hand out what the disk has read."""
        if self.disk is None:
            return
        num_bytes, seconds = 0, 0.0
        for fetched in self.disk.take_fetched():
            for fetch in self._fetching.pop(fetched.name, ()):
                fetch.take(fetched)
            if fetched.payload is not None:
                num_bytes += len(fetched.payload)
                seconds += fetched.seconds
        self.cost.observe_disk(num_bytes, seconds)

    def give_up(self) -> None:
        """Blocks cannot be written back: keep none from here on."""
        self.host = HostTier(0)
        self.disk = None

    def check_integrity(self) -> None:
        """Raise AssertionError if a count is wrong. For tests."""
        self.host.check_integrity()
        fetches = {id(fetch): fetch for waiting in self._fetching.values() for fetch in waiting}
        if any(name not in fetch.outstanding for name, waiting in self._fetching.items() for fetch in waiting):
            raise AssertionError("a fetch does not know what it waits for")
        if self._staged_bytes < sum(fetch.num_bytes for fetch in fetches.values()):
            raise AssertionError("the staged bytes are counted too low")


def _sums(found: Sequence[Source], kind: type, size: int) -> list[int]:
    """Bytes of the first n blocks that lie in one kind of place, for every n."""
    return [0, *accumulate(size if isinstance(source, kind) else 0 for source in found)]
