"""From a model tree and its checkpoint to a native program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from setpoint import _native
from setpoint.engine.plan import KVGroup
from setpoint.errors import ConfigError, ModelFileError, UnsupportedModelError
from setpoint.loaders.checkpoint import Checkpoint
from setpoint.models.spec import (
    Attention,
    Block,
    GatedMLP,
    Model,
    RMSNorm,
    Rope,
    SandwichBlock,
    UnitOffsetRMSNorm,
)
from setpoint.runtime.cpu.kv_layout import BLOCK_TOKENS
from setpoint.runtime.cpu.rope import rope_frequencies
from setpoint.runtime.cpu.weights import WeightReader

HEAD_SAMPLE = 64  # tokens: enough to see along which directions hidden states are large


@dataclass(frozen=True, slots=True)
class ProgramOptions:
    """`dtype` 'auto' multiplies quantized weights with 8-bit activations; 'f32' is the reference program."""

    dtype: str
    kv_dtype: str
    num_threads: int
    isa: str
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int


@dataclass(frozen=True, slots=True)
class LoweredModel:
    program: _native.Program
    weight_bytes: int
    head_bytes: int  # of them the output matrix
    store: _native.WeightStore  # of the matrices, not packed yet
    sources: list[object]  # what they are packed from
    sample_tokens: NDArray[np.int32]  # typical input, to shorten the head with


def lower(model: Model, checkpoint: Checkpoint, groups: Sequence[KVGroup], options: ProgramOptions) -> LoweredModel:
    """Gives every matrix its place and allocates the KV cache of `groups` (one per distinct window).

    Raises ModelFileError or UnsupportedModelError with the tensor or layer, ConfigError for the options.
    """
    try:
        program = _native.Program(
            isa=options.isa,
            num_threads=options.num_threads,
            kv_format=options.kv_dtype,
            vocab=model.vocab_size,
            max_tokens=options.max_num_batched_tokens,
            max_entries=options.max_num_seqs,
            max_rows=options.max_num_batched_tokens,
            max_model_len=options.max_model_len,
        )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(str(error)) from error
    reader = WeightReader(checkpoint, as_float=options.dtype == "f32")
    try:
        lowering = _Lowering(model, program, reader, groups)
        lowering.run()
        program.put_shortlist(reader.store)
    except MemoryError as error:
        raise ConfigError(
            "not enough memory for the weights and the KV cache; lower --kv-cache-memory-bytes"
        ) from error
    except ValueError as error:
        raise UnsupportedModelError(f"the model cannot be lowered: {error}") from error
    tokens = sample_tokens(model, groups, options)
    return LoweredModel(program, reader.num_bytes, lowering.head_bytes, reader.store, reader.sources, tokens)


def sample_tokens(model: Model, groups: Sequence[KVGroup], options: ProgramOptions) -> NDArray[np.int32]:
    """Ids from all over the vocabulary, as many as a first step may hold."""
    room = min(BLOCK_TOKENS * group.num_blocks for group in groups)
    count = min(HEAD_SAMPLE, room, options.max_num_batched_tokens, options.max_model_len, model.vocab_size)
    return np.linspace(0, model.vocab_size - 1, count).astype(np.int32)


class _Lowering:
    """Emits the program layer by layer. `x` is the residual stream, `h` a part's input and output."""

    def __init__(self, model: Model, program: _native.Program, reader: WeightReader, groups: Sequence[KVGroup]) -> None:
        self.model = model
        self.program = program
        self.reader = reader
        self.groups = {group.window: program.kv_group(group.num_blocks, group.window or 0) for group in groups}
        self.slots: dict[tuple[str, int], int] = {}
        self.rope_tables: dict[tuple[Rope, int], int] = {}
        self.x = self.slot("x", model.hidden)
        self.h = self.slot("h", model.hidden)

    def run(self) -> None:
        model = self.model
        self.embedding()
        for layer in model.layers.layers:  # all angles of a step are computed in its first stage
            self.rope_table(layer.attention)
        for index, layer in enumerate(model.layers.layers):
            self.block(f"{model.layers.name}.{index}.", layer, last=index == len(model.layers.layers) - 1)
        weight = self.reader.matrix(f"{model.head.tied or model.head.name}.weight", model.vocab_size, model.hidden)
        self.head_bytes = weight.nbytes
        self.program.head(self.x, self.norm_weight("", model.norm, model.hidden), model.norm.eps, weight)
        self.reader.check_all_read(f"{model.head.name}.weight")  # some store the tied matrix once more

    def slot(self, name: str, width: int) -> int:
        """One buffer per name and width, shared by all layers."""
        if (name, width) not in self.slots:
            self.slots[name, width] = self.program.slot(width)
        return self.slots[name, width]

    def embedding(self) -> None:
        model = self.model
        name = f"{model.embedding.name}.weight"
        tensor = self.reader.tensor(name, (model.vocab_size, model.hidden))
        try:
            raw = np.ascontiguousarray(tensor.raw)
            self.program.embed(tensor.format, raw, model.embedding.scale, self.x)
        except ValueError as error:
            raise ModelFileError(f"tensor '{name}': {error}") from error

    def rope_table(self, attention: Attention) -> int | None:
        if attention.rope is None:
            return None
        key = attention.rope, attention.head_dim
        if key not in self.rope_tables:
            frequencies, factor = rope_frequencies(*key)
            self.rope_tables[key] = self.program.rope_table(frequencies, factor)
        return self.rope_tables[key]

    def norm_weight(self, prefix: str, norm: RMSNorm, size: int) -> NDArray[np.float32]:
        if type(norm) not in (RMSNorm, UnitOffsetRMSNorm):
            raise UnsupportedModelError(f"layer kind {type(norm).__name__} has no CPU lowering")
        weight = self.reader.vector(f"{prefix}{norm.name}.weight", size)
        return weight + np.float32(1) if isinstance(norm, UnitOffsetRMSNorm) else weight

    def norm(self, prefix: str, norm: RMSNorm, in_slot: int, out_slot: int) -> None:
        self.program.rms_norm(in_slot, self.norm_weight(prefix, norm, self.model.hidden), norm.eps, out_slot)

    def block(self, prefix: str, layer: Block, *, last: bool) -> None:
        if type(layer) not in (Block, SandwichBlock):
            raise UnsupportedModelError(f"layer kind {type(layer).__name__} has no CPU lowering")
        self.norm(prefix, layer.attention_norm, self.x, self.h)
        mixed = self.attention(prefix, layer.attention)
        if last:
            mixed, self.x = (
                self.wanted(mixed, layer.attention.heads * layer.attention.head_dim),
                self.wanted(self.x, self.model.hidden),
            )
        if isinstance(layer, SandwichBlock):
            y = self.slot("y", self.model.hidden)
            self.out_projection(prefix, layer.attention, mixed, y, accumulate=False)
            self.add_normed(prefix, layer.post_attention_norm, y)
        else:
            self.out_projection(prefix, layer.attention, mixed, self.x, accumulate=True)
        self.norm(prefix, layer.mlp_norm, self.x, self.h)
        if isinstance(layer, SandwichBlock):
            self.mlp(prefix, layer.mlp, y, accumulate=False)
            self.add_normed(prefix, layer.post_mlp_norm, y)
        else:
            self.mlp(prefix, layer.mlp, self.x, accumulate=True)

    def add_normed(self, prefix: str, norm: RMSNorm, part: int) -> None:
        """x + norm(part) becomes the residual stream, in the other of two slots: every thread may compute it then."""
        self.norm(prefix, norm, part, self.h)
        names = ("x", "x'")
        other = next(slot for name in names if (slot := self.slot(name, self.model.hidden)) != self.x)
        self.program.add(self.x, self.h, other)
        self.x = other

    def wanted(self, slot: int, width: int) -> int:
        """`slot` without the rows that nobody reads once the last layer's keys and values are stored."""
        selected = self.slot(f"wanted rows of {slot}", width)
        self.program.select_rows(slot, selected)
        return selected

    def linear(
        self, name: str, in_slot: int, out_slot: int, shape: tuple[int, int], *, bias: bool, accumulate: bool = False
    ) -> None:
        """`shape` = (inputs, outputs)."""
        weight = self.reader.matrix(f"{name}.weight", shape[1], shape[0])
        values = self.reader.vector(f"{name}.bias", shape[1]) if bias else None
        self.program.matmul(weight, in_slot, out_slot, values, accumulate)

    def attention(self, prefix: str, attention: Attention) -> int:
        """From `h` to the heads' outputs side by side; returns their slot."""
        program, hidden, head_dim = self.program, self.model.hidden, attention.head_dim
        name = f"{prefix}{attention.name}"
        widths = {
            "q": attention.heads * head_dim,
            "k": attention.kv_heads * head_dim,
            "v": attention.kv_heads * head_dim,
        }
        slots = {projection: self.slot(projection, width) for projection, width in widths.items()}
        for projection, width in widths.items():
            full_name = f"{projection}_proj"
            self.linear(
                f"{name}.{full_name}", self.h, slots[projection], (hidden, width), bias=full_name in attention.bias
            )
        if attention.qk_norm is not None:
            for projection, norm in zip(("q", "k"), attention.qk_norm, strict=True):
                program.head_norm(slots[projection], self.norm_weight(prefix, norm, head_dim), norm.eps)
        table = self.rope_table(attention)
        if table is not None:
            program.rope(slots["q"], head_dim, table)
            program.rope(slots["k"], head_dim, table)
        layer = program.kv_layer(self.groups[attention.window], attention.kv_heads, head_dim)
        program.kv_store(layer, slots["k"], slots["v"])
        mixed = self.slot("attention", widths["q"])
        scale = attention.scale if attention.scale is not None else head_dim**-0.5
        program.attention(layer, scale, slots["q"], mixed)
        return mixed

    def out_projection(
        self, prefix: str, attention: Attention, in_slot: int, out_slot: int, *, accumulate: bool
    ) -> None:
        shape = attention.heads * attention.head_dim, self.model.hidden
        name = f"{prefix}{attention.name}.o_proj"
        self.linear(name, in_slot, out_slot, shape, bias="o_proj" in attention.bias, accumulate=accumulate)

    def mlp(self, prefix: str, mlp: GatedMLP, out_slot: int, *, accumulate: bool) -> None:
        """From `h` to `out_slot`."""
        name, hidden, inner = f"{prefix}{mlp.name}", self.model.hidden, mlp.intermediate
        gate, up = self.slot("gate", inner), self.slot("up", inner)
        self.linear(f"{name}.gate_proj", self.h, gate, (hidden, inner), bias="gate_proj" in mlp.bias)
        self.linear(f"{name}.up_proj", self.h, up, (hidden, inner), bias="up_proj" in mlp.bias)
        self.program.gated_multiply(mlp.act, gate, up)
        self.linear(
            f"{name}.down_proj", gate, out_slot, (inner, hidden), bias="down_proj" in mlp.bias, accumulate=accumulate
        )
