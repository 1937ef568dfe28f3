"""Tiny checkpoints of every family, generated from a seed: as a Hugging Face directory and as GGUF.

The weights are the same in both forms (GGUF may quantize them), so that the loaders can be compared with each other
and the logits with the reference implementation.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from setpoint.loaders.gguf_writer import write
from setpoint.quant.formats import quantize

Array = NDArray[np.float32]

REAL_PROMPT = list(range(500, 564))  # what the real models read in the parity tests
REAL_STRIDE = 997  # of the logits that are kept

BYTE_TOKENS = 256
VOCABULARY = 288
BOS, EOS = 256, 257


@dataclass(frozen=True)
class TinyModel:
    """A family's smallest interesting member. `config` is its Hugging Face config.json."""

    name: str
    gguf_architecture: str
    config: dict[str, Any]
    biases: tuple[str, ...] = ()
    qk_norm: bool = False
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    unit_offset: bool = False
    seed: int = 0
    gguf_keys: dict[str, Any] = field(default_factory=dict)  # beyond the common ones

    @property
    def layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    @property
    def head_dim(self) -> int:
        return int(self.config.get("head_dim") or self.config["hidden_size"] // self.config["num_attention_heads"])


def _config(model_type: str, architecture: str, **more: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "architectures": [architecture],
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": 258,
        "torch_dtype": "float32",
        **more,
    }


LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

YARN_SCALING = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

TINY_MODELS = {
    tiny.name: tiny
    for tiny in (
        TinyModel("llama", "llama", _config("llama", "LlamaForCausalLM"), seed=1),
        TinyModel(
            "llama3",
            "llama",
            _config(
                "llama", "LlamaForCausalLM", rope_scaling=LLAMA3_SCALING, rope_theta=500000.0, tie_word_embeddings=True
            ),
            seed=2,
        ),
        TinyModel(
            "smollm3",
            "smollm3",
            _config(
                "smollm3",
                "SmolLM3ForCausalLM",
                num_hidden_layers=4,
                no_rope_layers=[1, 1, 1, 0],
                no_rope_layer_interval=4,
            ),
            seed=3,
        ),
        TinyModel(
            "mistral", "llama", _config("mistral", "MistralForCausalLM", sliding_window=None, head_dim=24), seed=4
        ),
        TinyModel(
            "mistral-window",
            "llama",
            _config(
                "mistral",
                "MistralForCausalLM",
                sliding_window=12,
                rope_scaling={"rope_type": "linear", "factor": 2.5},
            ),
            seed=8,
        ),
        TinyModel(
            "llama-biases",
            "llama",
            _config("llama", "LlamaForCausalLM", attention_bias=True, mlp_bias=True, rope_scaling=YARN_SCALING),
            biases=PROJECTIONS,
            seed=9,
        ),
        TinyModel(
            "qwen2", "qwen2", _config("qwen2", "Qwen2ForCausalLM"), biases=("q_proj", "k_proj", "v_proj"), seed=5
        ),
        TinyModel("qwen3", "qwen3", _config("qwen3", "Qwen3ForCausalLM", head_dim=32), qk_norm=True, seed=6),
        TinyModel(
            "gemma3",
            "gemma3",
            _config(
                "gemma3_text",
                "Gemma3ForCausalLM",
                num_hidden_layers=7,
                num_key_value_heads=1,
                head_dim=32,
                sliding_window=12,
                query_pre_attn_scalar=32,
                rope_theta=1000000.0,
                rope_local_base_freq=10000.0,
                hidden_activation="gelu_pytorch_tanh",
                tie_word_embeddings=True,
                layer_types=["sliding_attention"] * 5 + ["full_attention", "sliding_attention"],
            ),
            qk_norm=True,
            norms=(
                "input_layernorm",
                "post_attention_layernorm",
                "pre_feedforward_layernorm",
                "post_feedforward_layernorm",
            ),
            unit_offset=True,
            seed=7,
        ),
    )
}


def weights(tiny: TinyModel) -> dict[str, Array]:
    """Every tensor by its Hugging Face name; drawn in a fixed order from PCG64."""
    return dict(_draw(tiny, np.random.default_rng(tiny.seed)))


def _draw(tiny: TinyModel, rng: np.random.Generator) -> Iterator[tuple[str, Array]]:
    config = tiny.config
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    query = config["num_attention_heads"] * tiny.head_dim
    key_value = config["num_key_value_heads"] * tiny.head_dim

    def matrix(rows: int, cols: int) -> Array:
        return (rng.standard_normal((rows, cols)) * (1.5 / np.sqrt(cols))).astype(np.float32)

    def norm(size: int) -> Array:
        drawn = rng.standard_normal(size) * 0.1
        return (drawn if tiny.unit_offset else 1.0 + drawn).astype(np.float32)

    yield "model.embed_tokens.weight", rng.standard_normal((VOCABULARY, hidden)).astype(np.float32)
    for index in range(tiny.layers):
        prefix = f"model.layers.{index}"
        for name, rows, cols in (
            ("self_attn.q_proj", query, hidden),
            ("self_attn.k_proj", key_value, hidden),
            ("self_attn.v_proj", key_value, hidden),
            ("self_attn.o_proj", hidden, query),
            ("mlp.gate_proj", inner, hidden),
            ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ):
            yield f"{prefix}.{name}.weight", matrix(rows, cols)
            if name.rpartition(".")[2] in tiny.biases:
                yield f"{prefix}.{name}.bias", (rng.standard_normal(rows) * 0.5).astype(np.float32)
        for name in tiny.norms:
            yield f"{prefix}.{name}.weight", norm(hidden)
        if tiny.qk_norm:
            yield f"{prefix}.self_attn.q_norm.weight", norm(tiny.head_dim)
            yield f"{prefix}.self_attn.k_norm.weight", norm(tiny.head_dim)
    yield "model.norm.weight", norm(hidden)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", matrix(VOCABULARY, hidden)


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-in for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {byte: chr(byte) for byte in printable}
    for shift, byte in enumerate(byte for byte in range(256) if byte not in alphabet):
        alphabet[byte] = chr(256 + shift)
    return [alphabet[byte] for byte in range(256)]


SPECIAL = ["<|bos|>", "<|eos|>", "<|pad|>"]
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("o", "r"), ("t", "h"), ("th", "e"), ("i", "n"), ("a", "n")]
CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant:"


