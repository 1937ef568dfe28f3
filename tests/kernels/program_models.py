"""Small models of every layer kind, random weights in memory, and ways to run them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from setpoint.engine.plan import LogitsRow, PlanEntry, StepPlan
from setpoint.errors import ModelFileError
from setpoint.models.spec import (
    Attention,
    Block,
    Embedding,
    GatedMLP,
    Head,
    Model,
    Repeat,
    RMSNorm,
    Rope,
    SandwichBlock,
    UnitOffsetRMSNorm,
)
from setpoint.quant.formats import dequantize, quantize
from setpoint.runtime.cpu.runner import CpuRunner

VOCAB, HIDDEN, INNER = 96, 64, 96
FLOATS = NDArray[np.float32]


@dataclass(frozen=True)
class StoredTensor:
    name: str
    shape: tuple[int, ...]
    format: str
    raw: NDArray[np.uint8]


class MemoryCheckpoint:
    """Random float32 weights, stored in `format` where they are matrices."""

    def __init__(self, model: Model, format: str = "F32", seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.values: dict[str, FLOATS] = {}  # as a program reads them, after rounding to the format
        self.stored: dict[str, StoredTensor] = {}
        for name, shape in shapes_of(model):
            value = rng.standard_normal(shape) * (0.3 if len(shape) == 1 else 1.5 / np.sqrt(shape[-1]))
            self.put(name, value.astype(np.float32) + np.float32(len(shape) == 1), format if len(shape) == 2 else "F32")

    def put(self, name: str, value: FLOATS, format: str = "F32") -> None:
        raw = quantize(format, np.atleast_2d(value))
        self.stored[name] = StoredTensor(name, value.shape, format, raw)
        self.values[name] = dequantize(format, raw).reshape(value.shape)

    def tensor_names(self) -> list[str]:
        return list(self.stored)

    name = "in memory"

    def read_ahead(self) -> None:
        """It is in memory."""

    def digest(self) -> str:
        return hashlib.sha256(b"".join(tensor.raw.tobytes() for tensor in self.stored.values())).hexdigest()

    def tensor(self, name: str) -> StoredTensor:
        if name not in self.stored:
            raise ModelFileError(f"no tensor '{name}'")
        return self.stored[name]


def shapes_of(model: Model) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{model.embedding.name}.weight", (model.vocab_size, model.hidden)
    yield f"{model.norm.name}.weight", (model.hidden,)
    if model.head.tied is None:
        yield f"{model.head.name}.weight", (model.vocab_size, model.hidden)
    for index, layer in enumerate(model.layers.layers):
        prefix = f"{model.layers.name}.{index}"
        attention, mlp = layer.attention, layer.mlp
        norms = [layer.attention_norm, layer.mlp_norm]
        if isinstance(layer, SandwichBlock):
            norms += [layer.post_attention_norm, layer.post_mlp_norm]
        yield from ((f"{prefix}.{norm.name}.weight", (model.hidden,)) for norm in norms)
        yield from ((f"{prefix}.{norm.name}.weight", (attention.head_dim,)) for norm in attention.qk_norm or ())
        q, kv = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
        matrices = {"q_proj": (q, model.hidden), "k_proj": (kv, model.hidden), "v_proj": (kv, model.hidden)}
        matrices["o_proj"] = (model.hidden, q)
        for name, shape in matrices.items():
            yield f"{prefix}.{attention.name}.{name}.weight", shape
            if name in attention.bias:
                yield f"{prefix}.{attention.name}.{name}.bias", shape[:1]
        for name, shape in (
            ("gate_proj", (mlp.intermediate, model.hidden)),
            ("up_proj", (mlp.intermediate, model.hidden)),
            ("down_proj", (model.hidden, mlp.intermediate)),
        ):
            yield f"{prefix}.{mlp.name}.{name}.weight", shape


ATTENTION = Attention("attn", heads=4, kv_heads=2, head_dim=16, rope=Rope(10000.0))


def model_of(*layers: Block, tied: bool = False, scale: float = 1.0) -> Model:
    return Model(
        HIDDEN,
        VOCAB,
        4096,
        Embedding("embed", scale),
        Repeat("layers", layers),
        RMSNorm("norm", 1e-5),
        Head("head", tied="embed" if tied else None),
    )


def block(attention: Attention = ATTENTION, **mlp: Any) -> Block:
    return Block(RMSNorm("n1", 1e-5), attention, RMSNorm("n2", 1e-5), GatedMLP("mlp", INNER, "silu", **mlp))


def gemma_block(window: int | None) -> SandwichBlock:
    norms = [UnitOffsetRMSNorm(f"n{i}", 1e-6) for i in range(4)]
    qk_norm = (UnitOffsetRMSNorm("attn.qn", 1e-6), UnitOffsetRMSNorm("attn.kn", 1e-6))
    rope = Rope(1e6 if window is None else 1e4)
    attention = Attention("attn", 3, 1, 32, rope, window=window, scale=0.2, qk_norm=qk_norm)
    return SandwichBlock(norms[0], attention, norms[1], GatedMLP("mlp", INNER, "gelu_tanh"), norms[2], norms[3])


MODELS = {
    "grouped": model_of(block(), block()),
    "one head each": model_of(block(replace(ATTENTION, kv_heads=4)), tied=True),
    "no rope": model_of(block(), block(replace(ATTENTION, rope=None))),
    "partial rope": model_of(block(replace(ATTENTION, rope=Rope(100.0, dim=8)))),
    "biases": model_of(block(replace(ATTENTION, bias=("q_proj", "k_proj", "v_proj", "o_proj")))),
    "qk norm": model_of(block(replace(ATTENTION, qk_norm=(RMSNorm("attn.qn", 1e-5), RMSNorm("attn.kn", 1e-5))))),
    "window": model_of(block(replace(ATTENTION, window=20)), block()),
    "gemma": model_of(gemma_block(24), gemma_block(24), gemma_block(None), tied=True, scale=8.0),
}


def open_runner(model: Model, checkpoint: MemoryCheckpoint, **options: Any) -> CpuRunner:
    defaults: dict[str, Any] = {
        "dtype": "auto",
        "kv_dtype": "f32",
        "num_threads": 2,
        "max_model_len": 256,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 256,
        "kv_cache_memory_bytes": 8 << 20,
    }
    runner = CpuRunner(model, checkpoint, **(defaults | options))  # type: ignore[arg-type]
    runner.program.set_patient(True)  # a step of a small model is over before a thread wakes up
    return runner


def tokens_of(length: int, seed: int = 1) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, VOCAB, length)]


def tables(runner: CpuRunner, length: int, sequence: int = 0) -> tuple[list[int], ...]:
    """Blocks of a sequence, scattered: no two logical neighbours are neighbours in memory."""
    count = -(-length // runner.info.block_size)
    found = []
    for group in runner.info.kv_groups:
        order = np.random.default_rng(7).permutation(group.num_blocks)
        found.append([int(block) for block in order[sequence * count : (sequence + 1) * count]])
        assert len(found[-1]) == count
    return tuple(found)


def chunks_of(length: int, sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    begin, index = 0, 0
    while begin < length:
        size = min(sizes[min(index, len(sizes) - 1)], length - begin)
        yield begin, begin + size
        begin, index = begin + size, index + 1


def run(runner: CpuRunner, tokens: list[int], sizes: Sequence[int], first_wanted: int = 0) -> FLOATS:
    """Logits from `first_wanted` on, computed in chunks of the given sizes (the last one repeats)."""
    blocks, rows = tables(runner, len(tokens)), []
    for begin, end in chunks_of(len(tokens), sizes):
        wanted = [LogitsRow(i - begin, target=0) for i in range(begin, end) if i >= first_wanted]
        rows.append(runner.logits(StepPlan([PlanEntry(0, tokens[begin:end], begin, blocks, wanted)])))
    return np.concatenate(rows)


def distance(ours: FLOATS, reference: NDArray[np.float64]) -> float:
    """Root mean square, relative to the reference's: rounding noise in all logits, blind to one unlucky row."""
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))


def same_bits(left: FLOATS, right: FLOATS) -> bool:
    return left.shape == right.shape and np.array_equal(left.view(np.uint32), right.view(np.uint32))
