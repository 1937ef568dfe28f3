"""A forward pass in numpy, float64, one sequence at a time: the plain reading of models/spec.py."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import numpy as np
from numpy.typing import NDArray

from setpoint.models.spec import Attention, GatedMLP, Model, RMSNorm, Rope, SandwichBlock, UnitOffsetRMSNorm

Array = NDArray[np.float64]
Tensors = Mapping[str, NDArray[np.float32]]


def logits(model: Model, tensors: Tensors, tokens: list[int], rounded: Collection[str] = ()) -> Array:
    """[tokens, vocab]. Inputs of the matrices named in `rounded` are rounded to 8 bits, as for quantized weights."""

    def norm(name: str, spec: RMSNorm, x: Array) -> Array:
        weight = tensors[f"{name}.weight"].astype(np.float64) + isinstance(spec, UnitOffsetRMSNorm)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + spec.eps) * weight

    def linear(name: str, x: Array) -> Array:
        x = eight_bit(x) if f"{name}.weight" in rounded else x
        y = x @ tensors[f"{name}.weight"].astype(np.float64).T
        return y + tensors[f"{name}.bias"] if f"{name}.bias" in tensors else y

    x = tensors[f"{model.embedding.name}.weight"][tokens].astype(np.float64) * model.embedding.scale
    for index, layer in enumerate(model.layers.layers):
        prefix = f"{model.layers.name}.{index}."
        h = norm(prefix + layer.attention_norm.name, layer.attention_norm, x)
        h = attention(prefix, layer.attention, h, norm, linear)
        if isinstance(layer, SandwichBlock):
            h = norm(prefix + layer.post_attention_norm.name, layer.post_attention_norm, h)
        x = x + h
        h = norm(prefix + layer.mlp_norm.name, layer.mlp_norm, x)
        h = mlp(prefix + layer.mlp.name, layer.mlp, h, linear)
        if isinstance(layer, SandwichBlock):
            h = norm(prefix + layer.post_mlp_norm.name, layer.post_mlp_norm, h)
        x = x + h
    x = norm(model.norm.name, model.norm, x)
    name = (
        model.head.tied or model.head.name
    )  # its inputs are two planes of 8 bits: what one rounds away is in the other
    if f"{name}.weight" in rounded:
        x = eight_bit(x) + eight_bit(x - eight_bit(x))
    return x @ tensors[f"{name}.weight"].T


def eight_bit(x: Array) -> Array:
    """Every 32 values to multiples of (largest / 127)."""
    groups = x.reshape(*x.shape[:-1], -1, 32)
    scale = np.maximum(np.abs(groups).max(-1, keepdims=True) / 127, 1e-30)
    return (np.rint(groups / scale) * scale).reshape(x.shape)


def attention(prefix: str, spec: Attention, x: Array, norm, linear) -> Array:  # type: ignore[no-untyped-def]
    length, dim = len(x), spec.head_dim
    q = linear(f"{prefix}{spec.name}.q_proj", x).reshape(length, spec.heads, dim)
    k = linear(f"{prefix}{spec.name}.k_proj", x).reshape(length, spec.kv_heads, dim)
    v = linear(f"{prefix}{spec.name}.v_proj", x).reshape(length, spec.kv_heads, dim)
    if spec.qk_norm:
        q = norm(prefix + spec.qk_norm[0].name, spec.qk_norm[0], q)
        k = norm(prefix + spec.qk_norm[1].name, spec.qk_norm[1], k)
    if spec.rope:
        q, k = rotate(q, spec.rope), rotate(k, spec.rope)
    positions = np.arange(length)
    hidden = positions[None, :] > positions[:, None]
    if spec.window:
        hidden |= positions[None, :] <= positions[:, None] - spec.window
    out = np.empty((length, spec.heads, dim))
    for head in range(spec.heads):
        source = head // (spec.heads // spec.kv_heads)
        scores = q[:, head] @ k[:, source].T * (spec.scale if spec.scale is not None else 1 / math.sqrt(dim))
        scores[hidden] = -np.inf
        p = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, head] = p / p.sum(-1, keepdims=True) @ v[:, source]
    return linear(f"{prefix}{spec.name}.o_proj", out.reshape(length, -1))


def rotate(x: Array, rope: Rope) -> Array:
    """Unscaled rope on the first `dim` coordinates of [tokens, heads, head_dim]."""
    assert rope.scaling is None
    dim = rope.dim or x.shape[-1]
    angles = np.arange(len(x))[:, None] * rope.theta ** -(np.arange(0, dim, 2) / dim)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    low, high, rest = np.split(x, [dim // 2, dim], axis=-1)
    return np.concatenate([low * cos - high * sin, high * cos + low * sin, rest], axis=-1)


def mlp(name: str, spec: GatedMLP, x: Array, linear) -> Array:  # type: ignore[no-untyped-def]
    gate, up = linear(f"{name}.gate_proj", x), linear(f"{name}.up_proj", x)
    if spec.act == "silu":
        gate = gate / (1 + np.exp(-gate))
    else:
        gate = 0.5 * gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    return linear(f"{name}.down_proj", gate * up)
