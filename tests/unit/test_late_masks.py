"""Masks computed while the model runs: the tokens are those of masks made with the plan, and failures stay apart."""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import pytest
from automaton import Automaton, Walk, chain
from engine_support import AlwaysDraft, Harness, request, scaled
from hypothesis import given, settings
from hypothesis import strategies as st
from test_structured_rows import INFO, check, drafting, outcome, repeat, requests, structured

from setpoint.engine.blast_wall import execute_isolated
from setpoint.engine.late_masks import LateMasks
from setpoint.engine.plan import RowSampling, RunnerInfo, StepPlan, StepResult
from setpoint.errors import EngineError, RequestError
from setpoint.runtime.fake import FakeRunner, fake_info

LATE = replace(INFO, late_masks=True)


LIMIT = RequestError("too much work", param="structured_outputs", reason="compile_limit")


@dataclass
class Refusing(Walk):
    """Fails where the text is `refused`."""

    refused: Sequence[int] = ()
    error: Exception = LIMIT
    taken: list[int] = field(default_factory=list)

    def mask(self) -> bytes:
        if self.taken == list(self.refused):
            raise self.error
        return super().mask()

    def advance(self, token: int) -> None:
        super().advance(token)
        self.taken.append(token)

    def rollback(self, num_tokens: int) -> None:
        super().rollback(num_tokens)
        del self.taken[len(self.taken) - num_tokens :]


@dataclass(frozen=True)
class Limited(Automaton):
    refused: Sequence[int] = ()
    error: Exception = LIMIT

    def start(self, stop_ids: Collection[int]) -> Refusing:
        return Refusing(self, frozenset(), refused=self.refused, error=self.error)


def limited(*refused: int, error: Exception = LIMIT) -> Limited:
    """Any of 1 to 4, again and again, but nothing after `refused`."""
    return Limited([dict.fromkeys(range(1, 5), 0)], frozenset(), refused, error)


@given(st.data())
@settings(max_examples=scaled(120), deadline=None)
def test_late_masks_change_no_token(data: st.DataObject) -> None:
    """With drafts, jumps, chunks, preemption, cached prefixes and several sequences of a request."""
    items = [data.draw(requests(number)) for number in range(data.draw(st.integers(1, 4)))]
    plain = {}
    for item in items:
        alone = Harness(INFO, prefix_caching=False, jump_forward=False, max_num_batched_tokens=1 << 20)
        alone.add(item)
        plain.update(outcome(alone))
    info = fake_info(num_blocks=data.draw(st.sampled_from([14, 20, 64])), block_size=4, max_model_len=44)
    harness = Harness(
        replace(info, late_masks=True),
        speculator=data.draw(st.sampled_from([None, AlwaysDraft(repeat), drafting(1, 2, 3, 4)])),
        prefix_caching=data.draw(st.booleans()),
        max_drafts=data.draw(st.integers(1, 4)),
        max_num_batched_tokens=data.draw(st.sampled_from([2, 5, 64])),
        jump_forward=data.draw(st.booleans()),
    )
    for item in items:
        harness.add(item)
    assert outcome(harness) == plain
    for item in items:
        check(item, plain)
    drawn = [entry for plan in harness.plans for entry in plan.entries if any(row.sampling for row in entry.rows)]
    assert all(entry.late_masks is not None and entry.late_masks.is_done for entry in drawn)


def test_only_structured_entries_that_draw_have_late_masks() -> None:
    harness = Harness(LATE, max_num_batched_tokens=6)
    harness.add(structured("a", chain([1, 2], [3, 4]), prompt=range(20, 30)))
    harness.add(request("b", range(5), max_tokens=3))
    harness.run()
    for plan in harness.plans:
        for entry in plan.entries:
            draws = any(row.sampling for row in entry.rows)
            assert (entry.late_masks is not None) == (draws and entry.seq_id == 0)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("refused", [[], [1], [1, 1, 1]])
