"""Gemma 3 (text): sliding-window and global layers with their own rope, norms around every part, scaled embeddings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from setpoint.errors import ModelFileError, UnsupportedModelError
from setpoint.models import fields
from setpoint.models.spec import (
    Attention,
    Embedding,
    Family,
    GatedMLP,
    Head,
    Model,
    Repeat,
    Rope,
    SandwichBlock,
    UnitOffsetRMSNorm,
)

# What Hugging Face assumes where a config is silent: those of the larger, seeing models are.
DEFAULTS = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "max_position_embeddings": 131_072,
    "sliding_window": 4096,
}


def build(config: Mapping[str, Any]) -> Model:
    config = {**DEFAULTS, **config}
    if fields.flag(config, "use_bidirectional_attention", False):
        raise UnsupportedModelError("Gemma 3 with use_bidirectional_attention is not supported")
    hidden = fields.integer(config, "hidden_size", 1, fields.MAX_HIDDEN)
    layers = fields.integer(config, "num_hidden_layers", 1, fields.MAX_LAYERS)
    intermediate = fields.integer(config, "intermediate_size", 1, fields.MAX_INTERMEDIATE)
    heads, kv_heads, head_dim = fields.heads(config)
    eps = fields.number(config, "rms_norm_eps", 0.0, 1.0, default=1e-6)
    window = fields.integer(config, "sliding_window", 1, fields.MAX_POSITION)
    scale = fields.number(config, "query_pre_attn_scalar", 1e-3, 1e6) ** -0.5
    act = fields.activation(config, "hidden_activation", {"gelu_pytorch_tanh": "gelu_tanh"}, "gelu_pytorch_tanh")
    for softcap in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(softcap) is not None:
            raise UnsupportedModelError(f"config '{softcap}' is not supported")
    local_rope, global_rope = ropes(config)
    sliding = sliding_layers(config, layers)

    def layer(index: int) -> SandwichBlock:
        return SandwichBlock(
            UnitOffsetRMSNorm("input_layernorm", eps),
            Attention(
                "self_attn",
                heads,
                kv_heads,
                head_dim,
                rope=local_rope if sliding[index] else global_rope,
                window=window if sliding[index] else None,
                scale=scale,
                qk_norm=(UnitOffsetRMSNorm("self_attn.q_norm", eps), UnitOffsetRMSNorm("self_attn.k_norm", eps)),
            ),
            UnitOffsetRMSNorm("pre_feedforward_layernorm", eps),
            GatedMLP("mlp", intermediate, act),
            UnitOffsetRMSNorm("post_attention_layernorm", eps),
            UnitOffsetRMSNorm("post_feedforward_layernorm", eps),
        )

    return Model(
        hidden,
        fields.integer(config, "vocab_size", 1, fields.MAX_VOCABULARY),
        fields.integer(config, "max_position_embeddings", 1, fields.MAX_POSITION),
        Embedding("model.embed_tokens", scale=math.sqrt(hidden)),
        Repeat("model.layers", tuple(layer(i) for i in range(layers))),
        UnitOffsetRMSNorm("model.norm", eps),
        Head("lm_head", tied="model.embed_tokens" if fields.flag(config, "tie_word_embeddings", True) else None),
    )


def ropes(config: Mapping[str, Any]) -> tuple[Rope, Rope]:
    """(sliding layers, global layers). Transformers 5 nests them by layer type; before, two bases side by side."""
    nested = config.get("rope_parameters")
    if isinstance(nested, Mapping) and "full_attention" in nested:
        local, whole = nested.get("sliding_attention"), nested["full_attention"]
        if not isinstance(local, Mapping) or not isinstance(whole, Mapping):
            raise ModelFileError("config 'rope_parameters' must hold sliding_attention and full_attention")
        position = {"max_position_embeddings": config["max_position_embeddings"]}
        return (
            fields.rope({**position, "rope_parameters": local}),
            fields.rope({**position, "rope_parameters": whole}, default_theta=1e6),
        )
    local_theta = fields.number(config, "rope_local_base_freq", 1.01, 1e12, default=10000.0)
    return Rope(local_theta), fields.rope(config, default_theta=1e6)


def sliding_layers(config: Mapping[str, Any], layers: int) -> list[bool]:
    types = fields.flags(config, "layer_types", layers)
    if types is None:
        pattern = fields.integer(config, "sliding_window_pattern", 1, fields.MAX_LAYERS, default=6)
        return [(index + 1) % pattern != 0 for index in range(layers)]
    unknown = set(map(str, types)) - {"sliding_attention", "full_attention"}
    if unknown:
        raise UnsupportedModelError(f"layer types not supported: {', '.join(sorted(unknown))}")
    return [kind == "sliding_attention" for kind in types]


FAMILY = Family("gemma3", ("gemma3_text", "gemma3"), build)
