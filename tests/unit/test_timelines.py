"""Timelines: phases cover each sequence's life without gap or overlap, whatever happens, and say what happened."""

from __future__ import annotations

from typing import Any

import pytest
from engine_support import AlwaysDraft, Harness, request, scaled
from hypothesis import given, settings
from hypothesis import strategies as st
from tier_support import Attic, fixed_cost, tiers

from setpoint.engine.scheduler import Scheduler, SchedulerLimits
from setpoint.engine.slo import HeldSla
from setpoint.engine.step_cost import Rising, StepCost
from setpoint.engine.timeline import MAX_SPANS, Cause, Kind, Timeline
from setpoint.engine.timelines import Timelines
from setpoint.errors import QueueFullError
from setpoint.runtime.fake import CostModelRunner, VirtualClock, fake_info
from setpoint.tune.simulate.simulator import ModelCost, turn

SMALL = fake_info(vocab_size=5, num_blocks=9, block_size=4, max_model_len=28)


def assert_covered(timeline: Timeline, end: float) -> None:
    """Spans follow each other from submission to `end`, and the parts of each add up to it."""
    assert len(timeline.spans) <= MAX_SPANS
    at = timeline.submitted
    for span in timeline.spans:
        assert span.start == at
        assert span.end > span.start
        assert sum(seconds for _, seconds in span.parts) == pytest.approx(span.seconds, abs=1e-8)
        assert all(seconds > 0 for _, seconds in span.parts)
        assert len({cause for cause, _ in span.parts}) == len(span.parts)
        at = span.end
    assert at == end or not timeline.spans


def read(harness: Harness, name: str) -> list[Timeline]:
    found = harness.scheduler.timelines.read(name, harness.now + harness.step_s)
    assert found is not None
    return found


def totals(timeline: Timeline) -> dict[Cause, float]:
    sums: dict[Cause, float] = {}
    for span in timeline.spans:
        for cause, seconds in span.parts:
            sums[cause] = sums.get(cause, 0.0) + seconds
    return sums


ACTIONS = st.one_of(
    st.tuples(st.just("add"), st.integers(1, 18), st.sampled_from([1, 3, 9]), st.sampled_from([1, 1, 3])),
    st.tuples(st.just("step"), st.integers(1, 4), st.just(0), st.just(0)),
    st.tuples(st.just("abort"), st.integers(0, 9), st.booleans(), st.sampled_from([None, 0])),
    st.tuples(st.just("preempt"), st.just(0), st.just(0), st.just(0)),
    st.tuples(st.just("limits"), st.integers(1, 6), st.sampled_from([1, 5, 64]), st.just(0)),
)


@given(actions=st.lists(ACTIONS, max_size=40), drafts=st.booleans(), step_s=st.sampled_from([0.0, 0.25, 0.9]))
@settings(max_examples=scaled(60), deadline=None)
def test_phases_cover_every_life(actions: list[Any], drafts: bool, step_s: float) -> None:
    speculator = AlwaysDraft(lambda token_ids, most: token_ids[-2:][:most]) if drafts else None
    limits = {"max_num_batched_tokens": 8, "max_num_seqs": 4, "max_num_queued_reqs": 6, "max_drafts": 2 * drafts}
    harness = Harness(SMALL, speculator=speculator, **limits)
    harness.step_s = step_s
    names: list[str] = []
    for action, first, second, third in actions:
        if action == "add":
            item = request(f"r{len(names)}", [i % 5 for i in range(first)], max_tokens=second, n=third, temperature=1.0)
            try:
                harness.add(item)
                names.append(item.request_id)
            except QueueFullError:
                pass
        elif action == "step":
            for _ in range(first):
                harness.step()
        elif action == "abort" and names:
            name = names[first % len(names)]
            if second:
                harness.step(between=lambda name=name, index=third: harness.abort(name, index))
            else:
                harness.abort(name, third)
        elif action == "preempt":
            roster = harness.scheduler._roster
            for seq in roster.running[-1:]:
                roster.preempt(seq)
        elif action == "limits":
            harness.scheduler.limits = type(harness.scheduler.limits)(first, second, 2 * drafts, max_num_queued_reqs=6)
        for name in names:
            for timeline in read(harness, name):
                if timeline.finished is None:
                    assert_covered(timeline, harness.now + step_s)
    harness.run()
    for name in names:
        for timeline in read(harness, name):
            assert timeline.phase is None
            assert timeline.finished is not None
            assert_covered(timeline, timeline.finished)
            last = harness.last(name, timeline.index)
            assert timeline.finish_reason == last.finish_reason
            assert timeline.num_output == last.num_output_tokens
            assert timeline.num_preemptions == last.num_preemptions
            assert timeline.num_accepted <= timeline.num_drafted
            firsts = [
                e.time for e in harness.events if (e.request_id, e.index) == (name, timeline.index) and e.token_ids
            ]
            assert (timeline.first_token is None) == (not firsts)
            if firsts:
                assert timeline.first_token == firsts[0]
    timelines = harness.scheduler.timelines
    assert timelines.num_live == 0
    assert not timelines._computing
    assert not timelines.aside


