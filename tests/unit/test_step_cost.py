"""The step-cost model: what is fitted, that it never falls, and how it follows a machine that drifts."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np
import pytest
from engine_support import scaled
from hypothesis import given, settings
from hypothesis import strategies as st

from setpoint.engine.plan import KVGroup, LogitsRow, PlanEntry
from setpoint.engine.step_cost import PARTS, Residuals, Rising, ShapeOf, StepCost, StepShape
from setpoint.engine.step_fit import (
    StepSample,
    fit_step_cost,
    leave_one_out,
    nonnegative_least_squares,
    relative_errors,
)
from setpoint.errors import ConfigError
from setpoint.tune.documents import from_document

ONE_GROUP = ShapeOf((KVGroup(64, None, 1024),))


def entry(start: int, count: int, rows: int = 1) -> PlanEntry:
    return PlanEntry(0, [0] * count, start, ([],), [LogitsRow(count - 1 - row) for row in range(rows)])


def decodes(count: int, context: int, drafts: int = 0) -> StepShape:
    return ONE_GROUP([entry(context, 1 + drafts, 1 + drafts)] * count)


def prompt(tokens: int, start: int = 0, beside: int = 0) -> StepShape:
    return ONE_GROUP([entry(128, 1)] * beside + [entry(start, tokens)])


GRID = [
    *(decodes(count, 128) for count in (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)),
    *(decodes(1, context) for context in (512, 2048)),
    decodes(8, 1024),
    decodes(32, 512),
    *(prompt(tokens) for tokens in (2, 4, 8, 16, 32, 64, 128, 256, 512)),
    prompt(256, 1024),
    prompt(512, 512),
    prompt(64, 0, 8),
    prompt(200, 100, 32),
    *(decodes(1, 128, drafts) for drafts in (1, 3, 7)),
    decodes(8, 128, 3),
]


def machine(shape: StepShape) -> float:
    """Memory and arithmetic under a smooth maximum, a tile step at 32 tokens, a head, attention."""
    memory, arithmetic = 4e-3, 0.3e-3 * shape.tokens + (2e-3 if shape.tokens > 32 else 0.0)
    rest = 4e-5 * shape.rows + 2e-5 * shape.entries + 2e-7 * shape.context + 2e-9 * shape.pairs
    return float((memory**4 + arithmetic**4) ** 0.25 + rest)


def samples(noise: float = 0.0, seed: int = 0) -> list[StepSample]:
    rng = random.Random(seed)
    return [StepSample(shape, machine(shape) * (1 + rng.uniform(-noise, noise))) for shape in GRID]


def test_the_fit_finds_the_machine_and_what_lies_between_its_samples() -> None:
    cost = fit_step_cost(samples())
    assert np.median(np.abs(relative_errors(cost, samples()))) < 0.01
    unseen = [decodes(10, 300), decodes(20, 700), prompt(300, 200), prompt(100, 0, 12), decodes(5, 200, 2)]
    for shape in unseen:
        assert cost.runner_seconds(shape) == pytest.approx(machine(shape), rel=0.06)
    assert np.median(np.abs(leave_one_out(samples(0.05)))) < 0.08


def test_what_one_sample_says_is_not_believed_by_the_fit_without_it() -> None:
    measured = samples()
    wrong = GRID.index(decodes(16, 128))
    measured[wrong] = replace(measured[wrong], seconds=3 * measured[wrong].seconds)
    assert min(leave_one_out(measured)) < -0.5
    assert min(relative_errors(fit_step_cost(measured), measured)) > min(leave_one_out(measured))


RISING_IN = ("entries", "tokens", "rows", "context", "pairs")


@settings(max_examples=scaled(40), deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(GRID), st.floats(1e-5, 1.0)), min_size=1, max_size=12),
    st.sampled_from(GRID),
    st.sampled_from(RISING_IN),
    st.integers(1, 1000),
)
def test_a_step_with_more_of_anything_never_costs_less(
    measured: Sequence[tuple[StepShape, float]], shape: StepShape, which: str, more: int
) -> None:
    cost = fit_step_cost([StepSample(*sample) for sample in measured])
    larger = replace(shape, **{which: getattr(shape, which) + more})
    assert cost.seconds(larger) >= cost.seconds(shape) >= 0.0
    assert sum(cost.parts(shape).values()) == pytest.approx(cost.seconds(shape))


@settings(max_examples=scaled(40), deadline=None)
@given(st.integers(1, 12), st.integers(1, 8), st.integers(0, 2**32))
def test_the_least_squares_are_least(num_rows: int, num_columns: int, seed: int) -> None:
    """The conditions of Karush, Kuhn and Tucker: no step from the solution makes the error smaller."""
    rng = np.random.default_rng(seed)
    matrix, target = rng.normal(size=(num_rows, num_columns)), rng.normal(size=num_rows)
    solution = nonnegative_least_squares(matrix, target)
    gradient = matrix.T @ (target - matrix @ solution)
    assert solution.min() >= 0
    assert gradient.max() < 1e-4
    assert np.abs(gradient[solution > 1e-6]).max(initial=0) < 1e-4


def test_nothing_measured_is_said() -> None:
    with pytest.raises(ConfigError, match="setpoint probe"):
        fit_step_cost([])
    with pytest.raises(ConfigError, match="setpoint probe"):
        fit_step_cost([StepSample(GRID[0], 0.0)])


def test_beyond_the_largest_size_it_goes_on_as_steeply() -> None:
    rising = Rising((1, 2, 4), (1.0, 1.0, 3.0))
    assert [rising(count) for count in (0, 1, 2, 3, 4, 5, 104)] == [1.0, 1.0, 1.0, 2.0, 3.0, 4.0, 103.0]
    assert Rising((7,), (2.0,))(5000) == 2.0
    for sizes, seconds in (((), ()), ((1, 1), (1.0, 2.0)), ((1, 2), (2.0, 1.0)), ((1, 2), (1.0,))):
        with pytest.raises(ValueError, match="size"):
            Rising(sizes, seconds)


@given(st.integers(0, 40), st.integers(1, 20), st.integers(1, 30))
def test_a_window_hides_what_lies_before_it(start: int, count: int, window: int) -> None:
    """Against the plain count of visible positions, token by token; a third of the KV bytes has the window."""
    shape = ShapeOf((KVGroup(8, None, 200), KVGroup(8, window, 100)))([entry(start, count)])
    seen = [min(position + 1, window) for position in range(start, start + count)]
    whole = sum(range(start + 1, start + count + 1))
    assert shape.pairs == pytest.approx((2 * whole + sum(seen)) / 3)
    visible = {position - back for position in range(start, start + count) for back in range(min(position + 1, window))}
    assert shape.context == pytest.approx((2 * (start + count) + len(visible)) / 3)
    assert (shape.entries, shape.tokens, shape.rows) == (1, count, 1)


def test_a_fit_survives_json() -> None:
    cost = fit_step_cost(samples(), host_s=1e-4, host_per_entry_s=1e-5)
    again = from_document(StepCost, json.loads(json.dumps(asdict(cost))))
    assert [again.seconds(shape) for shape in GRID] == [cost.seconds(shape) for shape in GRID]
    assert cost.seconds(GRID[4]) == pytest.approx(cost.runner_seconds(GRID[4]) + 1e-4 + 1e-5 * GRID[4].entries)
    assert set(cost.parts(GRID[0])) == set(PARTS)
    damaged = asdict(cost)
    damaged["head"]["seconds"] = damaged["head"]["seconds"][::-1]
    with pytest.raises(ValueError, match="ascend"):
        from_document(StepCost, json.loads(json.dumps(damaged)))


def test_residuals_follow_the_machine_and_keep_to_their_cell() -> None:
    residuals = Residuals()
    small, large = decodes(1, 128), prompt(512)
    assert residuals.factor(small) == 1.0
    for _ in range(200):
        residuals.observe(small, 1.0, 1.2)
    assert residuals.factor(small) == pytest.approx(1.2, rel=0.01)
    assert residuals.level == pytest.approx(1.2, rel=0.01)
    for _ in range(200):
        residuals.observe(small, 1.0, 1.2)
        residuals.observe(large, 1.0, 0.8)
    assert residuals.factor(small) > 1.15
    assert residuals.factor(large) < 0.85
    residuals.observe(small, 1.0, 1e9)  # one stall is not a new machine
    assert residuals.factor(small) < 1.6
    residuals.observe(small, 0.0, 1.0)
    residuals.observe(small, 1.0, -1.0)
    assert residuals.factor(small) < 1.6
