"""The lowered program against a numpy forward pass, and against itself under every way of running it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from program_models import (
    ATTENTION,
    FLOATS,
    MODELS,
    MemoryCheckpoint,
    block,
    distance,
    model_of,
    open_runner,
    run,
    same_bits,
    tables,
    tokens_of,
)
from program_oracle import logits as oracle_logits

from setpoint import _native
from setpoint.engine.plan import LogitsRow, PlanEntry, StepPlan
from setpoint.runtime.cpu.runner import CpuRunner


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sizes", [[64], [1], [30, 1], [7]], ids=str)
def test_agrees_with_numpy(name: str, sizes: list[int]) -> None:
    model = MODELS[name]
    checkpoint = MemoryCheckpoint(model)
    tokens = tokens_of(50)
    reference = oracle_logits(model, checkpoint.values, tokens)
    ours = run(open_runner(model, checkpoint), tokens, sizes)
    assert np.abs(ours - reference).max() <= 2e-5 * np.abs(reference).max()


@pytest.mark.parametrize("format", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_formats(format: str) -> None:
    """Quantized weights meet 8-bit activations in the fast program; in the f32 program nothing is rounded."""
    model = MODELS["grouped"]
    checkpoint = MemoryCheckpoint(model, format)
    tokens = tokens_of(40)
    quantized = {name for name, tensor in checkpoint.stored.items() if tensor.format.startswith("Q")}
    reference = oracle_logits(model, checkpoint.values, tokens, quantized)
    # A float rounded the other way changes a code: an error of 1/127 in one input.
    assert distance(run(open_runner(model, checkpoint), tokens, [40]), reference) <= (3e-3 if quantized else 1e-5)
    reference = oracle_logits(model, checkpoint.values, tokens)
    assert distance(run(open_runner(model, checkpoint, dtype="f32"), tokens, [40]), reference) <= 1e-5


def test_formats_may_be_mixed() -> None:
    """Float and quantized readers of one source: the quantized copy is made for those that want it."""
    model = MODELS["grouped"]
    checkpoint = MemoryCheckpoint(model, "Q8_0")
    for name in ("layers.0.attn.k_proj.weight", "layers.1.mlp.up_proj.weight", "layers.1.mlp.down_proj.weight"):
        checkpoint.put(name, checkpoint.values[name])
    quantized = {name for name, tensor in checkpoint.stored.items() if tensor.format == "Q8_0"}
    tokens = tokens_of(40)
    reference = oracle_logits(model, checkpoint.values, tokens, quantized)
    assert distance(run(open_runner(model, checkpoint), tokens, [40]), reference) <= 3e-3


@pytest.mark.parametrize("kv_dtype", ["s16", "f16", "bf16"])
def test_compact_caches(kv_dtype: str) -> None:
    model = MODELS["gemma"]
    checkpoint = MemoryCheckpoint(model)
    tokens = tokens_of(40)
    reference = oracle_logits(model, checkpoint.values, tokens)
    ours = run(open_runner(model, checkpoint, kv_dtype=kv_dtype), tokens, [40])
    assert 0 < distance(ours, reference) <= 0.02


@pytest.mark.parametrize("name", ["grouped", "gemma"])
@pytest.mark.parametrize("kv_dtype", ["s16", "f16"])
@pytest.mark.parametrize("format", ["F32", "Q8_0", "Q4_0"])
def test_the_same_bits_however_it_runs(name: str, format: str, kv_dtype: str) -> None:
    model = MODELS[name]
    checkpoint = MemoryCheckpoint(model, format)
    tokens = tokens_of(90)
    plain = run(open_runner(model, checkpoint, isa="ref", num_threads=1, kv_dtype=kv_dtype), tokens, [90])
    for isa in _native.available_isas():
        for threads in (1, 2, 3):
            runner = open_runner(model, checkpoint, isa=isa, num_threads=threads, kv_dtype=kv_dtype)
            for sizes in ([90], [1], [17], [50, 1]):
                assert same_bits(run(runner, tokens, sizes), plain), (isa, threads, sizes)


def test_a_ragged_batch_gives_the_bits_of_each_alone() -> None:
    model = MODELS["gemma"]
    checkpoint = MemoryCheckpoint(model, "Q8_0")
    runner = open_runner(model, checkpoint, num_threads=3)
    sequences = [tokens_of(length, seed=length) for length in (1, 60, 17, 33)]
    alone = [run(runner, tokens, [len(tokens)]) for tokens in sequences]
    together = [
        PlanEntry(i, tokens, 0, tables(runner, 64, i), [LogitsRow(row, target=0) for row in range(len(tokens))])
        for i, tokens in enumerate(sequences)
    ]
    assert same_bits(runner.logits(StepPlan(together)), np.concatenate(alone))


@pytest.mark.parametrize("name", ["grouped", "biases", "gemma"])
@pytest.mark.parametrize("format", ["F32", "Q8_0", "mixed"])
def test_batches_on_both_sides_of_every_threshold(name: str, format: str) -> None:
    """Up to 4 rows each thread norms and quantizes for itself; from 33 rows on matmuls are shared out in chunks."""
    model = MODELS[name]
    checkpoint = MemoryCheckpoint(model, "Q8_0" if format == "mixed" else format)
    if format == "mixed":  # readers of one source that want it in different forms, and gates that cannot be fused
        for part in ("attn.k_proj", "mlp.up_proj"):
            checkpoint.put(f"layers.0.{part}.weight", checkpoint.values[f"layers.0.{part}.weight"])
    sequences = [tokens_of(2 + i % 5, seed=i) for i in range(34)]
    options: dict[str, Any] = {"max_num_seqs": len(sequences), "kv_dtype": "f16"}

    def entries(runner: CpuRunner, part: slice) -> list[PlanEntry]:
        found = []
        for i, tokens in enumerate(sequences):
            first, now = part.indices(len(tokens))[0], tokens[part]
            found.append(PlanEntry(i, now, first, tables(runner, 16, i), [LogitsRow(len(now) - 1, target=0)]))
        return found

    def decode(runner: CpuRunner, batches: Sequence[int]) -> list[FLOATS]:
        runner.logits(StepPlan(entries(runner, slice(0, -1))))
        last = entries(runner, slice(-1, None))
        return [runner.logits(StepPlan(last[:batch])) for batch in batches]

    plain = open_runner(model, checkpoint, isa="ref", num_threads=1, **options)
    plain.logits(StepPlan(entries(plain, slice(0, -1))))
    alone = np.concatenate([plain.logits(StepPlan([entry])) for entry in entries(plain, slice(-1, None))])
    for threads in (1, 2, 3, 4):
        for batch, found in zip(
            batches := (1, 2, 3, 4, 5, 8, 32, 33, 34),
            decode(open_runner(model, checkpoint, num_threads=threads, **options), batches),
            strict=True,
        ):
            assert same_bits(found, alone[:batch]), (threads, batch)


@pytest.fixture(scope="module")
def shared() -> tuple[CpuRunner, list[list[int]], list[FLOATS]]:
    """A runner, sequences, and the logits that each has alone in one step."""
    model = MODELS["gemma"]
    runner = open_runner(model, MemoryCheckpoint(model, "Q4_0"), num_threads=2)
    sequences = [tokens_of(length, seed=length) for length in (5, 64, 40, 23)]
    return runner, sequences, [run(runner, tokens, [len(tokens)]) for tokens in sequences]


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_schedule_gives_the_bits_of_each_alone(
    shared: tuple[CpuRunner, list[list[int]], list[FLOATS]], data: st.DataObject
) -> None:
    """Steps of drawn company, order, chunk sizes and wanted rows; some chunks want none, some are computed twice."""
    runner, sequences, alone = shared
    done = [0] * len(sequences)
    while open_ := [i for i, tokens in enumerate(sequences) if done[i] < len(tokens)]:
        chosen = data.draw(st.lists(st.sampled_from(open_), min_size=1, unique=True))
        entries, wanted = [], []
        for i in chosen:
            begin = done[i] // 16 * 16 if data.draw(st.booleans()) else done[i]
            end = min(len(sequences[i]), max(done[i], begin) + data.draw(st.integers(1, 48)))
            rows = sorted(data.draw(st.sets(st.integers(0, end - begin - 1), max_size=4)))
            logits_rows = [LogitsRow(row, target=0) for row in rows]
            entries.append(PlanEntry(i, sequences[i][begin:end], begin, tables(runner, 64, i), logits_rows))
            wanted.append(alone[i][[begin + row for row in rows]])
            done[i] = end
        assert same_bits(runner.logits(StepPlan(entries)), np.concatenate(wanted))


def test_a_long_context_split_over_threads() -> None:
    """Past 512 tokens a lonely decode shares its attention splits out; one thread walks them itself."""
    model = model_of(block(), block(replace(ATTENTION, window=700)))
    checkpoint = MemoryCheckpoint(model)
    tokens = tokens_of(1300)
    options: dict[str, Any] = {"max_model_len": 1536, "max_num_batched_tokens": 1536, "kv_cache_memory_bytes": 32 << 20}
    reference = oracle_logits(model, checkpoint.values, tokens)[-6:]
    plain = run(open_runner(model, checkpoint, num_threads=1, **options), tokens, [1300], 1294)
    assert np.abs(plain - reference).max() <= 2e-5 * np.abs(reference).max()
    for threads in (2, 3, 5):
        runner = open_runner(model, checkpoint, num_threads=threads, **options)
        assert same_bits(run(runner, tokens, [1200, 95, 1], 1294), plain)


def test_executing_an_entry_twice_changes_nothing() -> None:
    model = MODELS["window"]
    runner = open_runner(model, MemoryCheckpoint(model))
    tokens, blocks = tokens_of(40), tables(runner, 40)
    first = PlanEntry(0, tokens[:30], 0, blocks, [LogitsRow(29, target=0)])
    last = PlanEntry(0, tokens[30:], 30, blocks, [LogitsRow(9, target=0)])
    once = [runner.logits(StepPlan([entry])) for entry in (first, last)]
    again = [runner.logits(StepPlan([entry])) for entry in (first, last)]
    assert all(map(same_bits, once, again))


def test_blocks_out_of_the_window_may_be_gone() -> None:
    model = model_of(block(replace(ATTENTION, window=20)))
    runner = open_runner(model, MemoryCheckpoint(model))
    tokens = tokens_of(80)
    plain = run(runner, tokens, [80], 79)
    (blocks,) = tables(runner, 80)
    first_visible = (79 - 20 + 1) // 16
    gone = [-1] * first_visible + blocks[first_visible:]
    entry = PlanEntry(0, tokens[79:], 79, (gone,), [LogitsRow(0, target=0)])
    assert same_bits(runner.logits(StepPlan([entry])), plain)
