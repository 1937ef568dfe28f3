"""Every weight format through a whole model: file, loader, packing, kernels, logits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from forward import Logits, Walk, all_logits, open_runner, plain
from setpoint import _native
from setpoint.loaders.checkpoint import open_checkpoint
from setpoint.quant.formats import FORMATS, quantize
from tiny_models import TINY_MODELS, TinyModel, prompts, weights, write_directory, write_gguf

# Rows of 256 inputs everywhere, so that the formats in blocks of 256 fit every matrix.
LLAMA = TINY_MODELS["llama"]
WIDE = replace(LLAMA, config={**LLAMA.config, "hidden_size": 256, "intermediate_size": 512, "head_dim": 64})
FLOAT_FORMATS = ("F32", "F16", "BF16")
MIXED = {"embed_tokens": "Q8_0", "lm_head": "Q6_K", "v_proj": "Q6_K", "down_proj": "Q5_0", "k_proj": "F16"}


def distance(ours: Logits, reference: Logits) -> float:
    """Root mean square, relative to the reference's."""
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))


def same_bits(left: Logits, right: Logits) -> bool:
    return left.shape == right.shape and np.array_equal(left.view(np.uint32), right.view(np.uint32))


def write_mixed(tiny: TinyModel, path: Path) -> Path:
    """As the Q4_K_M recipes do: most in Q4_K, some matrices finer, one not quantized."""
    formats = {name: form for name in weights(tiny) for part, form in MIXED.items() if f"{part}.weight" in name}
    return write_gguf(tiny, path, format="Q4_K", formats=formats)


@pytest.fixture(scope="module", params=[*sorted(FORMATS), "mixed"])
def wide(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    path = tmp_path_factory.mktemp("wide") / f"{request.param}.gguf"
    written = write_mixed(WIDE, path) if request.param == "mixed" else write_gguf(WIDE, path, format=request.param)
    return request.param, written


def test_the_fast_program_is_close_to_the_reference_program(wide: tuple[str, Path]) -> None:
    """Both read the same weights; only the activations are rounded, to 8 bits, where weights are quantized."""
    name, path = wide
    tokens = prompts(WIDE)[0]
    fast, reference = (open_runner(path, dtype=dtype, kv_dtype="f32") for dtype in ("auto", "f32"))
    error = distance(plain(fast, tokens), plain(reference, tokens))
    assert (0 < error <= 0.03) if name not in FLOAT_FORMATS else error <= 1e-6


def test_the_reference_program_reads_what_was_written(wide: tuple[str, Path], tmp_path: Path) -> None:
    """The decoded weights as plain safetensors give the same bits."""
    name, path = wide
    checkpoint = open_checkpoint(path)
    directory = write_directory(WIDE, tmp_path / name)
    decoded: dict[str, NDArray[np.float32]] = {}
    for tensor in map(checkpoint.tensor, checkpoint.tensor_names()):
        rows = np.arange(len(tensor.raw), dtype=np.int32)
        raw = np.ascontiguousarray(tensor.raw)
        decoded[tensor.name] = _native.dequantize_rows(tensor.format, raw, tensor.shape[-1], rows).reshape(tensor.shape)
    save_file(decoded, directory / "model.safetensors")
    tokens = prompts(WIDE)[1]
    runners = [open_runner(source, dtype="f32", kv_dtype="f32") for source in (path, directory)]
    assert same_bits(*[plain(runner, tokens) for runner in runners])


@pytest.mark.parametrize("isa", _native.available_isas())
def test_the_bits_depend_on_nothing_else(wide: tuple[str, Path], isa: str) -> None:
    _, path = wide
    sequences = prompts(WIDE)
    oracle = open_runner(path, num_threads=1)
    runner = open_runner(path, isa=isa, num_threads=3)
    together = all_logits(runner, [Walk(tokens, [5 + 4 * i, 1, 9]) for i, tokens in enumerate(sequences)], seed=2)
    for tokens, batched in zip(sequences, together, strict=True):
        assert same_bits(batched, plain(oracle, tokens))


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_half_precision_safetensors_equal_the_same_weights_in_gguf(dtype: str, tmp_path: Path) -> None:
    directory = write_directory(WIDE, tmp_path / dtype)
    write_safetensors(directory / "model.safetensors", weights(WIDE), dtype)
    norms_too = dict.fromkeys(weights(WIDE), dtype)  # a directory has one format for everything
    path = write_gguf(WIDE, tmp_path / "same.gguf", format=dtype, formats=norms_too)
    tokens = prompts(WIDE)[0]
    assert same_bits(plain(open_runner(directory), tokens), plain(open_runner(path), tokens))


def write_safetensors(path: Path, values: dict[str, NDArray[np.float32]], dtype: str) -> None:
    """By hand: numpy has no bfloat16."""
    header: dict[str, object] = {}
    chunks: list[bytes] = []
    position = 0
    for name, value in values.items():
        chunks.append(quantize(dtype, np.atleast_2d(value)).tobytes())
        end = position + len(chunks[-1])
        header[name] = {"dtype": dtype, "shape": value.shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(chunks))
