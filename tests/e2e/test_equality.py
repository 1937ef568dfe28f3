"""Law 1: what a sequence generates depends on nothing but itself and the configuration. Bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from forward import Logits, Walk, all_logits, open_runner, plain
from setpoint import _native
from tiny_models import TinyModel, prompts


def same_bits(left: Logits, right: Logits) -> bool:
    return left.shape == right.shape and np.array_equal(left.view(np.uint32), right.view(np.uint32))


@pytest.fixture(params=["f32", "q8"])
def tiny_path(request: pytest.FixtureRequest, tiny_gguf: Path, tiny_q8: Path) -> Path:
    return tiny_gguf if request.param == "f32" else tiny_q8


def long_prompt(tiny: TinyModel, length: int = 150) -> list[int]:
    rng = np.random.default_rng(77 + tiny.seed)
    return [int(token) for token in rng.integers(0, 288, length)]


@pytest.mark.parametrize("chunks", [[1], [3], [16], [17], [64], [100, 1]], ids=str)
def test_chunked_equals_plain(tiny: TinyModel, tiny_path: Path, chunks: list[int]) -> None:
    runner = open_runner(tiny_path)
    tokens = long_prompt(tiny)
    assert same_bits(all_logits(runner, [Walk(tokens, chunks)], seed=3)[0], plain(runner, tokens))
    runner.close()


def test_batched_with_random_neighbours_equals_plain(tiny: TinyModel, tiny_path: Path) -> None:
    runner = open_runner(tiny_path)
    rng = np.random.default_rng(5)
    tokens = [long_prompt(tiny), *prompts(tiny)]
    tokens += [[int(t) for t in rng.integers(0, 288, int(size))] for size in rng.integers(1, 60, 6)]
    walks = [Walk(ids, [int(size) for size in rng.integers(1, 30, 4)]) for ids in tokens]
    for ids, batched in zip(tokens, all_logits(runner, walks, seed=9), strict=True):
        assert same_bits(batched, plain(runner, ids))
    runner.close()


@pytest.mark.parametrize("threads", [1, 3, 4])
def test_any_number_of_threads(tiny: TinyModel, tiny_path: Path, threads: int) -> None:
    tokens = long_prompt(tiny)
    results = []
    for count in (2, threads):
        runner = open_runner(tiny_path, num_threads=count)
        walks = [Walk(tokens, [64, 1]), Walk(prompts(tiny)[0], [7])]
        results.append(all_logits(runner, walks))
        runner.close()
    assert all(same_bits(left, right) for left, right in zip(*results, strict=True))


@pytest.mark.parametrize("isa", [name for name in _native.available_isas() if name != "ref"])
def test_any_instruction_set(tiny: TinyModel, tiny_path: Path, isa: str) -> None:
    tokens = long_prompt(tiny, 70)
    results = []
    for name in ("ref", isa):
        runner = open_runner(tiny_path, isa=name)
        results.append(all_logits(runner, [Walk(tokens, [33, 1])])[0])
        runner.close()
    assert same_bits(*results)


@pytest.mark.parametrize("model", ["smollm2_path", "gemma3_path"])
def test_a_real_model(model: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(model)
    tokens = list(range(100, 700))  # past a split of the attention and past Gemma's window
    options = {"max_model_len": 1024, "kv_cache_memory_bytes": 256 << 20, "max_num_batched_tokens": 1024}
    runner = open_runner(path, **options)
    wanted = len(tokens) - 24
    oracle = plain(runner, tokens, wanted)
    neighbours = [list(range(7, 60)), list(range(900, 1100))]
    walks = [Walk(tokens, [256, 200, 120, 1], wanted), *[Walk(ids, [50], len(ids) - 1) for ids in neighbours]]
    chunked = all_logits(runner, walks, seed=4)[0]
    runner.close()
    assert same_bits(chunked, oracle)
    single = open_runner(path, num_threads=1, isa="avx2", **options)
    alone = all_logits(single, [Walk(tokens, [576, 24], wanted)], seed=5)[0]
    single.close()
    assert same_bits(alone, oracle)
