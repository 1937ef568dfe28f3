"""What CpuRunner returns for a plan, and what it refuses: one bad entry never hurts its neighbours."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from program_models import MODELS, VOCAB, MemoryCheckpoint, open_runner, run, same_bits, tables, tokens_of
from program_oracle import logits as oracle_logits

from setpoint import _native
from setpoint.engine.plan import EntryResult, LogitsRow, PlanEntry, RowSampling, StepPlan
from setpoint.errors import ConfigError, EngineError, ModelFileError, UnsupportedModelError
from setpoint.runtime.cpu.arrays import StepArrays
from setpoint.runtime.cpu.runner import CpuRunner
from setpoint.runtime.cpu.step_memory import step_bytes_per_token


def greedy(offset: int, **more: Any) -> LogitsRow:
    return LogitsRow(offset, RowSampling(temperature=0.0, **more))


@pytest.mark.parametrize("name", MODELS)
def test_the_estimate_of_what_steps_work_in_is_right(name: str) -> None:
    model = MODELS[name]
    tokens = 4096
    runner = open_runner(model, MemoryCheckpoint(model, "Q8_0"), max_num_batched_tokens=tokens)
    used = runner.program.slot_bytes
    assert used <= step_bytes_per_token(model) * tokens <= 1.5 * used


def test_rows_come_back_in_order_with_tokens_and_logprobs() -> None:
    model = MODELS["grouped"]
    checkpoint = MemoryCheckpoint(model)
    runner = open_runner(model, checkpoint)
    tokens = tokens_of(20)
    rows = [LogitsRow(3, target=5, num_logprobs=2), greedy(19), LogitsRow(19, RowSampling(temperature=0.0), None, 4)]
    entries = [
        PlanEntry(0, tokens, 0, tables(runner, 20, 0), rows),
        PlanEntry(1, tokens[:4], 0, tables(runner, 20, 1)),
        PlanEntry(2, tokens[:10], 0, tables(runner, 20, 2), [greedy(9)]),
    ]
    scored, nothing, short = runner.execute(StepPlan(entries)).entries
    reference = oracle_logits(model, checkpoint.values, tokens)
    logprobs = reference - np.log(np.exp(reference).sum(-1, keepdims=True))
    assert scored.error is None
    target, plain, detailed = scored.rows
    assert target.token_id == 5
    assert target.logprob == pytest.approx(logprobs[3, 5], abs=1e-4)
    assert target.rank == 1 + int((reference[3] > reference[3, 5]).sum())
    assert list(target.top_ids) == np.argsort(-reference[3])[:2].tolist()
    best = int(reference[19].argmax())
    assert (plain.token_id, plain.logprob, detailed.token_id, detailed.rank) == (best, None, best, 1)
    assert detailed.top_logprobs == pytest.approx(np.sort(logprobs[19])[::-1][:4].tolist(), abs=1e-4)
    assert nothing == EntryResult()
    assert short.rows[0].token_id == int(reference[9].argmax())


def test_sampling_lists_reach_their_own_row() -> None:
    model = MODELS["grouped"]
    runner = open_runner(model, MemoryCheckpoint(model))
    tokens = tokens_of(8)
    wanted = [
        greedy(7),
        greedy(7, allowed_ids=(11, 12)),
        greedy(7, bias_ids=(40,), bias_values=(1000.0,)),
        greedy(7, bias_ids=(41,), bias_values=(1000.0,), banned_ids=(41,)),
        greedy(7, penalty_ids=(0,), penalty_counts=(3,), frequency_penalty=2.0),
        greedy(7),
    ]
    entry = PlanEntry(0, tokens, 0, tables(runner, 8), wanted)
    found = [row.token_id for row in runner.execute(StepPlan([entry])).entries[0].rows]
    assert found[1] in (11, 12)
    assert found[2] == 40
    assert found[3] == found[0] == found[5] != 41


def test_many_rows_pass_through_the_head_in_chunks() -> None:
    model = MODELS["grouped"]
    checkpoint = MemoryCheckpoint(model, "Q8_0")
    runner = open_runner(model, checkpoint, num_threads=3)
    tokens = tokens_of(200)
    entry = PlanEntry(0, tokens, 0, tables(runner, 200), [greedy(row) for row in range(200)])
    expected = runner.logits(StepPlan([entry])).argmax(-1).tolist()
    assert [row.token_id for row in runner.execute(StepPlan([entry])).entries[0].rows] == expected


def test_non_finite_logits_fail_their_entry_alone() -> None:
    model = MODELS["grouped"]
    checkpoint = MemoryCheckpoint(model)
    embedding = checkpoint.values["embed.weight"].copy()
    embedding[50] = np.nan
    checkpoint.put("embed.weight", embedding)
    runner = open_runner(model, checkpoint)
    entries = [PlanEntry(i, [token], 0, tables(runner, 1, i), [greedy(0)]) for i, token in enumerate((3, 50, 4))]
    before, poisoned, after = runner.execute(StepPlan(entries)).entries
    assert isinstance(poisoned.error, EngineError)
    assert before.error is None
    assert after.error is None
    alone = runner.execute(StepPlan([entries[2]])).entries[0]
    assert alone.rows == after.rows


def malformed(good: PlanEntry) -> Mapping[str, PlanEntry]:
    row = good.rows[0]
    assert row.sampling is not None
    return {
        "token": replace(good, token_ids=[1, VOCAB]),
        "negative token": replace(good, token_ids=[-1, 1]),
        "huge token": replace(good, token_ids=[1 << 40, 1]),
        "no token": replace(good, token_ids=[], rows=()),
        "start": replace(good, start=-1),
        "too long": replace(good, start=255),
        "huge start": replace(good, start=1 << 40),
        "block": replace(good, block_tables=([10**6],)),
        "missing block": replace(good, block_tables=([-1],)),
        "short table": replace(good, block_tables=([],)),
        "no table": replace(good, block_tables=()),
        "row": replace(good, rows=[LogitsRow(2, row.sampling)]),
        "negative row": replace(good, rows=[LogitsRow(-1, row.sampling)]),
        "target": replace(good, rows=[LogitsRow(0, target=VOCAB)]),
        "logprobs": replace(good, rows=[LogitsRow(0, target=1, num_logprobs=21)]),
        "bias id": replace(good, rows=[greedy(0, bias_ids=(VOCAB,), bias_values=(1.0,))]),
        "bias values": replace(good, rows=[greedy(0, bias_ids=(1, 2), bias_values=(1.0,))]),
        "allowed id": replace(good, rows=[greedy(0, allowed_ids=(-5,))]),
        "penalty id": replace(good, rows=[greedy(0, penalty_ids=(1 << 33,), penalty_counts=(1,))]),
        "temperature": replace(good, rows=[LogitsRow(0, RowSampling(temperature=float("nan")))]),
        "top_p": replace(good, rows=[LogitsRow(0, RowSampling(top_p=float("nan")))]),
        "min_p": replace(good, rows=[LogitsRow(0, RowSampling(top_p=0.5, min_p=float("nan")))]),
        "seed": replace(good, rows=[greedy(0, seed=1 << 70)]),
    }


GOOD = PlanEntry(0, [1, 2], 0, ([0],), [LogitsRow(1, RowSampling(temperature=0.0))])


@pytest.fixture(scope="module")
def small_runner() -> CpuRunner:
    model = MODELS["one head each"]
    return open_runner(model, MemoryCheckpoint(model), max_num_batched_tokens=64)


@pytest.mark.parametrize("case", malformed(GOOD))
def test_a_malformed_entry_fails_alone(small_runner: CpuRunner, case: str) -> None:
    neighbour = replace(GOOD, seq_id=1, block_tables=([1],))
    expected = small_runner.execute(StepPlan([neighbour])).entries[0]
    bad = malformed(GOOD)[case]
    first, second = small_runner.execute(StepPlan([bad, neighbour])).entries
    assert isinstance(first.error, EngineError)
    assert second == expected


def test_too_much_for_one_step_is_an_engine_error(small_runner: CpuRunner) -> None:
    many = replace(GOOD, token_ids=[1] * 40, block_tables=([0, 1, 2],))
    with pytest.raises(EngineError, match="64 tokens"):
        small_runner.execute(StepPlan([many, replace(many, block_tables=([3, 4, 5],))]))
    with pytest.raises(EngineError):
        small_runner.execute(StepPlan([replace(GOOD, block_tables=([i],)) for i in range(9)]))
    assert small_runner.execute(StepPlan([])).entries == ()


def test_one_step_at_a_time() -> None:
    """A second thread is turned away, whatever the first is doing, and disturbs nothing."""
    model = MODELS["grouped"]
    runner = open_runner(model, MemoryCheckpoint(model))
    tokens = tokens_of(40)
    expected = run(runner, tokens, [40])
    refused = 0

    def steps() -> None:
        nonlocal refused
        arrays = StepArrays(1, 1, 256, 16)
        logits = np.empty((40, VOCAB), np.float32)
        rows = [LogitsRow(row, target=0) for row in range(40)]
        arrays.load([PlanEntry(0, tokens, 0, tables(runner, 40), rows)], logits)
        for _ in range(5000):
            logits[:] = 0
            try:
                runner.program.step(*arrays.arguments)
            except RuntimeError:
                refused += 1
            else:
                assert same_bits(logits, expected)
            if refused > 20:
                return

    with ThreadPoolExecutor(2) as callers:
        for outcome in [callers.submit(steps) for _ in range(2)]:
            outcome.result()
    assert refused > 20


def test_the_process_may_end_during_a_step() -> None:
    """A daemon thread in the middle of a step when the interpreter ends: no abort, the exit code stays."""
    script = """
