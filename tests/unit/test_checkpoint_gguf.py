"""GGUF models as checkpoints: translation of names, rows, norms and configuration, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from setpoint.errors import ModelError, ModelFileError, UnsupportedModelError
from setpoint.loaders.checkpoint import Checkpoint, open_checkpoint
from setpoint.loaders.gguf import STRING, GGUFArray, GGUFFile
from setpoint.loaders.gguf_config import llama3_factors
from setpoint.loaders.gguf_names import pairs_to_halves
from setpoint.loaders.gguf_writer import NamedTensor, write
from setpoint.quant.formats import dequantize, quantize
from setpoint.text.source import TokenizerMetadata
from tiny_models import (
    CHAT_TEMPLATE,
    MERGES,
    TINY_MODELS,
    TinyModel,
    gguf_name,
    rope_scaling_metadata,
    vocabulary,
    weights,
)

PERMUTED = ("llama", "smollm3")  # architectures whose q and k rows a converter reorders


def base_metadata(tiny: TinyModel) -> dict[str, Any]:
    config, prefix = tiny.config, tiny.gguf_architecture + "."
    own = {
        "block_count": tiny.layers,
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": tiny.head_dim,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(config["rope_theta"]),
    }
    if config.get("sliding_window"):
        own["attention.sliding_window"] = config["sliding_window"]
    metadata = {"general.architecture": tiny.gguf_architecture} | {prefix + key: value for key, value in own.items()}
    return metadata | rope_scaling_metadata(tiny)


TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": vocabulary(),
    "tokenizer.ggml.token_type": [3 if 256 <= index < 259 else 1 for index in range(len(vocabulary()))],
    "tokenizer.ggml.merges": [" ".join(pair) for pair in MERGES],
    "tokenizer.ggml.bos_token_id": 256,
    "tokenizer.ggml.eos_token_id": 257,
    "tokenizer.chat_template": CHAT_TEMPLATE,
}


def halves_to_pairs(values: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    return values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def tensors(tiny: TinyModel, weight_format: str = "F32") -> list[NamedTensor]:
    result: list[NamedTensor] = []
    for name, value in weights(tiny).items():
        if tiny.gguf_architecture in PERMUTED and ("q_proj" in name or "k_proj" in name):
            value = halves_to_pairs(
                value, tiny.config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            )
        if tiny.unit_offset and "norm" in name:
            value = value + np.float32(1.0)
        kind = weight_format if value.ndim == 2 and value.shape[1] % 32 == 0 else "F32"
        rows = np.ascontiguousarray(value.reshape(1, -1) if value.ndim == 1 else value)
        result.append((gguf_name(tiny, name), value.shape, kind, quantize(kind, rows)))
    scaling = tiny.config.get("rope_scaling") or {}
    if scaling.get("rope_type") == "llama3":
        factors = llama3_factors(
            tiny.config["rope_theta"], tiny.head_dim, scaling["factor"], scaling["original_max_position_embeddings"]
        ).astype(np.float32)
        result.append(("rope_freqs.weight", factors.shape, "F32", factors.reshape(1, -1).view(np.uint8)))
    return result


Build = Callable[..., Checkpoint]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Writes a variation of a tiny model and opens it. A metadata value of None removes the key."""

    def build(
        model: str = "llama", changes: dict[str, Any] | None = None, replaced: list[NamedTensor] | None = None
    ) -> Checkpoint:
        metadata = base_metadata(TINY_MODELS[model]) | TOKENIZER | (changes or {})
        metadata = {key: value for key, value in metadata.items() if value is not None}
        write(tmp_path / "m.gguf", metadata, tensors(TINY_MODELS[model]) if replaced is None else replaced)
        return open_checkpoint(tmp_path / "m.gguf")

    return build


# --------------------------------------------------------------------------------------------------- translation


@pytest.mark.parametrize("model", TINY_MODELS)
@pytest.mark.parametrize("weight_format", ["F32", "Q8_0"])
def test_every_tensor_comes_back(model: str, weight_format: str, build: Build) -> None:
    tiny = TINY_MODELS[model]
    checkpoint = build(model, replaced=tensors(tiny, weight_format))
    expected = weights(tiny)
    assert sorted(checkpoint.tensor_names()) == sorted(expected)
    for name, value in expected.items():
        tensor = checkpoint.tensor(name)
        assert (tensor.name, tensor.shape) == (name, value.shape)
        assert tensor.raw.shape[0] == (value.shape[0] if value.ndim == 2 else 1)
        rows = value if value.ndim == 2 else value.reshape(1, -1)
        if "norm" in name and tiny.unit_offset:
            np.testing.assert_allclose(dequantize(tensor.format, tensor.raw), rows, rtol=0, atol=1e-7)
        else:
            np.testing.assert_array_equal(tensor.raw, quantize(tensor.format, np.ascontiguousarray(rows)))


