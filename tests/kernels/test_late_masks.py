"""Masks that a thread computes while the native step runs: the same tokens, and whatever goes wrong stays apart."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from test_greedy_head import CHANNELS, mask_of, masked_plan, masks, open_greedy, plan, random_head

from setpoint.engine.blast_wall import execute_isolated
from setpoint.engine.constraint import Constraint
from setpoint.engine.late_masks import LateMasks
from setpoint.engine.plan import EntryResult, PlanEntry, StepPlan
from setpoint.errors import EngineError, RequestError
from setpoint.runtime.cpu import mask_thread
from setpoint.runtime.cpu import runner as cpu_runner
from setpoint.runtime.cpu.runner import CpuRunner

Made = Callable[[Sequence[int]], bytes]


class Nothing:
    """Where no draft is, a constraint is only asked to roll back nothing."""

    def rollback(self, num_tokens: int) -> None:
        assert num_tokens == 0

    def advance(self, token: int) -> None: ...


def late(entry: PlanEntry, make: Made | None = None) -> PlanEntry:
    """The same entry of one row with a mask that is yet to be computed."""
    row = entry.rows[-1]
    assert row.sampling is not None
    mask, sampling = row.sampling.mask, replace(row.sampling, mask=None)
    assert mask is not None
    constraint: Constraint = Nothing()  # type: ignore[assignment]
    masks = LateMasks(constraint, make or (lambda banned: mask), [sampling], [])
    return replace(entry, rows=[replace(row, sampling=sampling)], late_masks=masks)


def one_row_each(runner: CpuRunner, count: int, number: int) -> list[PlanEntry]:
    rng = np.random.default_rng(count)
    return list(masked_plan(runner, [1] * number, masks(rng, count, number)).entries)


def tokens(results: Sequence[EntryResult]) -> list[int]:
    assert [result.error for result in results] == [None] * len(results)
    return [result.rows[-1].token_id for result in results]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("count", [1, 40, 3000, CHANNELS])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_late_masks_give_the_same_tokens(threads: int, count: int, temperature: float) -> None:
    runner = open_greedy(random_head(6), num_threads=threads)
    for number in (1, 3, 8):
        entries = [
            replace(entry, rows=[replace(row, sampling=replace(row.sampling, temperature=temperature, seed=number))])
            for entry in one_row_each(runner, count, number)
            for row in entry.rows
            if row.sampling is not None
        ]
        expected = tokens(runner.execute(StepPlan(entries)).entries)
        assert tokens(runner.execute(StepPlan([late(entry) for entry in entries])).entries) == expected
        mixed = [entry if index % 2 else late(entry) for index, entry in enumerate(entries)]
        assert tokens(runner.execute(StepPlan(mixed)).entries) == expected
    runner.close()


def test_a_step_waits_for_its_masks() -> None:
    runner = open_greedy(random_head(6), num_threads=2)
    [entry] = one_row_each(runner, 1, 1)
    expected = tokens(runner.execute(StepPlan([entry])).entries)
    [row] = entry.rows
    assert row.sampling is not None
    mask = row.sampling.mask
    assert mask is not None

    def slow(banned: Sequence[int]) -> bytes:
        time.sleep(0.2)
        return mask

    assert tokens(runner.execute(StepPlan([late(entry, slow)])).entries) == expected
    runner.close()


def test_a_mask_that_fails_leaves_its_neighbours_alone() -> None:
    runner = open_greedy(random_head(6))
    entries = one_row_each(runner, 40, 4)
    expected = tokens(runner.execute(StepPlan(entries)).entries)

    def fail(banned: Sequence[int]) -> bytes:
        raise RequestError("too much", param="structured_outputs", reason="compile_limit")

    def foreign(banned: Sequence[int]) -> bytes:
        return mask_of(np.array([3])) + b"\0\0\0\0"

    asked = [late(entries[0]), late(entries[1], fail), late(entries[2], foreign), late(entries[3])]
    results = runner.execute(StepPlan(asked)).entries
    errors = [entry.late_masks.error for entry in asked if entry.late_masks is not None]
    assert [type(error) for error in errors] == [type(None), RequestError, EngineError, type(None)]
    assert [tokens([results[i]])[0] for i in (0, 3)] == [expected[0], expected[3]]
    runner.close()


def test_a_late_mask_that_allows_nothing_fails_its_entry_alone() -> None:
    runner = open_greedy(random_head(6))
    entries = one_row_each(runner, 40, 3)
    expected = tokens(runner.execute(StepPlan(entries)).entries)
    asked = [late(entries[0]), late(entries[1], lambda banned: bytes(len(mask_of(np.array([3]))))), late(entries[2])]
    results = runner.execute(StepPlan(asked)).entries
    assert results[1].error is not None
    assert tokens([results[0], results[2]]) == [expected[0], expected[2]]
    runner.close()


def test_a_malformed_entry_beside_late_masks_fails_alone() -> None:
    runner = open_greedy(random_head(6))
    [entry] = one_row_each(runner, 40, 1)
    expected = tokens(runner.execute(StepPlan([entry])).entries)
    bad = replace(plan(runner, [1]).entries[0], token_ids=[1 << 30], seq_id=7)
    results = runner.execute(StepPlan([late(entry), bad])).entries
    assert tokens(results[:1]) == expected
    assert results[1].error is not None
    runner.close()


def test_masks_that_do_not_come_fail_their_entry_and_not_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_thread, "PATIENCE_S", 0.05)
    monkeypatch.setattr(cpu_runner, "PATIENCE_S", 0.05)
    runner = open_greedy(random_head(6), num_threads=2)
    entries = one_row_each(runner, 40, 2)
    expected = tokens(runner.execute(StepPlan(entries)).entries)
    stuck = threading.Event()

    def hang(banned: Sequence[int]) -> bytes:
        stuck.wait(60)
        raise RequestError("late", param="structured_outputs", reason="compile_limit")

    asked = [late(entries[0], hang), late(entries[1])]
    results, error = execute_isolated(runner, StepPlan(asked))
    assert error is None
    assert asked[0].late_masks is not None
    assert isinstance(asked[0].late_masks.error, EngineError)
    assert tokens(results.entries[1:]) == expected[1:]
    assert tokens(runner.execute(StepPlan([late(entry) for entry in entries])).entries) == expected
    stuck.set()
    runner.close()