def slow(harness: Harness, step_s: float = 0.75) -> Harness:
    harness.step_s = step_s
    return harness


def test_a_full_house_is_named() -> None:
    harness = slow(Harness(max_num_seqs=1, max_num_batched_tokens=64))
    harness.add(request("first", range(1, 5), max_tokens=6))
    harness.step()
    harness.add(request("second", range(5, 9), max_tokens=2))
    harness.run()
    second = read(harness, "second")[0]
    assert [span.kind for span in second.spans] == [Kind.INBOX, Kind.QUEUE, Kind.PREFILL, Kind.DECODE]
    assert dict(second.spans[1].parts) == {Cause.PLACES: pytest.approx(5.0)}  # the other five tokens of the first
    assert second.num_ahead == 0


def test_a_full_cache_is_named() -> None:
    info = fake_info(num_blocks=6, block_size=4, max_model_len=24)
    harness = slow(Harness(info, max_num_seqs=8))
    harness.add(request("first", range(1, 16), max_tokens=6))
    harness.step()
    harness.add(request("second", range(20, 34), max_tokens=2))
    harness.run()
    assert set(totals(read(harness, "second")[0])) >= {Cause.KV_BLOCKS}


def test_a_spent_budget_is_named() -> None:
    harness = slow(Harness(max_num_batched_tokens=4))
    harness.add(request("first", range(1, 17), max_tokens=2))
    harness.add(request("second", range(20, 24), max_tokens=2))
    harness.run()
    second = totals(read(harness, "second")[0])
    assert second[Cause.BUDGET] == pytest.approx(4.0)


def test_chunks_are_counted_and_shared_out_by_tokens() -> None:
    harness = slow(Harness(max_num_batched_tokens=8))
    harness.add(request("decoding", [1, 2], max_tokens=20))
    harness.step()
    harness.add(request("long", range(10, 38), max_tokens=2))
    harness.run()
    (prefill,) = [span for span in read(harness, "long")[0].spans if span.kind is Kind.PREFILL]
    assert (prefill.num_steps, prefill.num_tokens, prefill.others_tokens) == (4, 28, 4)  # 7 + 7 + 7 + 7 beside a decode
    parts = dict(prefill.parts)
    assert parts[Cause.PREFILL_OTHERS] == pytest.approx(4 * 0.75 / 8)
    assert parts[Cause.PREFILL] == pytest.approx(4 * 0.75 * 7 / 8)
    assert parts[Cause.BETWEEN_STEPS] == pytest.approx(3 * 0.25)


def test_decode_steps_lengthened_by_a_prompt_are_measured_against_the_others() -> None:
    harness = slow(Harness(max_num_batched_tokens=64), 0.5)
    harness.add(request("decoding", [1, 2], max_tokens=12))
    for _ in range(4):
        harness.step()
    harness.add(request("long", range(10, 42), max_tokens=1))
    harness.step_s = 0.9  # the step with the prompt
    harness.step()
    harness.step_s = 0.5
    harness.run()
    (decode,) = [span for span in read(harness, "decoding")[0].spans if span.kind is Kind.DECODE]
    assert (decode.num_steps, decode.num_mixed_steps, decode.others_tokens) == (11, 1, 32)
    assert dict(decode.parts)[Cause.DECODE_PREFILL] == pytest.approx(0.4)
    assert dict(decode.parts)[Cause.DECODE] == pytest.approx(11 * 0.5)


