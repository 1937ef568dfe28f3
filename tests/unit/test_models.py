from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from setpoint.errors import ModelFileError, UnsupportedModelError
from setpoint.models import FAMILIES, build_model
from setpoint.models.spec import Llama3Scaling, Rope, SandwichBlock, UnitOffsetRMSNorm, YarnScaling
from tiny_models import TINY_MODELS


@pytest.mark.parametrize("name", sorted(TINY_MODELS))
def test_every_family_builds(name: str) -> None:
    tiny = TINY_MODELS[name]
    model = build_model(tiny.config)
    assert len(model.layers.layers) == tiny.layers
    attention = model.layers.layers[0].attention
    assert attention.head_dim == tiny.head_dim
    assert attention.bias + model.layers.layers[0].mlp.bias == tiny.biases
    assert (attention.qk_norm is not None) == tiny.qk_norm
    assert model.head.tied == ("model.embed_tokens" if tiny.config["tie_word_embeddings"] else None)


def test_gemma3_alternates_windows_and_ropes() -> None:
    model = build_model(TINY_MODELS["gemma3"].config)
    windows = [block.attention.window for block in model.layers.layers]
    assert windows == [12, 12, 12, 12, 12, None, 12]
    thetas = {
        block.attention.window: block.attention.rope.theta for block in model.layers.layers if block.attention.rope
    }
    assert thetas == {12: 10000.0, None: 1000000.0}
    assert all(isinstance(block, SandwichBlock) for block in model.layers.layers)
    assert isinstance(model.norm, UnitOffsetRMSNorm)
    assert model.embedding.scale == 8.0


def test_smollm3_leaves_rope_out_where_its_config_says() -> None:
    model = build_model(TINY_MODELS["smollm3"].config)
    assert [block.attention.rope is not None for block in model.layers.layers] == [True, True, True, False]


def test_llama3_scaling_is_read() -> None:
    rope = build_model(TINY_MODELS["llama3"].config).layers.layers[0].attention.rope
    assert rope is not None
    assert rope.scaling == Llama3Scaling(8.0, 1.0, 4.0, 32)


def rewritten(config: dict[str, Any]) -> dict[str, Any]:
    """As transformers 5 writes the config: theta and scaling in one place, by layer type for Gemma."""
    config = dict(config)
    scaling = config.pop("rope_scaling", None) or {"rope_type": "default"}
    parameters = {"rope_theta": config.pop("rope_theta"), **scaling}
    if local := config.pop("rope_local_base_freq", None):
        layers = {"full_attention": parameters, "sliding_attention": {"rope_theta": local, "rope_type": "default"}}
        return config | {"rope_parameters": layers, "use_bidirectional_attention": False}
    more = {"use_sliding_window": False, "max_window_layers": 28} if config["model_type"].startswith("qwen") else {}
    if config["model_type"] != "mistral":
        more["layer_types"] = ["full_attention"] * config["num_hidden_layers"]
    return config | {"rope_parameters": parameters} | more


@pytest.mark.parametrize("name", sorted(TINY_MODELS))
def test_configs_of_transformers_5_mean_the_same(name: str) -> None:
    config = TINY_MODELS[name].config
    assert build_model(rewritten(config)) == build_model(config)


def test_scaling_beside_theta_is_not_lost() -> None:
    """Theta may stay outside of `rope_parameters`; YaRN's original context defaults to the model's."""
    config = {**TINY_MODELS["llama"].config, "rope_parameters": {"rope_type": "yarn", "factor": 2.0}}
    rope = build_model(config).layers.layers[0].attention.rope
    assert rope == Rope(10000.0, scaling=YarnScaling(2.0, 2048))


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


def test_silent_configs_mean_what_hugging_face_assumes() -> None:
    mistral = without(TINY_MODELS["mistral"].config, "sliding_window")
    assert build_model(mistral).layers.layers[0].attention.window == 4096
    smollm3 = build_model(without(TINY_MODELS["smollm3"].config, "no_rope_layers", "tie_word_embeddings", "rope_theta"))
    ropes = [block.attention.rope for block in smollm3.layers.layers]
    assert ropes == [Rope(2e6)] * 3 + [None]
    assert smollm3.head.tied == "model.embed_tokens"
    stated = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "sliding_window", "rope_scaling")
    seeing = {key: value for key, value in TINY_MODELS["gemma3"].config.items() if key in stated}
    gemma = build_model(seeing)  # the text part of google/gemma-3-4b-it says no more
    attention = gemma.layers.layers[0].attention
    assert (attention.heads, attention.kv_heads, attention.head_dim, attention.scale) == (8, 4, 256, 1 / 16)
    assert (gemma.vocab_size, gemma.max_position) == (262_208, 131_072)


def test_an_unknown_family_is_named_with_the_supported_ones() -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        build_model({"model_type": "mamba9"})
    assert "mamba9" in str(caught.value)
    for family in FAMILIES:
        assert all(kind in str(caught.value) for kind in family.model_types)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": -64}, "hidden_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": [1]}, "rope_scaling"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"head_dim": 15}, "head_dim"),
        ({"rope_theta": 1.0, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_theta"),
        ({"layer_types": "full_attention"}, "layer_types"),
    ],
)
def test_a_bad_config_field_is_named(change: dict[str, Any], field: str) -> None:
    with pytest.raises(ModelFileError, match=field):
        build_model({**TINY_MODELS["llama"].config, **change})


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama", {"rope_scaling": {"rope_type": "novel", "factor": 2.0}}),
        ("llama", {"hidden_act": "relu"}),
        ("qwen2", {"use_sliding_window": True}),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 64}),
        ("llama", {"partial_rotary_factor": 0.5}),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}),
        ("llama", {"rope_scaling": {"rope_type": ["yarn"], "factor": 2.0}}),
        ("gemma3", {"use_bidirectional_attention": True}),
        ("gemma3", {"final_logit_softcapping": 30.0}),
        ("gemma3", {"layer_types": ["linear_attention"] * 7}),
    ],
)
def test_what_we_do_not_support_is_refused(name: str, change: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError):
        build_model({**TINY_MODELS[name].config, **change})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@given(name=st.sampled_from(sorted(TINY_MODELS)), key=st.data(), value=JSON)
def test_any_value_of_any_field_builds_or_is_refused(name: str, key: st.DataObject, value: object) -> None:
    config = dict(TINY_MODELS[name].config)
    config[key.draw(st.sampled_from(sorted(config)))] = value
    with contextlib.suppress(ModelFileError, UnsupportedModelError):
        build_model(config)
