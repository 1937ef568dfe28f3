"""Which blocks to copy out of the pool in the step under way: those that lose their place, then those not on disk yet.

A copy is made before anything of the step is written, so a block may be given to its next owner at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from setpoint.engine.host_tier import BlockName, BlockRecord
from setpoint.engine.lower_tiers import LowerTiers
from setpoint.engine.plan import KVGroup, KVSave, StepPlan, StepResult
from setpoint.engine.prefix_tree import Node, PrefixTree
from setpoint.engine.restore_cost import BEHIND_S, IDLE_S


class KVSaves:
    """Copies of one step are bounded; what the pool loses beyond that is lost."""

    def __init__(self, tree: PrefixTree, lower: LowerTiers, groups: Sequence[KVGroup], block_size: int) -> None:
        self._tree = tree
        self._lower = lower
        self._block_size = block_size
        self._block_bytes = [group.block_bytes for group in groups]
        self._saves: list[KVSave] = []
        self._bytes_left = 0
        self._behind_bytes_left = 0
        # Published, and perhaps not on disk yet. A disk that takes nothing leaves no more than the pool can hold.
        self._behind: deque[BlockName] = deque(maxlen=sum(group.num_blocks for group in groups))
        self._is_planning = False

    @property
    def num_behind(self) -> int:
        """Blocks that are still to be looked at for the disk."""
        return 0 if self._lower.disk is None else len(self._behind)

    def begin(self, num_tokens: int, restore_bytes: int, *, is_busy: bool) -> None:
        """A step is planned that may compute and restore so much: what that takes the place of is copied.

        What was chosen for a plan that never ran is forgotten: its blocks may be written by now.
        """
        self._saves = []
        self._bytes_left = (num_tokens // self._block_size + 1) * sum(self._block_bytes) + restore_bytes
        self._behind_bytes_left = self._lower.cost.save_bytes_in(BEHIND_S if is_busy else IDLE_S)
        self._is_planning = True

    def published(self, group: int, key: bytes) -> None:
        if self._lower.disk is not None:
            self._behind.append((key, group))

    def evicted(self, group: int, key: bytes) -> None:
        """The pool gives the block of `key` to a new owner."""
        node = self._tree.find(key)
        if self._is_planning and node is not None and self._bytes_left > 0 and self._lower.wants((key, group)):
            self._add(group, key, node)

    def end(self) -> Sequence[KVSave]:
        """The copies of the plan that was just made."""
        while self._behind and self._behind_bytes_left > 0 and self._takes_more:
            key, group = self._behind.popleft()
            node = self._tree.find(key)
            resident = node is not None and node.blocks[group] is not None
            if node is not None and resident and self._lower.wants_on_disk((key, group)):
                self._add(group, key, node)
                self._behind_bytes_left -= self._block_bytes[group]
        self._is_planning = False
        return self._saves

    @property
    def _takes_more(self) -> bool:
        return self._lower.disk is not None and self._lower.disk.takes_more

    def _add(self, group: int, key: bytes, node: Node) -> None:
        block = node.blocks[group]
        assert block is not None
        self._saves.append(KVSave(group, block, key, node.parent, node.tokens))
        self._bytes_left -= self._block_bytes[group]

    def file(self, plan: StepPlan, result: StepResult) -> None:
        """Take what the runner read. What is in the pool and found no room on its way to disk is copied again later."""
        refused = []
        for save, payload in zip(plan.saves, result.saved, strict=False):
            if payload is not None:
                node = self._tree.find(save.key)
                is_resident = node is not None and node.blocks[save.group] is not None
                record = BlockRecord((save.key, save.group), save.parent, save.tokens, payload)
                if not self._lower.keep(record, is_resident=is_resident) and is_resident:
                    refused.append(record.name)
        self._behind.extendleft(reversed(refused))
