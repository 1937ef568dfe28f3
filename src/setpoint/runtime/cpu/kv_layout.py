"""How the KV cache's memory is divided: layers of equal window share a group, groups share the bytes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from setpoint.engine.plan import KVGroup
from setpoint.errors import ConfigError
from setpoint.models.spec import Model

BLOCK_TOKENS = 16
FORMAT_VERSION = 1  # of the record that Program.read_kv makes
ELEMENT_BYTES = {"s16": 2, "f16": 2, "bf16": 2, "f32": 4}
SCALE_BYTES = {"s16": 4}  # of a token's K or V of one head


@dataclass(frozen=True, slots=True)
class GroupShape:
    window: int | None
    block_bytes: int  # of one block over all layers of the group
    max_blocks: int  # that one sequence can hold


def layer_groups(model: Model) -> tuple[int | None, ...]:
    """The windows of the groups: full attention first, then by size."""
    windows = {layer.attention.window for layer in model.layers.layers}
    return tuple(sorted(windows, key=lambda window: (window is not None, window or 0)))


def group_shapes(model: Model, kv_dtype: str, max_model_len: int, max_num_batched_tokens: int) -> list[GroupShape]:
    shapes = []
    for window in layer_groups(model):
        layers = [layer.attention for layer in model.layers.layers if layer.attention.window == window]
        token_bytes = sum(
            2 * layer.kv_heads * (layer.head_dim * ELEMENT_BYTES[kv_dtype] + SCALE_BYTES.get(kv_dtype, 0))
            for layer in layers
        )
        blocks = _blocks(max_model_len)
        if window is not None:  # the window of a chunk's first token, the chunk, and a block cut at either end
            blocks = min(blocks, _blocks(window + max_num_batched_tokens) + 1)
        shapes.append(GroupShape(window, token_bytes * BLOCK_TOKENS, blocks))
    return shapes


def divide(shapes: list[GroupShape], num_bytes: int, max_num_seqs: int) -> tuple[KVGroup, ...]:
    """Blocks per group so that `max_num_seqs` sequences of equal and greatest possible length fit.

    At least one sequence of full length always fits. Raises ConfigError when `num_bytes` is less than that needs.
    """

    def blocks_for(length: int) -> list[int]:  # in blocks, for every sequence
        return [max(max_num_seqs * min(length, shape.max_blocks), shape.max_blocks) for shape in shapes]

    def bytes_of(counts: list[int]) -> int:
        return sum(count * shape.block_bytes for count, shape in zip(counts, shapes, strict=True))

    # A budget computed in tokens may end inside a block.
    budget = num_bytes + sum(shape.block_bytes for shape in shapes)
    if bytes_of(blocks_for(0)) > budget:
        needed = bytes_of(blocks_for(0))
        raise ConfigError(
            f"one sequence of full length needs {needed} bytes of KV cache, {num_bytes} are given; "
            "raise --kv-cache-memory-bytes or lower --max-model-len"
        )
    low, high = 0, max(shape.max_blocks for shape in shapes)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if bytes_of(blocks_for(middle)) <= budget else (low, middle - 1)
    counts = blocks_for(low)
    if spare := num_bytes - bytes_of(counts):  # everything fits: the rest keeps more prefixes
        counts = [count + max(0, spare) * count // bytes_of(counts) for count in counts]
    return tuple(KVGroup(count, shape.window, shape.block_bytes) for count, shape in zip(counts, shapes, strict=True))


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)


def kv_fingerprint(model: Model, weights: str, dtype: str, kv_dtype: str, numeric_version: int) -> str:
    """Of everything that a block's bytes depend on besides its tokens: saved blocks of another one are not read.

    `weights` is the checkpoint's digest, the model tree holds shapes, windows and rope. Instruction set and threads are
    not in it: they change no bit (decision 1).
    """
    parts = (FORMAT_VERSION, numeric_version, BLOCK_TOKENS, dtype, kv_dtype, weights, repr(model))
    return hashlib.sha256(repr(parts).encode()).hexdigest()
