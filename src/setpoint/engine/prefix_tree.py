"""The prefix cache: which full blocks of which token prefixes are still in the KV pools. An index only.

The tree is kept as a table of chained keys: the key of a block is SHA-256(key of its parent, its token ids), and the
root is SHA-256(secret of this process, tenant, salt). So equal keys mean equal tenant, salt and whole prefix, no key
can be guessed from outside, and a child needs no pointer to its parent. Lookups compare the token ids as well.

A node holds one block id per KV group, or None where that group's block was evicted (a sliding window drops its old
blocks early). A hit of `n` blocks needs all of them in a full-attention group, but in a windowed one only those that
the next token can still see.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from setpoint.engine.plan import KVGroup


@dataclass(slots=True)
class Node:
    parent: bytes
    tokens: bytes  # the block's token ids, packed
    blocks: list[int | None]  # per KV group
    child: bytes | None = None  # the first that went on from here
    is_shared: bool = False  # another one did as well


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """`block_tables[group][i]` for the first `num_blocks` logical blocks; -1 = out of that group's window, or in
    `restores`.
    """

    num_blocks: int
    block_tables: tuple[tuple[int, ...], ...]
    restores: tuple[tuple[int, int, bytes], ...] = ()  # (logical block, group, its bytes): not in the pool yet


def first_visible_block(num_computed: int, window: int | None, block_size: int) -> int:
    """Logical block of the oldest position that the token at position `num_computed` attends to."""
    if window is None:
        return 0
    return max(0, num_computed - window + 1) // block_size


class PrefixTree:
    """Keys are made by `root_key` and `chain_key`; `match` does not mutate, `publish` and `evict` do."""

    def __init__(self, groups: Sequence[KVGroup], block_size: int, *, secret: bytes | None = None) -> None:
        self._windows = tuple(group.window for group in groups)
        self._block_size = block_size
        self._secret = os.urandom(32) if secret is None else secret
        self._nodes: dict[bytes, Node] = {}
        self.newly_shared: list[Node] = []  # since its reader last looked
        self._nowhere: list[int | None] = [None] * len(self._windows)

    def __len__(self) -> int:
        return len(self._nodes)

    def root_key(self, tenant: str, salt: str) -> bytes:
        digest = hashlib.sha256(self._secret)
        for part in (tenant.encode("utf-8", "surrogatepass"), salt.encode("utf-8", "surrogatepass")):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        return digest.digest()

    @staticmethod
    def pack(token_ids: Sequence[int]) -> bytes:
        return array("i", token_ids).tobytes()

    @staticmethod
    def chain_key(parent: bytes, tokens: bytes) -> bytes:
        return hashlib.sha256(parent + tokens).digest()

    def match(self, keys: Sequence[bytes], root: bytes, token_ids: Sequence[int]) -> PrefixHit:
        """The longest usable hit among the blocks whose keys are given, in order from the first block.

        A node counts only if its stored parent and token ids equal the ones looked up.
        """
        nodes: list[Node | None] = []
        runs = [0] * len(self._windows)  # per group: how many blocks in a row, up to here, are present
        best = 0
        for index, key in enumerate(keys):
            node = self._verified(key, keys[index - 1] if index else root, token_ids, index)
            nodes.append(node)
            usable = True
            for group, window in enumerate(self._windows):
                present = node is not None and node.blocks[group] is not None
                runs[group] = runs[group] + 1 if present else 0
                first = first_visible_block((index + 1) * self._block_size, window, self._block_size)
                usable = usable and runs[group] >= index + 1 - first
                if not present and window is None:  # nothing longer can be whole
                    return self._hit(nodes, best)
            if usable:
                best = index + 1
        return self._hit(nodes, best)

    def resident(self, key: bytes, parent: bytes, tokens: bytes) -> list[int | None]:
        """The blocks of one full block of tokens, per group; None = not in the pool."""
        node = self._nodes.get(key)
        if node is None or node.parent != parent or node.tokens != tokens:
            return self._nowhere
        return node.blocks

    def is_shared(self, key: bytes) -> bool:
        node = self._nodes.get(key)
        return node is not None and node.is_shared

    def find(self, key: bytes) -> Node | None:
        return self._nodes.get(key)

    def _verified(self, key: bytes, parent: bytes, token_ids: Sequence[int], index: int) -> Node | None:
        node = self._nodes.get(key)
        if node is None or node.parent != parent:
            return None
        start = index * self._block_size
        return node if node.tokens == self.pack(token_ids[start : start + self._block_size]) else None

    def _hit(self, nodes: Sequence[Node | None], num_blocks: int) -> PrefixHit:
        tables = []
        for group, window in enumerate(self._windows):
            first = first_visible_block(num_blocks * self._block_size, window, self._block_size)
            table = [-1] * min(first, num_blocks)
            for node in nodes[len(table) : num_blocks]:
                block = node.blocks[group] if node is not None else None
                if block is None:
                    raise RuntimeError("prefix hit over an evicted block")
                table.append(block)
            tables.append(tuple(table))
        return PrefixHit(num_blocks, tuple(tables))

    def publish(self, key: bytes, parent: bytes, tokens: bytes, blocks: Sequence[int]) -> list[bool]:
        """Offer the blocks (per group, -1 = none) of one full block of tokens; returns which of them were taken.

        A block is not taken where the node has one already: another sequence computed the same prefix first.
        """
        node = self._nodes.get(key)
        if node is None:
            node = Node(parent, tokens, [None] * len(self._windows))
            self._nodes[key] = node
            self._note_child(key, parent)
        elif node.parent != parent or node.tokens != tokens:
            return [False] * len(blocks)
        taken = []
        for group, block in enumerate(blocks):
            take = block >= 0 and node.blocks[group] is None
            if take:
                node.blocks[group] = block
            taken.append(take)
        if all(block is None for block in node.blocks):
            del self._nodes[key]
        return taken

    def _note_child(self, key: bytes, parent: bytes) -> None:
        """Where two went on from one block, it and all before it are shared."""
        node = self._nodes.get(parent)
        if node is None or node.child == key:
            return
        if node.child is None:
            node.child = key
            return
        while node is not None and not node.is_shared:
            node.is_shared = True
            self.newly_shared.append(node)
            node = self._nodes.get(node.parent)

    def evict(self, group: int, key: bytes) -> None:
        """The block of `group` under `key` is gone; a node without blocks is dropped."""
        node = self._nodes[key]
        node.blocks[group] = None
        if all(block is None for block in node.blocks):
            del self._nodes[key]

    def published(self, group: int) -> dict[int, bytes]:
        """Block id -> key of every block of a group, for integrity checks."""
        return {block: key for key, node in self._nodes.items() if (block := node.blocks[group]) is not None}
