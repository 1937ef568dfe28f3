"""The f32 program agrees with Hugging Face transformers (stored goldens, see make_goldens.py)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from forward import Logits, Walk, all_logits, open_runner, plain
from tiny_models import REAL_PROMPT, REAL_STRIDE, TinyModel, prompts

GOLDENS = Path(__file__).parent / "goldens"
TOLERANCE = 1e-4  # largest difference, relative to the largest logit


def goldens(tiny: TinyModel) -> list[Logits]:
    with np.load(GOLDENS / f"{tiny.name}.npz") as stored:
        return [stored[f"prompt{i}"] for i in range(len(prompts(tiny)))]


def relative_error(ours: Logits, reference: Logits) -> float:
    assert ours.shape == reference.shape
    return float(np.abs(ours - reference).max() / np.abs(reference).max())


@pytest.fixture(params=["safetensors", "gguf"])
def path(request: pytest.FixtureRequest, tiny_directory: Path, tiny_gguf: Path) -> Path:
    return tiny_directory if request.param == "safetensors" else tiny_gguf


CHUNKINGS = {"prefill": [64], "decode": [1], "chunked": [5, 16, 3], "prefill then decode": [6, 1]}


@pytest.mark.parametrize("chunking", sorted(CHUNKINGS))
def test_each_prompt_alone(tiny: TinyModel, path: Path, chunking: str) -> None:
    runner = open_runner(path, dtype="f32", kv_dtype="f32")
    for tokens, reference in zip(prompts(tiny), goldens(tiny), strict=True):
        ours = all_logits(runner, [Walk(tokens, CHUNKINGS[chunking])])[0]
        assert relative_error(ours, reference) <= TOLERANCE
    runner.close()


def test_a_batch_of_uneven_lengths(tiny: TinyModel, path: Path) -> None:
    runner = open_runner(path, dtype="f32", kv_dtype="f32")
    walks = [Walk(tokens, [4 + 3 * i]) for i, tokens in enumerate(prompts(tiny))]
    for ours, reference in zip(all_logits(runner, walks), goldens(tiny), strict=True):
        assert relative_error(ours, reference) <= TOLERANCE
    runner.close()


def test_both_file_formats_give_the_same_bits(tiny: TinyModel, tiny_directory: Path, tiny_gguf: Path) -> None:
    tokens = prompts(tiny)[0]
    results = []
    for path in (tiny_directory, tiny_gguf):
        runner = open_runner(path, dtype="f32", kv_dtype="f32")
        results.append(all_logits(runner, [Walk(tokens, [64])])[0])
        runner.close()
    if tiny.unit_offset:  # GGUF stores 1 + w, which rounds
        assert relative_error(results[0], results[1]) <= 1e-6
    else:
        assert np.array_equal(results[0], results[1])


@pytest.mark.parametrize(("alias", "fixture"), [("smollm2-135m", "smollm2_path"), ("gemma3-270m", "gemma3_path")])
def test_a_real_model(alias: str, fixture: str, request: pytest.FixtureRequest) -> None:
    """The f32 program over the quantized file against transformers over the same file, dequantized."""
    path = request.getfixturevalue(fixture)
    runner = open_runner(path, dtype="f32", kv_dtype="f32", kv_cache_memory_bytes=256 << 20)
    ours = plain(runner, REAL_PROMPT)
    runner.close()
    with np.load(GOLDENS / f"real-{alias}.npz") as stored:
        assert np.array_equal(ours.argmax(axis=1), stored["most_likely"])
        error = np.abs(ours[:, ::REAL_STRIDE] - stored["logits"]).max() / stored["largest"]
    assert error <= TOLERANCE