def test_a_limit_fails_its_request_where_it_is_reached(late: bool, refused: list[int]) -> None:
    harness = Harness(LATE if late else INFO, next_token=lambda context: 1)
    harness.add(structured("a", limited(*refused), max_tokens=9))
    harness.add(request("b", range(5), max_tokens=12))
    while harness.scheduler.has_work:
        harness.step()
    error = harness.last("a").error
    assert isinstance(error, RequestError)
    assert error.reason == "compile_limit"
    assert [token for event in harness.events if event.request_id == "a" for token in event.token_ids] == refused
    assert harness.last("b").num_output_tokens == 12


@pytest.mark.parametrize("late", [False, True])
def test_a_limit_behind_a_draft_ends_nothing_but_the_draft(late: bool) -> None:
    """The output takes another way, so that it never comes where the grammar has nothing to say."""
    harness = Harness(LATE if late else INFO, next_token=lambda context: 1, speculator=drafting(1, 2, 3), max_drafts=3)
    harness.add(structured("a", limited(1, 1, 2), max_tokens=6))
    assert harness.run()["a", 0] == [1] * 6
    assert harness.scheduler.counters.speculation.accepted_tokens > 0


@pytest.mark.parametrize("late", [False, True])
def test_a_draft_that_comes_true_and_leads_to_a_limit_fails_the_request_then(late: bool) -> None:
    harness = Harness(LATE if late else INFO, next_token=lambda context: 1, speculator=drafting(1, 1, 1), max_drafts=3)
    harness.add(structured("a", limited(1, 1, 1), max_tokens=9))
    while harness.scheduler.has_work:
        harness.step()
    assert harness.last("a").error is not None
    assert [token for event in harness.events for token in event.token_ids] == [1, 1, 1]


def test_an_unexpected_failure_of_a_matcher_is_not_told_to_the_client() -> None:
    harness = Harness(LATE, next_token=lambda context: 1)
    harness.add(structured("a", limited(1, error=ZeroDivisionError("secret")), max_tokens=9))
    harness.add(structured("b", limited(9), max_tokens=5))
    while harness.scheduler.has_work:
        harness.step()
    error = harness.last("a").error
    assert isinstance(error, EngineError)
    assert "secret" not in str(error)
    assert harness.last("b").num_output_tokens == 5


class Flaky(FakeRunner):
    """Every third step of several entries fails as a whole: before masks are computed, or after."""

    def execute(self, plan: StepPlan) -> StepResult:
        turn = self.num_steps % 3
        if turn == 1 and len(plan.entries) > 1:
            self.num_steps += 1
            raise OSError("before")
        result = super().execute(plan)
        if turn == 2 and len(plan.entries) > 1:
            raise OSError("after")
        return result


class Repeating(FakeRunner):
    """Executes as the engine does."""

    def __init__(self, info: RunnerInfo) -> None:
        super().__init__(info)
        self.flaky = Flaky(info)

    def execute(self, plan: StepPlan) -> StepResult:
        result, error = execute_isolated(self.flaky, plan)
        assert error is None
        return result

    def poison(self, group: int, block: int) -> None:
        self.flaky.poison(group, block)


def test_masks_survive_a_step_that_fails_and_is_repeated_entry_by_entry() -> None:
    found = {}
    for late in (False, True):
        harness = Harness(LATE if late else INFO, speculator=AlwaysDraft(repeat), max_drafts=3)
        harness.runner = Repeating(harness.info)
        for number in range(3):
            harness.add(structured(f"r{number}", chain(*[[1, 2, 3]] * 12), seed=number, temperature=1.0))
        found[late] = outcome(harness)
        assert harness.runner.flaky.num_steps > len(harness.plans) + 6
    assert found[True] == found[False]


def test_masks_are_computed_once_whoever_asks() -> None:
    walk = chain([1, 2], [3, 4]).start(())
    rows = [RowSampling(), RowSampling()]
    masks = LateMasks(walk, lambda banned: walk.mask(), rows, [1])
    thread = threading.Thread(target=masks.compute)
    thread.start()
    thread.join()
    masks.compute()
    assert walk.num_masks == 2
    assert walk.states == [0]
    assert [row.mask is not None for row in rows] == [True, True]
