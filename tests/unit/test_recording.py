"""Replay equivalence: told the same at the same times, a scheduler on a virtual clock plans the same steps."""

from __future__ import annotations

import itertools
import queue
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from engine_support import AlwaysDraft, request, scaled
from hypothesis import given, settings
from hypothesis import strategies as st

from setpoint.engine.engine import Engine
from setpoint.engine.events import Event
from setpoint.engine.plan import RunnerInfo, StepPlan, StepResult
from setpoint.engine.request import Request
from setpoint.engine.scheduler import Scheduler, SchedulerLimits
from setpoint.engine.speculation.prompt_lookup import PromptLookup
from setpoint.engine.speculation.speculator import Speculator
from setpoint.runtime.fake import FakeRunner, fake_info
from setpoint.tune.simulate.recording import RecordedScheduler, Recording, plan_digest, replay

INFO = fake_info(vocab_size=6, num_blocks=14, block_size=4, max_model_len=40)


def make(
    kind: Callable[..., Scheduler], info: RunnerInfo, *, drafts: int, prefix_caching: bool, budget: int
) -> Scheduler:
    speculator = Speculator([PromptLookup()], clock=lambda: 0.0) if drafts else None
    limits = SchedulerLimits(max_num_seqs=4, max_num_batched_tokens=budget, max_drafts=drafts)
    return kind(info, limits, enable_prefix_caching=prefix_caching, seed=3, speculator=speculator)


class NoisyClock:
    """Time that passes by itself, unevenly."""

    def __init__(self, seed: int) -> None:
        self._random, self._now = random.Random(seed), 0.0

    def __call__(self) -> float:
        self._now += self._random.expovariate(100.0)
        return self._now