def test_a_preemption_is_a_wait_and_a_recompute() -> None:
    harness = slow(Harness(prefix_caching=False))
    harness.add(request("a", range(1, 11), max_tokens=6))
    for _ in range(3):
        harness.step()
    roster = harness.scheduler._roster
    roster.preempt(roster.running[0])
    harness.run()
    timeline = read(harness, "a")[0]
    kinds = [span.kind for span in timeline.spans]
    assert kinds.count(Kind.RECOMPUTE) == 1
    (again,) = [span for span in timeline.spans if span.kind is Kind.RECOMPUTE]
    assert again.num_tokens == 13  # 12 that were computed before, and the last one drawn
    assert totals(timeline)[Cause.PREEMPTED] > 0


def test_siblings_wait_for_their_prompt_and_find_it() -> None:
    harness = slow(Harness(max_num_batched_tokens=8))
    harness.add(request("twins", range(1, 30), max_tokens=3, n=2, temperature=1.0))
    harness.run()
    leader, twin = read(harness, "twins")
    assert Cause.SIBLING in totals(twin)
    assert twin.cached_tokens == 28
    assert leader.cached_tokens == 0


def test_those_who_come_later_and_go_first_are_counted() -> None:
    harness = slow(Harness(max_num_seqs=1))
    harness.add(request("running", [1, 2], max_tokens=5))
    harness.step()
    harness.add(request("patient", [3, 4], max_tokens=2))
    for number in range(3):
        harness.add(request(f"urgent{number}", [5, 6], max_tokens=2, priority=-1))
    harness.run()
    assert read(harness, "patient")[0].overtaken_by == 3
    assert read(harness, "urgent0")[0].overtaken_by == 0


def test_submission_counts_from_the_inbox_on() -> None:
    harness = slow(Harness())
    item = request("a", [1, 2], max_tokens=1)
    harness.scheduler.reserve(item, 0.25)
    harness.scheduler.enqueue(item, 0.75)
    harness.run()
    timeline = read(harness, "a")[0]
    assert timeline.submitted == 0.25
    assert timeline.spans[0].kind is Kind.INBOX
    assert dict(timeline.spans[0].parts) == {Cause.STEP_UNDER_WAY: 0.75}


def test_a_simulated_request_is_explained_in_virtual_time() -> None:
    clock = VirtualClock()
    info = fake_info(num_blocks=64, block_size=4, max_model_len=128)
    runner, scheduler = CostModelRunner(info, clock), Scheduler(info, SchedulerLimits(2, 16), seed=1)
    for number in range(5):
        params = {"max_tokens": 4, "ignore_eos": True, "temperature": 0.0}
        scheduler.add(request(f"r{number}", range(number, number + 30), **params), clock.seconds)
    while scheduler.has_work:
        turn(scheduler, runner, clock)
    for number in range(5):
        (timeline,) = scheduler.timelines.read(f"r{number}", clock.seconds) or []
        assert timeline.finished is not None
        assert 0 < timeline.finished <= clock.seconds
        assert_covered(timeline, timeline.finished)
        assert Cause.BETWEEN_STEPS not in totals(timeline)  # a virtual clock stands still between steps
    assert totals(timeline)[Cause.PLACES] > 0


TIERED = fake_info(num_blocks=8, block_size=4, max_model_len=32)


def test_tokens_are_told_by_the_tier_they_came_from() -> None:
    prompt = list(range(1, 18))  # four full blocks and one token
    harness = slow(Harness(TIERED, lower=tiers(TIERED, host_blocks=100)))
    for name, tokens in (("first", prompt), ("pool", prompt), ("other", range(100, 124)), ("more", range(200, 224))):
        harness.add(request(name, tokens, max_tokens=2))
        harness.run()
    harness.add(request("memory", prompt, max_tokens=2))
    harness.run()
    found = {name: read(harness, name)[0] for name in ("first", "pool", "memory")}
    assert {name: (t.cached_tokens, t.memory_tokens, t.disk_tokens) for name, t in found.items()} == {
        "first": (0, 0, 0),
        "pool": (16, 0, 0),
        "memory": (0, 16, 0),
    }
    (prefill,) = [span for span in found["memory"].spans if span.kind is Kind.PREFILL]
    assert prefill.num_tokens == 1


def test_blocks_that_come_over_several_steps_are_a_phase_before_the_rest() -> None:
    info = fake_info(num_blocks=40, block_size=4, max_model_len=128)
    harness = slow(Harness(info, lower=tiers(info, host_blocks=100), max_num_seqs=4, max_num_batched_tokens=256))
    prompt = list(range(1, 90))
    harness.add(request("first", prompt, max_tokens=2))
    harness.run()
    for number in range(2):
        harness.add(request(f"other{number}", [(i * (number + 2)) % 250 for i in range(120)], max_tokens=2))
        harness.run()
    harness.add(request("beside", [7, 8], max_tokens=40))
    harness.step()
    harness.add(request("memory", prompt, max_tokens=2))
    harness.run()
    (timeline,) = read(harness, "memory")
    kinds = [span.kind for span in timeline.spans]
    assert timeline.memory_tokens >= 80
    assert kinds[-3:] == [Kind.RESTORE, Kind.PREFILL, Kind.DECODE]
    assert timeline.finished is not None
    assert_covered(timeline, timeline.finished)


