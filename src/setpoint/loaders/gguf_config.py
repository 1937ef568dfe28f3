"""GGUF metadata as a Hugging Face `config.json`: every number typed and bounded before anything uses it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from setpoint.errors import UnsupportedModelError
from setpoint.loaders.gguf import DTYPES, GGUFArray, GGUFFile, TensorEntry
from setpoint.loaders.gguf_names import Architecture

# Far above any published model of these families.
MAX_LAYERS = 512
MAX_HIDDEN = 1 << 16
MAX_INTERMEDIATE = 1 << 19
MAX_HEADS = 1024
MAX_HEAD_DIM = 1024
MAX_CONTEXT = 1 << 25
MAX_VOCABULARY = 1 << 22

GEMMA3_PATTERN = 6  # every sixth layer sees everything
GEMMA3_27B_LAYERS = 62  # the one size that scales queries by hidden / heads instead of head_dim
SMOLLM3_NO_ROPE_INTERVAL = 4
LLAMA3_LOW, LLAMA3_HIGH = 1.0, 4.0  # of every published model with Llama 3 rope scaling
LLAMA3_ORIGINALS = (8192, *(1 << power for power in range(4, 21)))  # 8192 is published, the others are tried after it

# Keys that change the mathematics of a model and that our families do not have; the value that changes nothing.
_NEUTRAL = {
    "expert_count": 0,
    "logit_scale": 1.0,
    "residual_scale": 1.0,
    "embedding_scale": 1.0,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "attention.causal": True,
}


class Fields:
    """Typed, bounded reads of metadata; `prefix` is put before every key. Errors name the key."""

    def __init__(self, file: GGUFFile, prefix: str = "") -> None:
        self.file = file
        self.prefix = prefix

    def get(self, key: str) -> Any:
        return self.file.metadata.get(self.prefix + key)

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        value = self._uniform(key, self._or_default(key, default))
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.file.fail(f"metadata '{self.prefix}{key}' must be an integer in {low}..{high}")
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        value = self._uniform(key, self._or_default(key, default))
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            self.file.fail(f"metadata '{self.prefix}{key}' must be a number in {low:g}..{high:g}")
        return float(value)

    def text(self, key: str, default: str | None = None) -> str:
        value = self._or_default(key, default)
        if not isinstance(value, str):
            self.file.fail(f"metadata '{self.prefix}{key}' must be a string")
        return value

    def flag(self, key: str) -> bool | None:
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            self.file.fail(f"metadata '{self.prefix}{key}' must be a bool")
        return value

    def _or_default(self, key: str, default: Any) -> Any:
        value = self.get(key)
        if value is None and default is None:
            self.file.fail(f"metadata '{self.prefix}{key}' is missing")
        return default if value is None else value

    def _uniform(self, key: str, value: Any) -> Any:
        """An array of equal numbers, one per layer, counts as that number."""
        if not isinstance(value, GGUFArray) or value.kind not in DTYPES or not len(value):
            return value
        numbers = value.numbers()
        if (numbers != numbers[0]).any():
            raise UnsupportedModelError(
                f"{self.file.name}: metadata '{self.prefix}{key}' differs between layers, which is not supported"
            )
        return numbers[0].item()


def build_config(
    architecture: Architecture,
    file: GGUFFile,
    tensors: dict[str, TensorEntry],
    rope_factors: NDArray[np.float32] | None,
) -> dict[str, Any]:
    """`config.json` of the model in `file` (its first part); `tensors` are those of all parts, by GGUF name."""
    fields = Fields(file, architecture.name + ".")
    for key, neutral in _NEUTRAL.items():
        if fields.get(key) not in (None, neutral):
            raise UnsupportedModelError(f"{file.name}: '{architecture.name}.{key}' = {fields.get(key)} not supported")
    hidden = fields.integer("embedding_length", 1, MAX_HIDDEN)
    heads = fields.integer("attention.head_count", 1, MAX_HEADS)
    kv_heads = fields.integer("attention.head_count_kv", 1, MAX_HEADS, default=heads)
    config: dict[str, Any] = {
        "model_type": architecture.model_type,
        "vocab_size": _vocabulary(file, tensors, hidden),
        "hidden_size": hidden,
        "num_hidden_layers": fields.integer("block_count", 1, MAX_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": _head_dim(fields, hidden, heads, kv_heads),
        "intermediate_size": fields.integer("feed_forward_length", 1, MAX_INTERMEDIATE),
        "max_position_embeddings": fields.integer("context_length", 1, MAX_CONTEXT),
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon", 0.0, 1.0),
        "rope_theta": fields.number("rope.freq_base", 1.0, 1e12, default=10000.0),
        "rope_scaling": _rope_scaling(fields),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    if rope_factors is not None and (rope_factors != 1.0).any():
        config["rope_scaling"] = _llama3_scaling(file, config, rope_factors)
    if architecture.name == "gemma3":
        return config | _gemma3(fields, config)
    config["hidden_act"] = "silu"
    if "attn_output" in architecture.biased:
        biased = {name.split(".")[-2] for name in tensors if name.endswith(".bias")}
        config["attention_bias"] = any(name.startswith("attn_") for name in biased)
        config["mlp_bias"] = any(name.startswith("ffn_") for name in biased)
    if architecture.name == "llama" and fields.get("attention.sliding_window"):
        config["model_type"] = "mistral"
        config["sliding_window"] = fields.integer("attention.sliding_window", 1, MAX_CONTEXT)
    if architecture.name == "smollm3":
        layers = range(1, config["num_hidden_layers"] + 1)
        config["no_rope_layers"] = [int(layer % SMOLLM3_NO_ROPE_INTERVAL != 0) for layer in layers]
    return config


def _vocabulary(file: GGUFFile, tensors: dict[str, TensorEntry], hidden: int) -> int:
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        file.fail("the tensor 'token_embd.weight' is missing")
    if len(embedding.shape) != 2 or embedding.shape[1] != hidden or embedding.shape[0] > MAX_VOCABULARY:
        file.fail(f"tensor 'token_embd.weight' has the shape {embedding.shape}; 'embedding_length' is {hidden}")
    return embedding.shape[0]


def _head_dim(fields: Fields, hidden: int, heads: int, kv_heads: int) -> int:
    """Checked against the other fields that state it; partial rotary embeddings are not supported."""
    if heads % kv_heads:
        fields.file.fail(f"'attention.head_count' {heads} is not a multiple of 'attention.head_count_kv' {kv_heads}")
    stated = fields.get("attention.key_length")
    if stated is None and hidden % heads:
        fields.file.fail(f"'embedding_length' {hidden} is not a multiple of 'attention.head_count' {heads}")
    head_dim = fields.integer("attention.key_length", 2, MAX_HEAD_DIM, default=hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        other = fields.integer(key, 1, MAX_HEAD_DIM, default=head_dim)
        if other != head_dim:
            raise UnsupportedModelError(
                f"{fields.file.name}: '{fields.prefix}{key}' {other} differs from the head size {head_dim};"
                " that is not supported"
            )
    return head_dim


def _rope_scaling(fields: Fields) -> dict[str, Any] | None:
    kind = fields.text("rope.scaling.type", default="none")
    if kind == "none":
        return None
    factor = fields.number("rope.scaling.factor", 1e-3, 1e6, default=1.0)
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        original = fields.integer("context_length", 1, MAX_CONTEXT)
        scaling["original_max_position_embeddings"] = fields.integer(
            "rope.scaling.original_context_length", 1, MAX_CONTEXT, default=original
        )
        for key in ("beta_fast", "beta_slow"):
            if fields.get(f"rope.scaling.yarn_{key}") is not None:
                scaling[key] = fields.number(f"rope.scaling.yarn_{key}", 1e-3, 1e6)
        # GGUF's factor multiplies YaRN's own 0.1 ln(s) + 1; Hugging Face's replaces it.
        attention = fields.number("rope.scaling.attn_factor", 1e-6, 1e6, default=1.0)
        if attention != 1.0:
            scaling["attention_factor"] = attention * (0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)
    elif kind != "linear":
        raise UnsupportedModelError(
            f"{fields.file.name}: rope scaling {kind[:32]!r} is not supported; supported: none, linear, yarn, llama3"
        )
    return scaling


def llama3_factors(theta: float, head_dim: int, factor: float, original: int) -> NDArray[np.float64]:
    """What Llama 3.1 divides each rope frequency by, [head_dim / 2]: `rope_freqs.weight` of a GGUF file."""
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original / wavelength - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW), 0.0, 1.0)
    result: NDArray[np.float64] = 1 / ((1 - smooth) / factor + smooth)
    return result


def _llama3_scaling(file: GGUFFile, config: dict[str, Any], factors: NDArray[np.float32]) -> dict[str, Any]:
    """The parameters that made `factors`: GGUF stores the result, not them."""
    factor, head_dim = float(factors.max()), config["head_dim"]
    if len(factors) * 2 == head_dim and config["rope_scaling"] is None and 1.0 < factor <= 1e6:
        for original in LLAMA3_ORIGINALS:
            if np.allclose(factors, llama3_factors(config["rope_theta"], head_dim, factor, original), 1e-4, 0.0):
                return {
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": LLAMA3_LOW,
                    "high_freq_factor": LLAMA3_HIGH,
                    "original_max_position_embeddings": original,
                }
    raise UnsupportedModelError(f"{file.name}: 'rope_freqs.weight' is not Llama 3 rope scaling; not supported")


def _gemma3(fields: Fields, config: dict[str, Any]) -> dict[str, Any]:
    layers, heads, head_dim = config["num_hidden_layers"], config["num_attention_heads"], config["head_dim"]
    scalar = config["hidden_size"] / heads if layers == GEMMA3_27B_LAYERS else head_dim
    if fields.get("attention.scale") is not None:
        scalar = fields.number("attention.scale", 1e-6, 1e6) ** -2
    pattern = _sliding_layers(fields, layers)
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": fields.integer("attention.sliding_window", 1, MAX_CONTEXT),
        "layer_types": ["sliding_attention" if sliding else "full_attention" for sliding in pattern],
        "rope_theta": fields.number("rope.freq_base", 1.0, 1e12, default=1e6),
        "rope_local_base_freq": fields.number("rope.freq_base_swa", 1.0, 1e12, default=10000.0),
        "query_pre_attn_scalar": scalar,
    }


def _sliding_layers(fields: Fields, layers: int) -> list[bool]:
    """`attention.sliding_window_pattern` is a period, or one bool per layer."""
    stated = fields.file.metadata.get(fields.prefix + "attention.sliding_window_pattern")
    if isinstance(stated, GGUFArray):
        if len(stated) != layers:
            fields.file.fail(f"'attention.sliding_window_pattern' has {len(stated)} entries for {layers} layers")
        return [bool(value) for value in stated.numbers()]
    period = fields.integer("attention.sliding_window_pattern", 1, MAX_LAYERS, default=GEMMA3_PATTERN)
    return [layer % period != 0 for layer in range(1, layers + 1)]
