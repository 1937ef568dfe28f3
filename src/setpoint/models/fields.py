"""Reads numbers from a config that a stranger wrote: present, of the right type, within bounds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from setpoint.errors import ModelFileError, UnsupportedModelError
from setpoint.models.spec import LinearScaling, Llama3Scaling, Rope, RopeScaling, YarnScaling

# Far above any published dense model, far below what would hurt us.
MAX_LAYERS = 512
MAX_HIDDEN = 1 << 16
MAX_INTERMEDIATE = 1 << 19
MAX_HEADS = 1024
MAX_HEAD_DIM = 1024
MAX_VOCABULARY = 1 << 22
MAX_POSITION = 1 << 25


def integer(config: Mapping[str, Any], key: str, low: int, high: int, default: int | None = None) -> int:
    """`config[key]` as an integer in [low, high]; `default` when the key is missing or null."""
    value = config.get(key)
    if value is None:
        if default is None:
            raise ModelFileError(f"config has no '{key}'")
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ModelFileError(f"config '{key}' is {value!r}; expected an integer in {low}..{high}")
    return value


def number(config: Mapping[str, Any], key: str, low: float, high: float, default: float | None = None) -> float:
    """`config[key]` as a finite float in [low, high]; `default` when the key is missing or null."""
    value = config.get(key)
    if value is None:
        if default is None:
            raise ModelFileError(f"config has no '{key}'")
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ModelFileError(f"config '{key}' is {value!r}; expected a number in {low}..{high}")
    if not low <= value <= high:
        raise ModelFileError(f"config '{key}' is {value!r}; expected a number in {low}..{high}")
    return float(value)


def flag(config: Mapping[str, Any], key: str, default: bool) -> bool:
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ModelFileError(f"config '{key}' is {value!r}; expected true or false")
    return value


def flags(config: Mapping[str, Any], key: str, length: int) -> list[Any] | None:
    """A per-layer list, or None when the config has none."""
    value = config.get(key)
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or len(value) != length:
        raise ModelFileError(f"config '{key}' must list one entry for each of the {length} layers")
    return list(value)


def activation(config: Mapping[str, Any], key: str, allowed: Mapping[str, Any], default: str) -> Any:
    value = config.get(key) or default
    if not isinstance(value, str) or value not in allowed:
        raise UnsupportedModelError(f"activation '{value}' is not supported here; supported: {', '.join(allowed)}")
    return allowed[value]


def heads(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """(query heads, key/value heads, head_dim), consistent with each other."""
    hidden = integer(config, "hidden_size", 1, MAX_HIDDEN)
    query = integer(config, "num_attention_heads", 1, MAX_HEADS)
    key_value = integer(config, "num_key_value_heads", 1, MAX_HEADS, default=query)
    if query % key_value:
        raise ModelFileError(
            f"config 'num_attention_heads' ({query}) is not a multiple of 'num_key_value_heads' ({key_value})"
        )
    if config.get("head_dim") is None and hidden % query:
        raise ModelFileError(f"config 'hidden_size' ({hidden}) is not a multiple of 'num_attention_heads' ({query})")
    head_dim = integer(config, "head_dim", 2, MAX_HEAD_DIM, default=hidden // query)
    if head_dim % 2:
        raise ModelFileError(f"config 'head_dim' ({head_dim}) is odd; rotary embeddings turn pairs")
    return query, key_value, head_dim


def full_attention_only(config: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError when the config gives some layers another kind of attention."""
    types = config.get("layer_types") or ()
    if not isinstance(types, (list, tuple)):
        raise ModelFileError("config 'layer_types' must be a list")
    if flag(config, "use_sliding_window", False) or any(kind != "full_attention" for kind in types):
        raise UnsupportedModelError(f"{config.get('model_type')} with sliding-window layers is not supported")


def rope(config: Mapping[str, Any], default_theta: float = 10000.0) -> Rope:
    """The rotary embedding of a config, scaling included.

    Transformers 5 writes `rope_parameters` (theta and scaling together); before, `rope_theta` and `rope_scaling`.
    """
    stated = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(stated, Mapping):
        raise ModelFileError("config 'rope_scaling' or 'rope_parameters' must be an object")
    beside = {key: config.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    original = {"original_max_position_embeddings": config.get("max_position_embeddings")}
    parameters = {**beside, **original, **stated}
    if number(parameters, "partial_rotary_factor", 0.0, 1.0, default=1.0) != 1.0:
        raise UnsupportedModelError("a 'partial_rotary_factor' other than 1 is not supported")
    theta = number(parameters, "rope_theta", 1.01, 1e12, default=default_theta)
    return Rope(theta, scaling=rope_scaling(parameters))


# What each kind of scaling may state; another key would change the angles without our knowing.
_ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings", "factor"}
_SCALING_KEYS = {
    "linear": _ROPE_KEYS,
    "llama3": _ROPE_KEYS | {"low_freq_factor", "high_freq_factor"},
    "yarn": _ROPE_KEYS | {"attention_factor", "beta_fast", "beta_slow", "finetuned"},
}


def rope_scaling(scaling: Mapping[str, Any]) -> RopeScaling | None:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind in (None, "default"):
        return None
    if not isinstance(kind, str) or kind not in _SCALING_KEYS:
        raise UnsupportedModelError(
            f"rope scaling {str(kind)[:64]!r} is not supported; supported: default, {', '.join(_SCALING_KEYS)}"
        )
    for key, value in scaling.items():
        if key not in _SCALING_KEYS[kind] and value is not None:
            raise UnsupportedModelError(f"'{str(key)[:64]}' of rope scaling '{kind}' is not supported")
    factor = number(scaling, "factor", 1.0, 1e6)
    if kind == "linear":
        return LinearScaling(factor)
    if kind == "llama3":
        return Llama3Scaling(
            factor,
            number(scaling, "low_freq_factor", 1e-6, 1e6),
            number(scaling, "high_freq_factor", 1e-6, 1e6),
            integer(scaling, "original_max_position_embeddings", 1, MAX_POSITION),
        )
    attention_factor = scaling.get("attention_factor")
    return YarnScaling(
        factor,
        integer(scaling, "original_max_position_embeddings", 1, MAX_POSITION),
        number(scaling, "beta_fast", 1e-3, 1e6, default=32.0),
        number(scaling, "beta_slow", 1e-3, 1e6, default=1.0),
        None if attention_factor is None else number(scaling, "attention_factor", 1e-6, 1e6),
    )
