"""KV blocks in host memory, below the pool: least recently used first out, within a budget of bytes."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

BlockName = tuple[bytes, int]  # (key in the prefix tree, KV group)
RECORD_BYTES = 512  # what keeping a record takes besides its payload


@dataclass(frozen=True, slots=True)
class BlockRecord:
    """A block's bytes under its name. A lookup compares parent and token ids, as the prefix tree does."""

    name: BlockName
    parent: bytes
    tokens: bytes
    payload: bytes

    @property
    def num_bytes(self) -> int:
        return len(self.payload) + len(self.tokens) + RECORD_BYTES


class HostTier:
    """A limit of 0 keeps nothing."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.num_bytes = 0
        self._records: OrderedDict[BlockName, BlockRecord] = OrderedDict()

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, name: BlockName) -> bool:
        return name in self._records

    def get(self, name: BlockName, parent: bytes, tokens: bytes) -> bytes | None:
        record = self._records.get(name)
        if record is None or record.parent != parent or record.tokens != tokens:
            return None
        return record.payload

    def touch(self, name: BlockName) -> None:
        if name in self._records:
            self._records.move_to_end(name)

    def put(self, record: BlockRecord) -> None:
        if record.num_bytes > self.limit_bytes:
            return
        known = self._records.pop(record.name, None)
        if known is not None:
            self.num_bytes -= known.num_bytes
        self._records[record.name] = record
        self.num_bytes += record.num_bytes
        while self.num_bytes > self.limit_bytes:
            _, oldest = self._records.popitem(last=False)
            self.num_bytes -= oldest.num_bytes

    def check_integrity(self) -> None:
        """Raise AssertionError unless the count of bytes is right and within the limit."""
        if self.num_bytes != sum(record.num_bytes for record in self._records.values()):
            raise AssertionError("the host tier has lost count of its bytes")
        if self.num_bytes > self.limit_bytes:
            raise AssertionError("the host tier is over its budget")
