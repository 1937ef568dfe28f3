"""Dividing KV memory among groups: within the budget, fair to every length, room for one whole sequence."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from setpoint.errors import ConfigError
from setpoint.models.spec import Attention, Block, Embedding, GatedMLP, Head, Model, Repeat, RMSNorm
from setpoint.runtime.cpu.kv_layout import GroupShape, divide, group_shapes


def model_of(*windows: int | None) -> Model:
    norm = RMSNorm("n", 1e-5)
    layers = tuple(
        Block(norm, Attention("a", 4, 2, 8, rope=None, window=window), norm, GatedMLP("m", 16, "silu"))
        for window in windows
    )
    return Model(32, 64, 4096, Embedding("e"), Repeat("l", layers), norm, Head("h"))


def test_layers_of_equal_window_share_a_group() -> None:
    full, small, large = group_shapes(model_of(64, None, 512, 64, 64), "f16", 2048, 128)
    block = 2 * 2 * 8 * 16 * 2  # K and V, heads, head_dim, tokens, bytes
    assert full == GroupShape(None, block, 128)
    assert small == GroupShape(64, 3 * block, (64 + 128) // 16 + 1)
    assert large == GroupShape(512, block, (512 + 128) // 16 + 1)


def test_f32_takes_twice_the_bytes_and_short_contexts_need_no_window() -> None:
    (half,) = group_shapes(model_of(512), "bf16", 100, 64)
    (whole,) = group_shapes(model_of(512), "f32", 100, 64)
    assert whole.block_bytes == 2 * half.block_bytes
    assert half.max_blocks == 7


@given(
    st.lists(st.builds(GroupShape, st.none(), st.integers(1, 5000), st.integers(1, 400)), min_size=1, max_size=3),
    st.integers(1, 1 << 24),
    st.integers(1, 64),
)
def test_the_division(shapes: list[GroupShape], num_bytes: int, max_num_seqs: int) -> None:
    one_sequence = sum(shape.max_blocks * shape.block_bytes for shape in shapes)
    slack = sum(shape.block_bytes for shape in shapes)
    if one_sequence > num_bytes + slack:
        with pytest.raises(ConfigError, match="--kv-cache-memory-bytes"):
            divide(shapes, num_bytes, max_num_seqs)
        return
    groups = divide(shapes, num_bytes, max_num_seqs)
    used = sum(group.num_blocks * shape.block_bytes for group, shape in zip(groups, shapes, strict=True))
    assert used <= num_bytes + slack
    assert all(group.num_blocks >= shape.max_blocks for group, shape in zip(groups, shapes, strict=True))

    # No longer equal length would have fit.
    shares = [group.num_blocks // max_num_seqs for group in groups]
    cut = [share for share, shape in zip(shares, shapes, strict=True) if share < shape.max_blocks]
    if cut:
        longer = [max(max_num_seqs * min(min(cut) + 1, shape.max_blocks), shape.max_blocks) for shape in shapes]
        assert sum(n * shape.block_bytes for n, shape in zip(longer, shapes, strict=True)) > num_bytes + slack


def test_many_short_sequences_are_not_starved_by_the_window() -> None:
    """64 chats of 500 tokens need as many blocks of a windowed group as of the full one."""
    shapes = [GroupShape(None, 3 * 1024, 2048), GroupShape(512, 15 * 1024, 65)]
    full, window = divide(shapes, 64 * 32 * 18 * 1024, 64)
    assert min(full.num_blocks, window.num_blocks) >= 64 * 30
