"""A slow tier in memory, which answers late, forgets and fails as told."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from setpoint.engine.host_tier import BlockName, BlockRecord
from setpoint.engine.lower_tiers import Fetched, LowerTiers, Wanted
from setpoint.engine.plan import RunnerInfo
from setpoint.engine.restore_cost import STALL_S, RestoreCost

SECRET = b"of the disk"


class Attic:
    """Implements `SlowTier`: every `delay + 1` polls comes what was asked for, or `blocks_at_once` blocks of it."""

    def __init__(self, delay: int = 0, blocks_at_once: int | None = None) -> None:
        self.on_progress: Callable[[], None] = lambda: None
        self.delay = delay
        self.blocks_at_once = blocks_at_once
        self.records: dict[BlockName, BlockRecord] = {}
        self.takes_more = True
        self.room: int | None = None  # records until it takes no more; None = any number
        self.num_fetched = 0
        self._asked: list[list[Wanted]] = []
        self.num_forgotten = 0
        self._polls = 0

    def __contains__(self, name: object) -> bool:
        return name in self.records

    def store(self, record: BlockRecord) -> bool:
        if not self.takes_more:
            return False
        assert record.name not in self.records, "stored twice"
        self.records[record.name] = record
        if self.room is not None:
            self.room -= 1
            self.takes_more = self.room > 0
        return True

    def fetch(self, wanted: Sequence[Wanted]) -> None:
        self._asked.append(list(wanted))

    def forget(self, names: Iterable[BlockName]) -> None:
        gone = set(names)
        assert gone <= {want.name for asked in self._asked for want in asked}, "forgot what was not asked for"
        self.num_forgotten += len(gone)
        self._asked = [[want for want in asked if want.name not in gone] for asked in self._asked]

    def take_fetched(self) -> list[Fetched]:
        self._polls += 1
        if not self._asked or self._polls % (self.delay + 1):
            return []
        asked = self._asked.pop(0)
        at_once = len(asked) if self.blocks_at_once is None else self.blocks_at_once
        if asked[at_once:]:
            self._asked.insert(0, asked[at_once:])
        return [Fetched(want.name, self._payload(want), 0.0) for want in asked[:at_once]]

    def _payload(self, want: Wanted) -> bytes | None:
        record = self.records.get(want.name)
        if record is None or (record.parent, record.tokens) != (want.parent, want.tokens):
            return None
        self.num_fetched += 1
        return record.payload

    def close(self, timeout_s: float) -> None:
        pass


def fixed_cost(info: RunnerInfo, *, blocks_per_step: float = 2.0, compute_s_per_token: float = 1.0) -> RestoreCost:
    """Reading is worth it, and `blocks_per_step` blocks can be moved beside others."""
    block_bytes = max(group.block_bytes for group in info.kv_groups)
    bandwidth = block_bytes * blocks_per_step / STALL_S
    return RestoreCost(compute_s_per_token, bandwidth, bandwidth, bandwidth, learns=False)


def tiers(
    info: RunnerInfo, *, host_blocks: int = 0, disk: Attic | None = None, cost: RestoreCost | None = None
) -> LowerTiers:
    block_bytes = max(group.block_bytes for group in info.kv_groups) + 4 * info.block_size + 512
    return LowerTiers(
        info,
        host_bytes=host_blocks * block_bytes,
        disk=disk,
        cost=cost or fixed_cost(info),
        secret=SECRET,
    )
