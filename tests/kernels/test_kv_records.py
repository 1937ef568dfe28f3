"""A KV block as bytes: read, written elsewhere, and computed on as if it had always been there. Bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from forward import Blocks, Walk, open_runner, plain
from setpoint.engine.plan import KVRestore, KVSave, LogitsRow, PlanEntry, StepPlan
from setpoint.errors import EngineError
from setpoint.runtime.cpu.runner import CpuRunner
from tiny_models import TinyModel

LENGTH = 160


def tokens_of(tiny: TinyModel) -> list[int]:
    return [int(token) for token in np.random.default_rng(3 + tiny.seed).integers(0, 288, LENGTH)]


def saves(tables: tuple[list[int], ...], num_blocks: int) -> list[KVSave]:
    return [KVSave(group, block, b"", b"", b"") for group, table in enumerate(tables) for block in table[:num_blocks]]


@pytest.mark.parametrize("kv_dtype", ["s16", "f16", "bf16", "f32"])
def test_restored_blocks_give_the_same_logits(tiny: TinyModel, tiny_q8: Path, kv_dtype: str) -> None:
    runner, other = (open_runner(tiny_q8, kv_dtype=kv_dtype) for _ in range(2))
    tokens = tokens_of(tiny)
    wanted = LENGTH - 20
    oracle = plain(runner, tokens, wanted)
    walk = Walk(tokens, [LENGTH])
    walk.tables = Blocks(runner, seed=1).tables(LENGTH)
    runner.logits(StepPlan([walk.entry(0)]))
    num_blocks = (LENGTH - 20) // 16
    saved = runner.execute(StepPlan((), saves(walk.tables, num_blocks))).saved
    assert [len(payload or b"") for payload in saved] == [
        group.block_bytes for group in runner.info.kv_groups for _ in range(num_blocks)
    ]
    for target in (runner, other):  # in other places of this cache, and in another process's
        tables = Blocks(target, seed=2).tables(LENGTH)
        places = saves(tables, num_blocks)
        restores = [
            KVRestore(0, place.group, place.block, data or b"") for place, data in zip(places, saved, strict=True)
        ]
        target.execute(StepPlan((), (), restores))
        rest = tokens[num_blocks * 16 :]
        rows = [LogitsRow(offset, target=0) for offset in range(wanted - num_blocks * 16, len(rest))]
        logits = target.logits(StepPlan([PlanEntry(0, rest, num_blocks * 16, tables, rows)]))
        assert np.array_equal(logits.view(np.uint32), oracle.view(np.uint32))
    runner.close()
    other.close()


@pytest.fixture
def runner(tiny_q8: Path) -> CpuRunner:
    return open_runner(tiny_q8)


@pytest.mark.parametrize(("group", "block"), [(-1, 0), (99, 0), (0, -1), (0, 1 << 30)])
def test_a_block_that_is_not_there_is_refused(runner: CpuRunner, group: int, block: int) -> None:
    with pytest.raises(ValueError, match="no such KV"):
        runner.program.read_kv(group, block)
    with pytest.raises(ValueError, match="KV"):
        runner.program.write_kv(group, block, bytes(runner.info.kv_groups[0].block_bytes))
    runner.close()


@pytest.mark.parametrize("difference", [-1, 1])
def test_bytes_of_another_size_are_refused(runner: CpuRunner, difference: int) -> None:
    record = bytes(runner.info.kv_groups[0].block_bytes + difference)
    with pytest.raises(EngineError, match="restored"):
        runner.execute(StepPlan((), (), [KVRestore(0, 0, 0, record)]))
    runner.close()


def test_the_fingerprint_knows_the_weights_and_the_formats(tiny_q8: Path, tiny_gguf: Path) -> None:
    runners = [
        open_runner(tiny_q8),
        open_runner(tiny_q8, num_threads=1, max_model_len=64, isa="ref"),
        open_runner(tiny_q8, kv_dtype="f16"),
        open_runner(tiny_q8, dtype="f32"),
        open_runner(tiny_gguf),
    ]
    prints = [runner.kv_fingerprint() for runner in runners]
    for runner in runners:
        runner.close()
    assert prints[0] == prints[1]
    assert len(set(prints)) == 4