def tokens(events: Sequence[Event]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for event in events:
        assert event.error is None
        found.setdefault(event.request_id, []).extend(event.token_ids)
    return found


@st.composite
def traffic(draw: st.DrawFn) -> list[tuple[int, Request]]:
    """Steps to wait before each request; prompts that share beginnings and repeat themselves."""
    count = draw(st.integers(1, 8))
    made = []
    for number in range(count):
        prompt = ([1, 2, 3, 4] * 4)[: draw(st.integers(1, 12))] + draw(st.lists(st.integers(0, 5), max_size=6))
        item = request(str(number), prompt, max_tokens=draw(st.integers(1, 12)), priority=draw(st.integers(-1, 1)))
        made.append((draw(st.integers(0, 4)), item))
    return made


@settings(max_examples=scaled(60), deadline=None)
@given(traffic(), st.sampled_from([0, 3]), st.booleans(), st.sampled_from([5, 64]), st.integers(0, 9), st.booleans())
def test_a_replay_plans_the_same_steps(
    items: list[tuple[int, Request]], drafts: int, prefix_caching: bool, budget: int, seed: int, aborts: bool
) -> None:
    """With and without drafts and prefix cache, in a pool where sequences are preempted, at uneven times."""
    options = {"drafts": drafts, "prefix_caching": prefix_caching, "budget": budget}
    scheduler = make(RecordedScheduler, INFO, **options)
    assert isinstance(scheduler, RecordedScheduler)
    recording, clock, runner = scheduler.record(), NoisyClock(seed), FakeRunner(INFO)
    events: list[Event] = []
    waits = iter(items)
    following = next(waits, None)
    left = 0 if following is None else following[0]
    for step in itertools.count():
        while following is not None and left <= 0:
            scheduler.add(following[1], clock())
            following = next(waits, None)
            left = 0 if following is None else following[0]
        left -= 1
        if aborts and step == 3:
            events += scheduler.abort("0", None, clock())
        if following is None and not scheduler.has_work:
            break
        plan = scheduler.schedule(clock())
        events += scheduler.commit(plan, runner.execute(plan) if plan.entries else StepResult(), clock())
        assert step < 2000
    replayed = replay(recording, lambda: make(Scheduler, INFO, **options), INFO)
    assert (replayed.steps, replayed.diverged_at) == (len(recording.steps), None)
    # Who came and was aborted behind the last step is in no step: only the original tells of its end, without a token.
    computed = {name: ids for name, ids in tokens(events).items() if ids}
    assert {name: ids for name, ids in tokens(replayed.events).items() if ids} == computed


def test_what_an_engine_did_is_planned_again() -> None:
    """The thread with its inbox, against the plain loop: preemption, drafts and a warm prefix cache included."""

    def make_drafting(kind: type[Scheduler]) -> Scheduler:
        """Guesses at every step: what a thread's steps take is not the test's to say."""
        limits = SchedulerLimits(max_num_seqs=4, max_num_batched_tokens=16, max_drafts=3)
        guess = AlwaysDraft(lambda token_ids, most: [(token_ids[-1] + 1 + place) % 3 for place in range(most)])
        return kind(INFO, limits, seed=3, speculator=guess)

    scheduler = make_drafting(RecordedScheduler)
    assert isinstance(scheduler, RecordedScheduler)
    recording = scheduler.record()
    delivered: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
    engine = Engine(scheduler, FakeRunner(INFO, lambda context: (context[-1] + 1) % 3), delivered.put)
    for number in range(6):
        engine.submit(request(f"early-{number}", [1, 2, 0] * 4, max_tokens=20, ignore_eos=True))
    engine.start()
    for number in range(6):
        engine.submit(request(f"late-{number}", [1, 2, 0] * 4, max_tokens=20, ignore_eos=True))
    assert engine.drain(30)
    engine.shutdown()
    events = [event for batch in iter(lambda: [] if delivered.empty() else delivered.get(), []) for event in batch]
    assert scheduler.counters.preemptions > 0
    assert scheduler.counters.prefix_hits > 0
    assert scheduler.counters.speculation.accepted_tokens > 0
    replayed = replay(recording, lambda: make_drafting(Scheduler), INFO)
    assert (replayed.steps, replayed.diverged_at) == (len(recording.steps), None)
    assert tokens(replayed.events) == tokens(events)


def _recorded() -> Recording:
    scheduler = make(RecordedScheduler, INFO, drafts=0, prefix_caching=True, budget=8)
    assert isinstance(scheduler, RecordedScheduler)
    recording, runner = scheduler.record(), FakeRunner(INFO)
    for name in "abc":
        scheduler.add(request(name, [1, 2, 3, 4, 5], max_tokens=4, ignore_eos=True), 0.0)
    for step in itertools.count(1):
        if not scheduler.has_work:
            return recording
        plan = scheduler.schedule(float(step))
        scheduler.commit(plan, runner.execute(plan), step + 0.5)
    raise AssertionError


def test_another_policy_is_noticed_at_its_first_step() -> None:
    recording = _recorded()
    same = replay(recording, lambda: make(Scheduler, INFO, drafts=0, prefix_caching=True, budget=8), INFO)
    other = replay(recording, lambda: make(Scheduler, INFO, drafts=0, prefix_caching=True, budget=7), INFO)
    assert same.diverged_at is None
    assert other.diverged_at == 0


def test_a_request_that_came_a_step_later_is_noticed() -> None:
    recording = _recorded()
    first, second = recording.steps[:2]
    recording.steps[:2] = [replace(first, told=first.told[:1]), replace(second, told=first.told[1:])]
    late = replay(recording, lambda: make(Scheduler, INFO, drafts=0, prefix_caching=True, budget=8), INFO)
    assert late.diverged_at == 0


@pytest.mark.parametrize("change", [{"start": 1}, {"num_drafts": 1}, {"seq_id": 9}, {"block_tables": ([3],)}])
def test_the_digest_sees_every_difference(change: dict[str, object]) -> None:
    scheduler = make(Scheduler, INFO, drafts=0, prefix_caching=True, budget=8)
    scheduler.add(request("a", [1, 2, 3], max_tokens=2), 0.0)
    (entry,) = scheduler.schedule(0.0).entries
    other = replace(entry, **change)  # type: ignore[arg-type]
    assert plan_digest(StepPlan((entry,))) != plan_digest(StepPlan((other,)))