def vocabulary() -> list[str]:
    tokens = byte_alphabet() + SPECIAL + ["".join(pair) for pair in MERGES]
    return tokens + [f"<unused{i}>" for i in range(VOCABULARY - len(tokens))]


def write_directory(tiny: TinyModel, directory: Path) -> Path:
    """A Hugging Face directory: config.json, model.safetensors, tokenizer.json, tokenizer_config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(tiny.config, indent=1))
    (directory / "generation_config.json").write_text(json.dumps({"bos_token_id": BOS, "eos_token_id": EOS}))
    save_file(weights(tiny), directory / "model.safetensors", metadata={"format": "pt"})
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {
                "id": BYTE_TOKENS + i,
                "content": text,
                "special": True,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
            }
            for i, text in enumerate(SPECIAL)
        ],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {token: index for index, token in enumerate(vocabulary())},
            "merges": [list(pair) for pair in MERGES],
        },
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "chat_template": CHAT_TEMPLATE})
    )
    return directory


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
}


def gguf_name(tiny: TinyModel, name: str) -> str:
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, _, kind = name.rpartition(".")
    if stem in whole:
        return f"{whole[stem]}.{kind}"
    _, _, index, part = stem.split(".", 3)
    sandwich = len(tiny.norms) == 4
    names = GGUF_NAMES | {
        "post_attention_layernorm": "post_attention_norm" if sandwich else "ffn_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    }
    return f"blk.{index}.{names[part]}.{kind}"


def _permuted(rows: Array, heads: int) -> Array:
    """GGUF keeps the q and k rows of llama and smollm3 in the order of interleaved rope."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(tiny: TinyModel, path: Path, *, format: str = "F32", formats: Mapping[str, str] | None = None) -> Path:
    """The same weights as GGUF: matrices in `format`, the rest in F32, but `formats` by Hugging Face name first."""
    config, arch = tiny.config, tiny.gguf_architecture
    metadata: dict[str, Any] = {
        "general.architecture": arch,
        "general.name": f"tiny {tiny.name}",
        f"{arch}.block_count": tiny.layers,
        f"{arch}.context_length": config["max_position_embeddings"],
        f"{arch}.embedding_length": config["hidden_size"],
        f"{arch}.feed_forward_length": config["intermediate_size"],
        f"{arch}.attention.head_count": config["num_attention_heads"],
        f"{arch}.attention.head_count_kv": config["num_key_value_heads"],
        f"{arch}.attention.key_length": tiny.head_dim,
        f"{arch}.attention.value_length": tiny.head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        f"{arch}.rope.freq_base": float(config["rope_theta"]),
        f"{arch}.rope.dimension_count": tiny.head_dim,
        f"{arch}.vocab_size": VOCABULARY,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": vocabulary(),
        "tokenizer.ggml.token_type": [
            3 if BYTE_TOKENS <= i < BYTE_TOKENS + len(SPECIAL) else 1 for i in range(VOCABULARY)
        ],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in MERGES],
        "tokenizer.ggml.bos_token_id": BOS,
        "tokenizer.ggml.eos_token_id": EOS,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }
    if config.get("sliding_window"):
        metadata[f"{arch}.attention.sliding_window"] = config["sliding_window"]
    metadata |= rope_scaling_metadata(tiny)
    tensors = []
    for name, value in weights(tiny).items():
        kind = (formats or {}).get(name, format if value.ndim == 2 else "F32")
        tensors.append(_gguf_tensor(tiny, name, value, kind))
    if (config.get("rope_scaling") or {}).get("rope_type") == "llama3":
        factors = llama3_factors(tiny)
        tensors.append(("rope_freqs.weight", factors.shape, "F32", factors.reshape(1, -1).view(np.uint8)))
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, metadata, tensors)
    return path


