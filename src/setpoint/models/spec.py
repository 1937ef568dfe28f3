"""A model is data: a tree of layer specs that carry checkpoint names (Hugging Face convention).

Each backend lowers the tree once, at load. Specs know neither quantization nor parallelism nor batch.
A kind of layer is a class; names are relative to the enclosing `Repeat` (`{prefix}.{index}.{name}`),
absolute elsewhere; a linear layer's tensors are `{name}.weight` and `{name}.bias`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Positions divided by `factor` (position interpolation, arXiv 2306.15595)."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1 frequency-dependent scaling."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071)."""

    factor: float
    original_max_position: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding, half-split pairing (x[i], x[i + dim/2]); `dim` leading coordinates, None = head_dim."""

    theta: float
    dim: int | None = None
    scaling: RopeScaling | None = None


@dataclass(frozen=True, slots=True)
class Embedding:
    name: str
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """y = x / sqrt(mean(x^2) + eps) * weight."""

    name: str
    eps: float


@dataclass(frozen=True, slots=True)
class UnitOffsetRMSNorm(RMSNorm):
    """y = x / sqrt(mean(x^2) + eps) * (1 + weight): Gemma."""


@dataclass(frozen=True, slots=True)
class Attention:
    """Grouped-query attention with {name}.{q,k,v,o}_proj; causal.

    `qk_norm` names per-head norms {name}.q_norm / {name}.k_norm applied before rope. `bias` lists projections
    with a bias. `window` = number of tokens a query sees, itself included. `scale` None = 1/sqrt(head_dim).
    """

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope | None
    window: int | None = None
    scale: float | None = None
    qk_norm: tuple[RMSNorm, RMSNorm] | None = None
    bias: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GatedMLP:
    """down(act(gate(x)) * up(x)) with {name}.{gate,up,down}_proj."""

    name: str
    intermediate: int
    act: Activation
    bias: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Block:
    """x += attention(norm(x)); x += mlp(norm(x))."""

    attention_norm: RMSNorm
    attention: Attention
    mlp_norm: RMSNorm
    mlp: GatedMLP


@dataclass(frozen=True, slots=True)
class SandwichBlock(Block):
    """x += norm(attention(norm(x))); x += norm(mlp(norm(x))): Gemma 2 and 3."""

    post_attention_norm: RMSNorm
    post_mlp_norm: RMSNorm


@dataclass(frozen=True, slots=True)
class Repeat:
    """`layers[i]` has the prefix `{name}.{i}`."""

    name: str
    layers: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class Head:
    """Logits = x @ weight^T; `tied` is the name of the embedding when the weight is shared."""

    name: str
    tied: str | None = None


@dataclass(frozen=True, slots=True)
class Model:
    hidden: int
    vocab_size: int
    max_position: int
    embedding: Embedding
    layers: Repeat
    norm: RMSNorm
    head: Head


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture: Hugging Face `model_type`s and `architectures` it serves, and its builder.

    `build` receives the Hugging Face config as a plain mapping and raises `UnsupportedModelError` or
    `ModelFileError` (missing or absurd field) with the field's name.
    """

    name: str
    model_types: tuple[str, ...]
    build: Callable[[Mapping[str, Any]], Model]