@pytest.mark.parametrize("model", TINY_MODELS)
def test_config_is_the_original_one(model: str, build: Build) -> None:
    config = build(model).config
    expected = TINY_MODELS[model].config
    for key in set(config) & set(expected) - {"model_type"}:
        assert config[key] == expected[key], key
    assert config["model_type"] == ("llama" if model == "mistral" else expected["model_type"])
    assert config["head_dim"] == TINY_MODELS[model].head_dim
    assert config.get("rope_scaling") == expected.get("rope_scaling")
    for key in ("layer_types", "no_rope_layers", "rope_local_base_freq", "query_pre_attn_scalar", "sliding_window"):
        assert config.get(key) == expected.get(key), key


def test_rows_are_put_back_in_the_order_of_half_split_rope() -> None:
    """The scores of interleaved rope on the stored rows are those of half-split rope on ours."""
    rng = np.random.default_rng(0)
    heads, dim = 3, 8
    stored = rng.standard_normal((2, heads * dim))  # what a projection with the stored rows gives: q and k
    ours = [pairs_to_halves(v.astype(np.float32).reshape(-1, 1).view(np.uint8), heads).view(np.float32) for v in stored]
    angles = 5.0 * 100.0 ** (-np.arange(0, dim, 2) / dim)

    q, k = (v.reshape(heads, dim // 2, 2) @ np.array([1, 1j]) for v in stored)
    interleaved = np.real((q * np.exp(1j * angles)) * np.conj(k)).sum(-1)
    q, k = (v.reshape(heads, 2, dim // 2)[:, 0] + 1j * v.reshape(heads, 2, dim // 2)[:, 1] for v in ours)
    halves = np.real((q * np.exp(1j * angles)) * np.conj(k)).sum(-1)
    np.testing.assert_allclose(halves, interleaved, rtol=1e-5)


def test_biases_of_permuted_projections_follow_their_rows(build: Build) -> None:
    tiny = TINY_MODELS["llama"]
    bias = np.arange(64, dtype=np.float32)
    stored = np.ascontiguousarray(halves_to_pairs(bias, 4)).astype(np.float16)
    checkpoint = build(
        replaced=[*tensors(tiny), ("blk.1.attn_q.bias", (64,), "F16", stored.reshape(1, -1).view(np.uint8))]
    )
    tensor = checkpoint.tensor("model.layers.1.self_attn.q_proj.bias")
    assert (tensor.shape, tensor.format) == ((64,), "F32")
    np.testing.assert_array_equal(dequantize(tensor.format, tensor.raw), bias[None])
    assert checkpoint.config["attention_bias"] is True


def test_weights_are_views_of_the_file(build: Build) -> None:
    raw = build("qwen2").tensor("model.layers.0.self_attn.q_proj.weight").raw
    assert not raw.flags.owndata
    assert not raw.flags.writeable


def test_head_is_tied_when_there_is_no_output(build: Build) -> None:
    untied = build("llama")
    assert (untied.config["tie_word_embeddings"], untied.has_tensor("lm_head.weight")) == (False, True)
    tied = build("qwen3", replaced=[t for t in tensors(TINY_MODELS["qwen3"]) if t[0] != "output.weight"])
    assert (tied.config["tie_word_embeddings"], tied.has_tensor("lm_head.weight")) == (True, False)
    with pytest.raises(ModelFileError, match=r"m.gguf: the tensor 'lm_head.weight' is missing"):
        tied.tensor("lm_head.weight")


def test_split_checkpoint_equals_the_whole(tmp_path: Path, build: Build) -> None:
    tiny = TINY_MODELS["gemma3"]
    whole = build("gemma3")
    metadata = base_metadata(tiny) | TOKENIZER
    paths = write(tmp_path / "s.gguf", metadata, tensors(tiny), tensors_per_part=10)
    assert len(paths) > 3
    split = open_checkpoint(paths[2])
    assert split.config == whole.config
    assert list(split.tensor_names()) == list(whole.tensor_names())
    for name in whole.tensor_names():
        np.testing.assert_array_equal(split.tensor(name).raw, whole.tensor(name).raw)
    assert len({whole.digest(), split.digest(), open_checkpoint(paths[0]).digest()}) == 2


# ------------------------------------------------------------------------------------------------- configuration


def rope_freqs(values: Any) -> NamedTensor:
    factors = np.asarray(values, np.float32)
    return "rope_freqs.weight", factors.shape, "F32", factors.reshape(1, -1).view(np.uint8)


@pytest.mark.parametrize(("factor", "original"), [(8.0, 8192), (32.0, 8192), (8.0, 64)])
def test_llama3_scaling_is_recovered(factor: float, original: int, build: Build) -> None:
    head_dim, theta = 16, 500000.0
    factors = llama3_factors(theta, head_dim, factor, original)
    assert len(set(factors)) > 2  # the blended band is not empty
    checkpoint = build("llama", {"llama.rope.freq_base": theta}, [*tensors(TINY_MODELS["llama"]), rope_freqs(factors)])
    assert checkpoint.config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }
    assert not checkpoint.has_tensor("rope_freqs.weight")


def test_published_llama_31_factors(build: Build) -> None:
    """The band of Llama 3.1 8B (theta 500000, 128 a head): 1 up to frequency 28, 8 from 44 on."""
    factors = llama3_factors(500000.0, 128, 8.0, 8192)
    assert (factors[:29] == 1.0).all()
    assert ((factors[29:35] > 1.0) & (factors[29:35] < 8.0)).all()
    assert (factors[35:] == 8.0).all()


@pytest.mark.parametrize(
    "values", [[1, 2, 3, 4, 5, 6, 7, 8], [1, 1, 8], [1, 1, 1, 1, 1, 1, 1, np.nan], [0.5] * 8, [1e9] * 8]
)
def test_other_rope_factors_are_refused(values: list[float], build: Build) -> None:
    with pytest.raises(UnsupportedModelError, match=r"rope_freqs.weight"):
        build("llama", None, [*tensors(TINY_MODELS["llama"]), rope_freqs(values)])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"type": "none"}, None),
        ({"type": "linear", "factor": 8.0}, {"rope_type": "linear", "factor": 8.0}),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 512},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
        ),
        (
            {"type": "yarn", "factor": 4.0, "yarn_beta_fast": 16.0, "attn_factor": 0.5},
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 2048,
                "beta_fast": 16.0,
                "attention_factor": pytest.approx(0.5 * (0.1 * np.log(4.0) + 1)),
            },
        ),
    ],
)
def test_rope_scaling(changes: dict[str, Any], expected: Any, build: Build) -> None:
    checkpoint = build("qwen2", {f"qwen2.rope.scaling.{key}": value for key, value in changes.items()})
    assert checkpoint.config["rope_scaling"] == expected


