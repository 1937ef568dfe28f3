"""The prefix tree: what may be shared, between whom, and what a window or an eviction leaves usable."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from setpoint.engine.plan import KVGroup
from setpoint.engine.prefix_tree import PrefixTree, first_visible_block

SIZE = 4


class Filled:
    """A tree in which the blocks of `tokens` are published as ids 0, 1, 2 ... in every group."""

    def __init__(self, tokens: list[int], *windows: int | None) -> None:
        self.tree = PrefixTree([KVGroup(64, window) for window in windows], SIZE, secret=b"s")
        self.tokens = tokens
        self.root = self.tree.root_key("tenant", "salt")
        self.keys = self.chain(tokens, self.root)
        for index, key in enumerate(self.keys):
            parent = self.keys[index - 1] if index else self.root
            self.tree.publish(key, parent, self.tree.pack(self.block(index)), [index] * len(windows))

    def block(self, index: int) -> list[int]:
        return self.tokens[index * SIZE : (index + 1) * SIZE]

    def chain(self, tokens: list[int], root: bytes) -> list[bytes]:
        keys = []
        for start in range(0, len(tokens) - SIZE + 1, SIZE):
            keys.append(self.tree.chain_key(keys[-1] if keys else root, self.tree.pack(tokens[start : start + SIZE])))
        return keys

    def hit(self, tokens: list[int] | None = None, root: bytes | None = None) -> int:
        tokens = self.tokens if tokens is None else tokens
        root = self.root if root is None else root
        return self.tree.match(self.chain(tokens, root), root, tokens).num_blocks


def test_the_longest_common_prefix_hits() -> None:
    filled = Filled(list(range(16)), None)
    assert filled.hit() == 4
    assert filled.hit(list(range(9))) == 2
    assert filled.hit([*range(8), 99, 9, 10, 11, *range(12, 16)]) == 2  # the last block is equal, its prefix is not
    assert filled.hit([99, *range(1, 16)]) == 0


def test_tenants_and_salts_share_nothing() -> None:
    filled = Filled(list(range(16)), None)
    for tenant, salt in [("other", "salt"), ("tenant", "other"), ("tenantsalt", ""), ("", "tenantsalt"), ("t", "")]:
        assert filled.hit(root=filled.tree.root_key(tenant, salt)) == 0
    assert filled.hit(root=filled.tree.root_key("tenant", "salt")) == 4


def test_keys_depend_on_the_secret_of_the_process() -> None:
    groups = [KVGroup(4)]
    assert PrefixTree(groups, SIZE).root_key("", "") != PrefixTree(groups, SIZE).root_key("", "")


def test_a_colliding_key_does_not_hit() -> None:
    """The lookup compares token ids and parents: an equal key alone is not believed."""
    filled = Filled(list(range(8)), None)
    assert filled.tree.match(filled.keys, filled.root, [0, 1, 2, 3, 4, 5, 6, 99]).num_blocks == 1
    assert filled.tree.match(filled.keys, filled.root, [99, 1, 2, 3, 4, 5, 6, 7]).num_blocks == 0
    assert filled.tree.match(filled.keys, b"x" * 32, list(range(8))).num_blocks == 0
    taken = filled.tree.publish(filled.keys[0], filled.root, filled.tree.pack([9, 9, 9, 9]), [7])
    assert taken == [False]


def test_the_first_to_publish_keeps_the_place() -> None:
    filled = Filled(list(range(8)), None, 4)
    tokens = filled.tree.pack(filled.block(0))
    assert filled.tree.publish(filled.keys[0], filled.root, tokens, [40, 41]) == [False, False]
    filled.tree.evict(1, filled.keys[0])
    assert filled.tree.publish(filled.keys[0], filled.root, tokens, [40, 41]) == [False, True]
    assert filled.tree.publish(filled.keys[0], filled.root, tokens, [-1, -1]) == [False, False]


def test_an_evicted_block_ends_the_hit_and_an_empty_node_goes() -> None:
    filled = Filled(list(range(16)), None)
    filled.tree.evict(0, filled.keys[2])
    assert filled.hit() == 2
    assert len(filled.tree) == 3
    filled.tree.evict(0, filled.keys[0])
    assert filled.hit() == 0


def test_a_window_needs_only_what_the_next_token_sees() -> None:
    filled = Filled(list(range(24)), None, 8)  # 6 blocks; the token at 24 sees 17..24
    for index in range(4):
        filled.tree.evict(1, filled.keys[index])
    hit = filled.tree.match(filled.keys, filled.root, filled.tokens)
    assert hit.num_blocks == 6
    assert hit.block_tables == ((0, 1, 2, 3, 4, 5), (-1, -1, -1, -1, 4, 5))
    filled.tree.evict(1, filled.keys[5])
    assert filled.hit() == 0  # block 4 alone is not the window of any shorter prefix


def test_a_shorter_prefix_hits_where_its_window_is_whole() -> None:
    filled = Filled(list(range(24)), None, 5)  # a hit of n blocks needs block n - 1
    filled.tree.evict(1, filled.keys[5])
    assert filled.hit() == 5
    filled.tree.evict(1, filled.keys[3])
    assert filled.hit() == 5
    filled.tree.evict(1, filled.keys[4])
    assert filled.hit() == 3


def test_only_windowed_groups_hit_across_lost_blocks() -> None:
    filled = Filled(list(range(24)), 4)
    for index in (0, 1, 2):
        filled.tree.evict(0, filled.keys[index])
    assert filled.hit() == 6


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2)), max_size=14),
    st.lists(st.sampled_from([None, 1, 2, 4, 5, 7, 8, 9, 30]), min_size=3, max_size=3),
)
def test_a_hit_is_the_longest_for_which_every_visible_block_exists(
    evictions: list[tuple[int, int]], windows: list[int | None]
) -> None:
    filled = Filled(list(range(24)), *windows)
    left = [set(range(6)) for _ in windows]
    for index, group in evictions:
        if index in left[group]:
            left[group].remove(index)
            filled.tree.evict(group, filled.keys[index])

    def usable(length: int) -> bool:
        return all(
            position // SIZE in left[group]
            for group, window in enumerate(windows)
            for position in range(length * SIZE)
            if window is None or position > length * SIZE - window
        )

    hit = filled.tree.match(filled.keys, filled.root, filled.tokens)
    assert hit.num_blocks == max(length for length in range(7) if usable(length))
    for group, window in enumerate(windows):
        first = first_visible_block(hit.num_blocks * SIZE, window, SIZE)
        expected = [-1 if index < first else index for index in range(hit.num_blocks)]
        assert list(hit.block_tables[group]) == expected


@pytest.mark.parametrize("tokens", [[0], [1, 2, 3], [2**31 - 1]])
def test_keys_are_sha256_over_parent_and_tokens(tokens: list[int]) -> None:
    packed = PrefixTree.pack(tokens)
    assert len(packed) == 4 * len(tokens)
    assert PrefixTree.chain_key(b"p" * 32, packed) == hashlib.sha256(b"p" * 32 + packed).digest()


def test_a_block_is_shared_when_different_blocks_went_on_from_it() -> None:
    filled = Filled(list(range(16)), None)
    assert not any(filled.tree.is_shared(key) for key in filled.keys)
    other = [*range(8), 99, 9, 10, 11]
    keys = filled.chain(other, filled.root)
    filled.tree.publish(keys[2], keys[1], filled.tree.pack(other[8:12]), [9])
    assert [filled.tree.is_shared(key) for key in filled.keys] == [True, True, False, False]
    assert len(filled.tree.newly_shared) == 2
    longer = filled.chain(list(range(20)), filled.root)
    filled.tree.publish(longer[4], longer[3], filled.tree.pack(list(range(16, 20))), [10])
    assert not filled.tree.is_shared(filled.keys[3])  # one line goes on