def _gguf_tensor(tiny: TinyModel, name: str, value: Array, format: str) -> tuple[Any, ...]:
    stored = value
    if tiny.gguf_architecture in ("llama", "smollm3") and ("q_proj" in name or "k_proj" in name):
        key = "num_attention_heads" if "q_proj" in name else "num_key_value_heads"
        stored = _permuted(value, tiny.config[key])
    if tiny.unit_offset and "norm" in name:
        stored = value + np.float32(1.0)
    rows = np.ascontiguousarray(stored.reshape(1, -1) if stored.ndim == 1 else stored)
    return gguf_name(tiny, name), stored.shape, format, quantize(format, rows)


def rope_scaling_metadata(tiny: TinyModel) -> dict[str, Any]:
    """Llama 3's scaling is a tensor in GGUF; the others are these keys."""
    scaling, prefix = tiny.config.get("rope_scaling") or {}, f"{tiny.gguf_architecture}.rope.scaling."
    if scaling.get("rope_type") not in ("linear", "yarn"):
        return {}
    metadata = {f"{prefix}type": scaling["rope_type"], f"{prefix}factor": scaling["factor"]}
    if "original_max_position_embeddings" in scaling:
        metadata[f"{prefix}original_context_length"] = scaling["original_max_position_embeddings"]
    return metadata


def llama3_factors(tiny: TinyModel) -> Array:
    """What llama.cpp's converter stores for Llama 3.1's scaling: one divisor per frequency."""
    scaling, dim = tiny.config["rope_scaling"], tiny.head_dim
    frequencies = 1.0 / tiny.config["rope_theta"] ** (np.arange(0, dim, 2) / dim)
    length = scaling["original_max_position_embeddings"]
    low, high = length / scaling["low_freq_factor"], length / scaling["high_freq_factor"]
    factors = []
    for frequency in frequencies:
        wavelength = 2 * np.pi / frequency
        if wavelength < high:
            factors.append(1.0)
        elif wavelength > low:
            factors.append(scaling["factor"])
        else:
            smooth = (length / wavelength - scaling["low_freq_factor"]) / (
                scaling["high_freq_factor"] - scaling["low_freq_factor"]
            )
            factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(factors, dtype=np.float32)


def prompts(tiny: TinyModel) -> list[list[int]]:
    """Three prompts of uneven length, longer than a block and longer than the sliding window."""
    rng = np.random.default_rng(1000 + tiny.seed)
    return [[int(token) for token in rng.integers(0, VOCABULARY, size)] for size in (37, 7, 18)]