def test_numbers_per_layer_that_agree_are_one_number(build: Build) -> None:
    assert build("llama", {"llama.attention.head_count": [4, 4]}).config["num_attention_heads"] == 4


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "sssssgs"),
        ({"gemma3.attention.sliding_window_pattern": 3}, "ssgssgs"),
        ({"gemma3.attention.sliding_window_pattern": [True, False, True, True, True, True, False]}, "sgssssg"),
    ],
)
def test_gemma_layer_types(changes: dict[str, Any], expected: str, build: Build) -> None:
    kinds = build("gemma3", changes).config["layer_types"]
    assert "".join("g" if kind == "full_attention" else "s" for kind in kinds) == expected


def test_gemma_attention_scale(build: Build) -> None:
    config = build("gemma3", {"gemma3.attention.scale": 168.0**-0.5, "gemma3.rope.freq_base_swa": 5000.0}).config
    assert config["query_pre_attn_scalar"] == pytest.approx(168.0, rel=1e-6)
    assert config["rope_local_base_freq"] == 5000.0
    assert config["rms_norm_eps"] == 1e-5  # not the nearest 32-bit float


def test_sliding_window_of_a_llama_makes_it_a_mistral(build: Build) -> None:
    config = build("llama", {"llama.attention.sliding_window": 512}).config
    assert (config["model_type"], config["sliding_window"]) == ("mistral", 512)


