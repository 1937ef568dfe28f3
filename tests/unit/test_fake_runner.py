"""The oracle itself: a plan that a correct scheduler never makes changes the output, or raises."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from engine_support import request

from setpoint.engine.plan import LogitsRow, PlanEntry, RowSampling, StepPlan
from setpoint.engine.scheduler import Scheduler, SchedulerLimits
from setpoint.runtime.fake import CostModelRunner, FakeRunner, KVError, LinearCost, VirtualClock, fake_info

SAMPLE = RowSampling(temperature=0.0)
INFO = fake_info(num_blocks=8, block_size=4, max_model_len=32)


def entry(
    tokens: Sequence[int], start: int, *tables: Sequence[int], rows: Sequence[LogitsRow] | None = None
) -> PlanEntry:
    rows = (LogitsRow(len(tokens) - 1, SAMPLE),) if rows is None else rows
    return PlanEntry(0, tokens, start, tables, rows)


def drawn(runner: FakeRunner, *entries: PlanEntry) -> list[int]:
    return [row.token_id for result in runner.execute(StepPlan(entries)).entries for row in result.rows]


def test_output_depends_on_the_tokens_and_not_on_where_they_lie_or_how_they_came() -> None:
    whole = drawn(FakeRunner(INFO), entry([1, 2, 3, 4, 5, 6], 0, [0, 1]))
    elsewhere = drawn(FakeRunner(INFO), entry([1, 2, 3, 4, 5, 6], 0, [7, 3]))
    runner = FakeRunner(INFO)
    drawn(runner, entry([1, 2, 3], 0, [5], rows=()))
    chunked = drawn(runner, entry([4, 5], 3, [5, 2], rows=()), entry([9], 0, [1], rows=()))
    chunked = drawn(runner, entry([6], 5, [5, 2]), entry([8], 1, [1]))[:1]
    assert whole == elsewhere == chunked
    assert whole != drawn(FakeRunner(INFO), entry([0, 2, 3, 4, 5, 6], 0, [0, 1]))


def test_executing_again_changes_nothing() -> None:
    runner = FakeRunner(INFO)
    plan = entry([1, 2, 3, 4, 5], 0, [0, 1])
    assert drawn(runner, plan) == drawn(runner, plan)


def test_a_stale_block_of_equal_tokens_changes_the_output() -> None:
    """Block 1 holds the right tokens, computed after another first block: a real model's KV would differ."""
    runner = FakeRunner(INFO)
    drawn(runner, entry([1, 2, 3, 4, 5, 6, 7, 8], 0, [0, 1], rows=()))
    drawn(runner, entry([9, 2, 3, 4, 5, 6, 7, 8], 0, [2, 3], rows=()))
    right = drawn(runner, entry([6], 8, [0, 1, 4]))
    wrong = drawn(runner, entry([6], 8, [0, 3, 4]))
    assert right != wrong


@pytest.mark.parametrize(
    "bad",
    [
        entry([], 0, [0], rows=()),
        entry([1], 0),
        entry([1], 0, [0], [0]),
        entry([256], 0, [0]),
        entry([1], 0, []),
        entry([1], 0, [-1]),
        entry([1], 0, [8]),
        entry([1], 4, [0, 1]),  # the position before was never computed
        entry([1] * 33, 0, list(range(8))),
        entry([1], 0, [0], rows=(LogitsRow(1, SAMPLE),)),
        entry([1, 2], 0, [0], rows=(LogitsRow(1, SAMPLE), LogitsRow(0, SAMPLE))),
        entry([1], 0, [0], rows=(LogitsRow(0),)),
        entry([1], 0, [0], rows=(LogitsRow(0, RowSampling(allowed_ids=())),)),
    ],
    ids=lambda bad: str(bad.start),
)
def test_impossible_entries_raise(bad: PlanEntry) -> None:
    with pytest.raises((KVError, IndexError, ValueError)):
        drawn(FakeRunner(INFO), bad)