import sys, threading, time
from program_models import *
model = MODELS["grouped"]
runner = open_runner(model, MemoryCheckpoint(model), num_threads=3)
def steps():
    while True:
        run(runner, tokens_of(100), [7])
threading.Thread(target=steps, daemon=True).start()
time.sleep(0.2)
sys.exit(5)
"""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    for _ in range(3):
        ended = subprocess.run([sys.executable, "-c", script], env=environment, timeout=60, capture_output=True)
        assert ended.returncode == 5, ended.stderr.decode()


def test_a_program_without_a_head_has_no_outputs() -> None:
    limits = {"vocab": 8, "max_tokens": 8, "max_entries": 1, "max_rows": 8, "max_model_len": 16}
    program = _native.Program(isa="auto", num_threads=1, kv_format="f16", **limits)
    with pytest.raises(ValueError, match="no head"):
        _ = program.outputs


def test_logits_are_never_written_to_a_converted_copy(small_runner: CpuRunner) -> None:
    arrays = StepArrays(1, 1, 256, 16)
    arrays.load([GOOD])
    with pytest.raises(TypeError):
        small_runner.program.step(*arrays.arguments[:-1], np.empty((1, VOCAB)))


def test_a_wrong_tensor_is_named() -> None:
    model = MODELS["biases"]
    checkpoint = MemoryCheckpoint(model)
    checkpoint.put("layers.0.attn.k_proj.bias", np.zeros(3, np.float32))
    with pytest.raises(ModelFileError, match=r"layers\.0\.attn\.k_proj\.bias"):
        open_runner(model, checkpoint)
    del checkpoint.stored["layers.0.attn.k_proj.bias"]
    with pytest.raises(ModelFileError, match=r"layers\.0\.attn\.k_proj\.bias"):
        open_runner(model, checkpoint)
    checkpoint = MemoryCheckpoint(model)
    stored = checkpoint.stored["layers.0.mlp.up_proj.weight"]
    checkpoint.stored["layers.0.mlp.up_proj.weight"] = replace(stored, raw=stored.raw[:, :-4])
    with pytest.raises(ModelFileError, match=r"layers\.0\.mlp\.up_proj\.weight"):
        open_runner(model, checkpoint)


def test_a_tensor_that_nobody_reads_is_named() -> None:
    """A bias or an expert that the model tree does not know would silently be missing from the mathematics."""
    model = MODELS["one head each"]  # its head is tied
    checkpoint = MemoryCheckpoint(model)
    checkpoint.put("head.weight", checkpoint.values["embed.weight"])
    checkpoint.put("layers.0.attn.rotary_emb.inv_freq", np.ones(8, np.float32))
    open_runner(model, checkpoint).close()
    checkpoint.put("layers.0.attn.o_proj.bias", np.zeros(64, np.float32))
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.attn\.o_proj\.bias"):
        open_runner(model, checkpoint)


@pytest.mark.parametrize(
    "options",
    [{"isa": "sse9"}, {"num_threads": 0}, {"max_num_batched_tokens": 0}, {"kv_cache_memory_bytes": 1000}],
    ids=str,
)
def test_options_that_cannot_work(options: dict[str, Any]) -> None:
    model = MODELS["grouped"]
    with pytest.raises(ConfigError):
        open_runner(model, MemoryCheckpoint(model), **options)


def test_the_program_holds_its_weights() -> None:
    model = MODELS["grouped"]
    checkpoint = MemoryCheckpoint(model, "Q8_0")
    runner = open_runner(model, checkpoint)
    tokens = tokens_of(10)
    before = run(runner, tokens, [10])
    outputs = runner.program.outputs
    del checkpoint
    for _ in range(20):  # would reuse freed memory
        open_runner(model, MemoryCheckpoint(model, "Q8_0", seed=9)).close()
    assert same_bits(run(runner, tokens, [10]), before)
    runner.close()
    assert outputs.sum() >= 0  # still readable
