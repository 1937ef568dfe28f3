"""GGUF architectures as data: tensor names to Hugging Face names, and what was done to the values.

Two conversions change values, and both are undone here. Architecture `llama` stores the rows of q and k in pairs
(x[2i], x[2i+1]) for interleaved rope; Hugging Face stores halves (x[i], x[i + dim/2]). Whole rows move, so quantized
rows move losslessly. Gemma's norms are stored as 1 + w.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from setpoint.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True)
class Architecture:
    """`block` maps names inside `blk.N.` to names inside `model.layers.N.`; `biased` ones may have a bias."""

    name: str
    model_type: str
    block: Mapping[str, str]
    biased: tuple[str, ...] = ()
    permuted: tuple[str, ...] = ()
    unit_offset_norms: bool = False


_ROOT = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LLAMA = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA3 = {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_QKV = ("attn_q", "attn_k", "attn_v")
_MLP = ("ffn_gate", "ffn_up", "ffn_down")

ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        Architecture("llama", "llama", _LLAMA, (*_QKV, "attn_output", *_MLP), ("attn_q", "attn_k")),
        Architecture("smollm3", "smollm3", _LLAMA, (*_QKV, "attn_output"), ("attn_q", "attn_k")),
        Architecture("qwen2", "qwen2", _LLAMA, _QKV),
        Architecture("qwen3", "qwen3", _LLAMA | _QK_NORM),
        Architecture("gemma3", "gemma3_text", _LLAMA | _QK_NORM | _GEMMA3, unit_offset_norms=True),
    )
}

# Derived values that converters leave in the file: the configuration says the same.
_DERIVED = re.compile(r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd(\.weight)?", re.ASCII)


def find_architecture(name: str) -> Architecture:
    if name not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"architecture {name[:64]!r} is not supported; supported in GGUF: {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[name]


def hugging_face_names(architecture: Architecture, num_layers: int) -> dict[str, str]:
    """Every name such a model may have: GGUF name -> Hugging Face name."""
    names = {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in _ROOT.items()}
    for index in range(num_layers):
        for ours, theirs in architecture.block.items():
            names[f"blk.{index}.{ours}.weight"] = f"model.layers.{index}.{theirs}.weight"
        for ours in architecture.biased:
            names[f"blk.{index}.{ours}.bias"] = f"model.layers.{index}.{architecture.block[ours]}.bias"
    return names


def is_derived(name: str) -> bool:
    return _DERIVED.fullmatch(name) is not None


def is_permuted(architecture: Architecture, name: str) -> bool:
    """Whether the rows of the tensor with this GGUF name are stored in pairs."""
    return name.startswith("blk.") and name.split(".")[2] in architecture.permuted


def is_offset_norm(architecture: Architecture, name: str) -> bool:
    """Whether the tensor with this GGUF name is a norm stored as 1 + w."""
    return architecture.unit_offset_norms and name.endswith("norm.weight")


def pairs_to_halves(rows: NDArray[np.uint8], num_heads: int) -> NDArray[np.uint8]:
    """[heads * head_dim, bytes], a copy: GGUF's row order to Hugging Face's. head_dim must be even."""
    return rows.reshape(num_heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)