def test_a_poisoned_or_overwritten_block_raises() -> None:
    for damage in (
        lambda runner: runner.poison(0, 0),
        lambda runner: drawn(runner, entry([1, 2, 3, 4, 9, 9, 9, 9], 0, [5, 0], rows=())),
    ):
        runner = FakeRunner(INFO)
        drawn(runner, entry([1, 2, 3, 4, 5], 0, [0, 1], rows=()))
        damage(runner)
        with pytest.raises(KVError):
            drawn(runner, entry([6], 5, [0, 1]))


def test_writing_into_a_shared_block_raises() -> None:
    runner = FakeRunner(INFO)
    with pytest.raises(KVError, match="shared"):
        drawn(runner, entry([1], 0, [0]), entry([1], 0, [0]))


def test_a_window_reads_no_further_back() -> None:
    info = fake_info(num_blocks=8, block_size=4, max_model_len=32, windows=(6,))
    runner = FakeRunner(info)
    drawn(runner, entry(range(12), 0, [0, 1, 2], rows=()))
    runner.poison(0, 0)
    seen = drawn(runner, entry([12], 12, [-1, 1, 2, 3]))  # sees 7..12
    assert seen == drawn(runner, entry([12], 12, [0, 1, 2, 3]))
    with pytest.raises(KVError):
        drawn(runner, entry([12], 12, [-1, -1, 2, 3]))


def test_greedy_ignores_seed_and_position_and_sampling_uses_them() -> None:
    def token(**fields: object) -> int:
        row = LogitsRow(0, RowSampling(**fields))  # type: ignore[arg-type]
        return drawn(FakeRunner(fake_info(vocab_size=1 << 20)), entry([1], 0, [0], rows=(row,)))[0]

    assert token(temperature=0.0, seed=1) == token(temperature=0.0, seed=2)
    assert token(temperature=1.0, seed=1) != token(temperature=1.0, seed=2)
    assert token(position=1) != token(position=2)
    assert token(frequency_penalty=1.0, penalty_ids=[1], penalty_counts=[1]) != token(
        frequency_penalty=1.0, penalty_ids=[1], penalty_counts=[2]
    )
    assert token(bias_ids=[7], bias_values=[100.0]) == 7
    assert token(banned_ids=[token()]) == token() + 1
    assert token(allowed_ids=[5]) == 5


def test_a_script_sees_the_context_and_replaces_the_hash() -> None:
    seen: list[list[int]] = []

    def script(context: list[int]) -> int:
        seen.append(context)
        return 42

    assert drawn(FakeRunner(INFO, script), entry([1, 2, 3], 0, [0])) == [42]
    assert seen == [[1, 2, 3]]


def test_a_closed_runner_refuses() -> None:
    runner = FakeRunner(INFO)
    runner.close()
    with pytest.raises(KVError):
        drawn(runner, entry([1], 0, [0]))


def test_the_cost_model_advances_the_virtual_clock() -> None:
    clock = VirtualClock()
    cost = LinearCost(base_s=1.0, per_sequence_s=0.1, per_token_s=0.01, per_context_token_s=0.001)
    runner = CostModelRunner(INFO, clock, cost)
    runner.execute(StepPlan((entry([1, 2, 3], 0, [0]), entry([1], 9, [0]))))
    assert clock() == pytest.approx(1.0 + 0.2 + 0.04 + 0.013)
    clock.advance_to(1.0)
    assert clock() > 1.0


def test_a_simulated_run_has_the_lengths_and_times_of_its_model() -> None:
    """Eight decodes of a linear model: the engine's own scheduler on virtual time."""
    clock = VirtualClock()
    runner = CostModelRunner(INFO, clock, LinearCost(base_s=1.0, per_token_s=0.5))
    scheduler = Scheduler(INFO, SchedulerLimits(max_num_batched_tokens=4))
    scheduler.add(request("a", range(6), max_tokens=3, ignore_eos=True), clock())
    events = []
    while scheduler.has_work:
        plan = scheduler.schedule(clock())
        result = runner.execute(plan)
        events += scheduler.commit(plan, result, clock())
    assert [event.time for event in events] == [5.0, 6.5, 8.0]  # chunks of 4 and 2, then two decodes
    assert sum(len(event.token_ids) for event in events) == 3