def test_a_wait_for_the_disk_is_a_phase() -> None:
    disk = Attic()
    first = Harness(TIERED, lower=tiers(TIERED, disk=disk))
    first.add(request("first", range(1, 18), max_tokens=2))
    first.run()
    while first.scheduler.num_unsaved:
        first.step()
    disk.blocks_at_once = 1
    cost = fixed_cost(TIERED, compute_s_per_token=0.5)
    harness = slow(Harness(TIERED, lower=tiers(TIERED, disk=disk, cost=cost)))
    harness.add(request("again", range(1, 18), max_tokens=2))
    harness.run()
    (timeline,) = read(harness, "again")
    assert (timeline.cached_tokens, timeline.memory_tokens, timeline.disk_tokens) == (0, 0, 16)
    kinds = [span.kind for span in timeline.spans]
    assert kinds.index(Kind.FETCH) < kinds.index(Kind.PREFILL)
    assert totals(timeline)[Cause.DISK] > 0
    assert timeline.finished is not None
    assert_covered(timeline, timeline.finished)


def test_a_storm_of_preemptions_stays_bounded() -> None:
    harness = slow(Harness())
    harness.add(request("a", range(1, 11), max_tokens=100))
    roster = harness.scheduler._roster
    for _ in range(60):
        harness.step()
        if roster.running:
            roster.preempt(roster.running[0])
    harness.run()
    timeline = read(harness, "a")[0]
    assert timeline.num_preemptions > MAX_SPANS / 2
    assert timeline.finished is not None
    assert_covered(timeline, timeline.finished)


def test_the_oldest_are_forgotten() -> None:
    harness = Harness(max_num_queued_reqs=64)
    timelines = Timelines(max_finished=3, max_bytes=1 << 20)
    harness.scheduler.timelines = harness.scheduler._roster.timelines = timelines
    for index in range(5):
        harness.add(request(f"r{index}", [1, 2], max_tokens=1))
        harness.run()
    assert [timelines.read(f"r{index}", 99.0) is not None for index in range(5)] == [False, False, True, True, True]
    assert timelines.num_finished == 3
    tight = Timelines(max_finished=100, max_bytes=4000)
    harness.scheduler.timelines = harness.scheduler._roster.timelines = tight
    for index in range(5):
        harness.add(request(f"s{index}", [1, 2], max_tokens=1, n=2, temperature=1.0))
        harness.run()
    assert 0 < tight.num_bytes <= 4000
    assert 0 < tight.num_finished < 5
    assert tight.read("never seen", 1.0) is None


def test_steps_that_the_pacer_cut_are_counted() -> None:
    """Answers of at most 40 ms a token leave a long prompt little room in each step."""
    cost = StepCost(Rising((1, 101), (1e-3, 101e-3)), Rising((0, 1), (0.0, 1e-3)), 0.0, 0.0, 0.0)
    clock, info = VirtualClock(), fake_info(num_blocks=200, block_size=16, max_model_len=512)
    held = HeldSla.parse("ttft.p95<2s,tpot.p95<40ms")
    runner = CostModelRunner(info, clock, ModelCost(cost, info))
    scheduler = Scheduler(info, SchedulerLimits(), seed=1, held=held, step_cost=cost)
    answer = {"ignore_eos": True, "temperature": 0.0}
    scheduler.add(request("answering", range(8), max_tokens=60, **answer), clock.seconds)
    for _ in range(5):
        turn(scheduler, runner, clock)
    scheduler.add(request("long", [number % 200 for number in range(300)], max_tokens=4, **answer), clock.seconds)
    while scheduler.has_work:
        turn(scheduler, runner, clock)
    (timeline,) = scheduler.timelines.read("long", clock.seconds) or []
    (prefill,) = [span for span in timeline.spans if span.kind is Kind.PREFILL]
    assert 2 <= prefill.paced_steps <= prefill.num_steps
    assert_covered(timeline, timeline.finished or 0.0)