UNSUPPORTED = {
    "unknown architecture": ({"general.architecture": "mamba"}, r"'mamba' is not supported; .*llama, smollm3, qwen2"),
    "experts": ({"llama.expert_count": 8}, "expert_count"),
    "softcap": ({"llama.final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    "partial rope": ({"llama.rope.dimension_count": 8}, r"rope.dimension_count' 8 differs from the head size 16"),
    "value size": ({"llama.attention.value_length": 32}, "value_length"),
    "rope scaling": ({"llama.rope.scaling.type": "longrope"}, "'longrope' is not supported"),
    "heads differ": ({"llama.attention.head_count": [4, 2]}, "differs between layers"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported(case: str, build: Build) -> None:
    changes, fragment = UNSUPPORTED[case]
    with pytest.raises(UnsupportedModelError, match=fragment):
        build("llama", changes)


MALFORMED = {
    "no architecture": {"general.architecture": None},
    "architecture a number": {"general.architecture": 7},
    "no layers": {"llama.block_count": None},
    "0 layers": {"llama.block_count": 0},
    "too many layers": {"llama.block_count": 1 << 31},
    "layers as text": {"llama.block_count": "2"},
    "layers as a bool": {"llama.block_count": True},
    "hidden 0": {"llama.embedding_length": 0},
    "hidden differs from the embedding": {"llama.embedding_length": 128},
    "hidden huge": {"llama.embedding_length": 1 << 40},
    "heads huge": {"llama.attention.head_count": 1 << 30},
    "heads 0": {"llama.attention.head_count": 0},
    "heads negative": {"llama.attention.head_count": -4},
    "kv heads do not divide": {"llama.attention.head_count_kv": 3},
    "kv heads 0": {"llama.attention.head_count_kv": 0},
    "head size huge": {"llama.attention.key_length": 1 << 20},
    "intermediate huge": {"llama.feed_forward_length": (1 << 32) - 1},
    "context huge": {"llama.context_length": (1 << 32) - 1},
    "context 0": {"llama.context_length": 0},
    "eps NaN": {"llama.attention.layer_norm_rms_epsilon": float("nan")},
    "eps negative": {"llama.attention.layer_norm_rms_epsilon": -1.0},
    "theta infinite": {"llama.rope.freq_base": float("inf")},
    "theta 0": {"llama.rope.freq_base": 0.0},
    "factor NaN": {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": float("nan")},
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_configuration(case: str, build: Build) -> None:
    changes = MALFORMED[case]
    with pytest.raises(ModelFileError) as caught:
        build("llama", changes)
    assert next(reversed(changes)).removeprefix("llama.") in str(caught.value)


def test_a_tensor_we_cannot_place_is_refused(build: Build) -> None:
    extra = ("blk.0.ffn_gate_inp.weight", (4, 64), "F32", np.zeros((4, 256), np.uint8))
    with pytest.raises(UnsupportedModelError, match=r"'blk.0.ffn_gate_inp.weight' is not part of the architecture"):
        build("llama", None, [*tensors(TINY_MODELS["llama"]), extra])
    with pytest.raises(UnsupportedModelError, match=r"'blk.1"):
        build("llama", {"llama.block_count": 1})


def test_missing_embedding_and_wrong_row_count(build: Build) -> None:
    all_tensors = tensors(TINY_MODELS["llama"])
    with pytest.raises(ModelFileError, match=r"'token_embd.weight' is missing"):
        build("llama", None, [t for t in all_tensors if t[0] != "token_embd.weight"])
    wrong = ("blk.0.attn_q.weight", (62, 64), "F32", np.zeros((62, 256), np.uint8))
    checkpoint = build("llama", None, [wrong if t[0] == wrong[0] else t for t in all_tensors])
    with pytest.raises(ModelFileError, match=r"'blk.0.attn_q.weight' has 62 rows; expected 64"):
        checkpoint.tensor("model.layers.0.self_attn.q_proj.weight")


# ----------------------------------------------------------------------------------------------------- tokenizer


def test_tokenizer_and_generation(build: Build) -> None:
    checkpoint = build(
        "llama",
        {
            "tokenizer.ggml.padding_token_id": 258,
            "tokenizer.ggml.unknown_token_id": (1 << 32) - 1,
            "tokenizer.ggml.add_bos_token": True,
            "tokenizer.ggml.eot_token_id": 258,
            "general.name": "Tiny",
            "general.sampling.temp": 0.5,
            "general.sampling.top_k": 20,
        },
    )
    tokenizer = checkpoint.tokenizer
    assert isinstance(tokenizer, TokenizerMetadata)
    assert (tokenizer.model, tokenizer.pre, tokenizer.tokens) == ("gpt2", "gpt-2", vocabulary())
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.pad_id) == (256, 257, None, 258)
    assert (tokenizer.add_bos, tokenizer.add_eos, tokenizer.add_space_prefix) == (True, None, None)
    assert tokenizer.merges == TOKENIZER["tokenizer.ggml.merges"]
    assert tokenizer.token_types is not None
    assert list(tokenizer.token_types) == TOKENIZER["tokenizer.ggml.token_type"]
    assert checkpoint.chat_template == CHAT_TEMPLATE
    assert checkpoint.name == "Tiny"
    generation = checkpoint.generation
    assert (generation.bos_token_id, generation.eos_token_ids) == (256, (257, 258))
    assert (generation.temperature, generation.top_k, generation.top_p) == (0.5, 20, None)


def test_control_tokens_that_end_a_turn_end_generation(build: Build) -> None:
    tokens = vocabulary()
    tokens[258], tokens[270] = "<|im_end|>", "<|eot_id|>"  # only the first is a control token
    assert build("llama", {"tokenizer.ggml.tokens": tokens}).generation.eos_token_ids == (257, 258)


def test_scores_of_sentencepiece(build: Build) -> None:
    scores = [float(-index) for index in range(288)]
    changes = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.merges": None, "tokenizer.ggml.scores": scores}
    tokenizer = build("llama", changes).tokenizer
    assert isinstance(tokenizer, TokenizerMetadata)
    assert tokenizer.scores is not None
    assert (list(tokenizer.scores), tokenizer.merges) == (scores, None)


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"tokenizer.ggml.tokens": None}, "tokens' is missing"),
        ({"tokenizer.ggml.tokens": 5}, "tokens' must be an array"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "tokens' must be an array of strings"),
        ({"tokenizer.ggml.tokens": ["a"] * 289}, "has 289 entries; the embedding has 288"),
        ({"tokenizer.ggml.merges": None}, "merges' is missing"),
        ({"tokenizer.ggml.token_type": [1]}, "token_type' has 1 entries for 288"),
        ({"tokenizer.ggml.scores": [1.0]}, "scores' has 1 entries for 288"),
        ({"tokenizer.ggml.bos_token_id": 288}, "bos_token_id' must be an integer in 0..287"),
        ({"tokenizer.ggml.eos_token_id": -1}, "eos_token_id' must"),
        ({"tokenizer.ggml.add_bos_token": 1}, "add_bos_token' must be a bool"),
        ({"tokenizer.ggml.pre": 1}, "pre' must be a string"),
        ({"general.sampling.top_p": 2.0}, "top_p' must"),
        ({"tokenizer.ggml.model": "bert"}, "tokenizer 'bert' is not supported; supported: gpt2, llama"),
    ],
)
def test_malformed_tokenizer(changes: dict[str, Any], fragment: str, build: Build) -> None:
    checkpoint = build("llama", changes)
    with pytest.raises(ModelError, match=fragment):
        _ = checkpoint.generation


def test_chat_template_must_be_text(build: Build) -> None:
    with pytest.raises(ModelFileError, match=r"'tokenizer.chat_template' must be a string"):
        build("llama", {"tokenizer.chat_template": 7})


# ---------------------------------------------------------------------------------------------------------- fuzz


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, int]:
    """A path to write to, a valid file, and the size of its header."""
    path = tmp_path_factory.mktemp("fuzz") / "m.gguf"
    tiny = TINY_MODELS["gemma3"]
    write(path, base_metadata(tiny) | TOKENIZER, tensors(tiny))
    first = min(entry.offset for entry in GGUFFile(path).tensors.values())
    return path, path.read_bytes(), first


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=4))
def test_flipped_bytes_parse_or_are_refused(fuzzed: tuple[Path, bytes, int], flips: list[tuple[float, int]]) -> None:
    path, valid, header = fuzzed
    content = bytearray(valid)
    for place, mask in flips:
        content[int(place * (header - 1))] ^= mask
    path.unlink()
    path.write_bytes(content)
    error = refusal(path)
    assert error is None or ("\n" not in error and str(path.parent) not in error)


def refusal(path: Path) -> str | None:
    """Reads all there is to read; the message of a refusal, or None. Anything else escapes."""
    try:
        checkpoint = open_checkpoint(path)
        for name in checkpoint.tensor_names():
            checkpoint.tensor(name)
        _ = checkpoint.generation
        for value in GGUFFile(path).metadata.values():
            if isinstance(value, GGUFArray) and value.kind != STRING:
                value.numbers().sum()
    except (ModelFileError, UnsupportedModelError) as error:
        return str(error)
    return None
