"""Llama 2 and 3, Mistral, TinyLlama, SmolLM2 and SmolLM3 (which leaves rope out of some layers)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from setpoint.models import fields
from setpoint.models.spec import Attention, Block, Embedding, Family, GatedMLP, Head, Model, Repeat, RMSNorm

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# What Hugging Face assumes where a config is silent, if it is not what Llama assumes.
DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "smollm3": {"rope_theta": 2e6, "no_rope_layer_interval": 4, "tie_word_embeddings": True},
}


def build(config: Mapping[str, Any]) -> Model:
    config = {**DEFAULTS.get(str(config.get("model_type")), {}), **config}
    fields.full_attention_only(config)
    hidden = fields.integer(config, "hidden_size", 1, fields.MAX_HIDDEN)
    layers = fields.integer(config, "num_hidden_layers", 1, fields.MAX_LAYERS)
    intermediate = fields.integer(config, "intermediate_size", 1, fields.MAX_INTERMEDIATE)
    heads, kv_heads, head_dim = fields.heads(config)
    eps = fields.number(config, "rms_norm_eps", 0.0, 1.0, default=1e-6)
    rope = fields.rope(config)
    with_rope = layers_with_rope(config, layers)
    bias = PROJECTIONS if fields.flag(config, "attention_bias", False) else ()
    mlp_bias = MLP_PROJECTIONS if fields.flag(config, "mlp_bias", False) else ()
    act = fields.activation(config, "hidden_act", {"silu": "silu"}, "silu")
    window = config.get("sliding_window") if config.get("model_type") == "mistral" else None

    def layer(index: int) -> Block:
        return Block(
            RMSNorm("input_layernorm", eps),
            Attention(
                "self_attn",
                heads,
                kv_heads,
                head_dim,
                rope=rope if with_rope[index] else None,
                window=None if window is None else fields.integer(config, "sliding_window", 1, fields.MAX_POSITION),
                bias=bias,
            ),
            RMSNorm("post_attention_layernorm", eps),
            GatedMLP("mlp", intermediate, act, bias=mlp_bias),
        )

    return Model(
        hidden,
        fields.integer(config, "vocab_size", 1, fields.MAX_VOCABULARY),
        fields.integer(config, "max_position_embeddings", 1, fields.MAX_POSITION),
        Embedding("model.embed_tokens"),
        Repeat("model.layers", tuple(layer(i) for i in range(layers))),
        RMSNorm("model.norm", eps),
        Head("lm_head", tied="model.embed_tokens" if fields.flag(config, "tie_word_embeddings", False) else None),
    )


def layers_with_rope(config: Mapping[str, Any], layers: int) -> list[bool]:
    """SmolLM3 lists them (1 = the layer has rope), or leaves every n-th out; the others have it everywhere."""
    if config.get("model_type") != "smollm3":
        return [True] * layers
    listed = fields.flags(config, "no_rope_layers", layers)
    if listed is not None:
        return [bool(entry) for entry in listed]
    interval = fields.integer(config, "no_rope_layer_interval", 1, fields.MAX_LAYERS)
    return [layer % interval != 0 for layer in range(1, layers + 1)]


FAMILY = Family("llama", ("llama", "mistral", "smollm3"), build)
