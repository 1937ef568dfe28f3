"""Holding an SLA: it changes when tokens are computed and never which, always moves on, and can be repeated offline."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from engine_support import request, scaled
from hypothesis import given, settings
from hypothesis import strategies as st

from setpoint.engine.decisions import MAX_DECISIONS, Decisions, choose
from setpoint.engine.pacing import (
    LATE_TURN,
    STARTED,
    ArrivalView,
    Decode,
    Prompt,
    StepView,
    choose_arrival,
    choose_step,
)
from setpoint.engine.scheduler import Scheduler, SchedulerLimits
from setpoint.engine.slo import HeldSla, Slo
from setpoint.engine.step_cost import Rising, StepCost
from setpoint.errors import ConfigError, ShedError
from setpoint.runtime.fake import FakeRunner, fake_info

COST = StepCost(Rising((1, 64), (1e-3, 20e-3)), Rising((0, 1), (0.0, 1e-3)), 1e-5, 0.0, 0.0)
SIZES = ((0, 0.01), (16, 0.02), (32, 0.03), (64, 0.05))


def view(decodes: tuple[Decode, ...], prompts: tuple[Prompt, ...], **fields: object) -> StepView:
    plain = StepView(decodes, prompts, len(prompts), SIZES, 1000.0, 1, 0)
    return replace(plain, **fields)  # type: ignore[arg-type]


def test_the_budget_is_the_largest_that_keeps_every_deadline() -> None:
    prompts = (Prompt(0, math.inf, 500),)
    for slack_s, tokens in ((1.0, 64), (0.05, 64), (0.049, 32), (0.025, 16), (0.015, 0)):
        choice = choose_step(view((Decode(2.0, 50, 0.02), Decode(slack_s, 50, 0.02)), prompts))
        assert (choice.tokens, choice.binding, choice.misses) == (tokens, tokens < 64, 0)
    assert choose_step(view((), prompts)).tokens == 64


def test_a_late_sequence_gets_the_pace_that_brings_it_back_and_a_lost_one_no_say() -> None:
    prompts = (Prompt(0, math.inf, 500),)
    assert choose_step(view((Decode(-0.1, 20, 0.03),), prompts)).tokens == 16  # (-0.1 + 19 * 0.03) / 20 = 23 ms
    assert choose_step(view((Decode(-9.0, 20, 0.03),), prompts)).tokens == 64
    assert choose_step(view((Decode(-0.1, 20, 0.005),), prompts)).tokens == 64


def test_where_both_cannot_be_kept_the_fewest_misses_win() -> None:
    slow, prompts = Decode(0.025, 1, 0.02), (Prompt(0, 0.031, 32), Prompt(0, 0.06, 32))
    one = choose_step(view((slow,), prompts, rate=1100.0))
    assert (one.tokens, one.misses) == (32, 1)  # one answer is a token late, two first tokens are in time
    many = choose_step(view((slow,) * 4, prompts, rate=1100.0))
    assert (many.tokens, many.misses) == (16, 2)


def test_prompts_go_by_deadline_and_what_is_late_behind() -> None:
    prompts = (
        Prompt(0, 0.5, 100),
        Prompt(0, 0.2, 100),
        Prompt(0, 0.15, 900),
        Prompt(1, 0.1, 10),
        Prompt(STARTED, 0, 5),
    )
    choice = choose_step(view((), prompts))
    assert choice.order == (4, 1, 0, 2, 3)
    assert choice.late == 2
    assert choose_step(view((), prompts, turn=LATE_TURN)).order == (2, 4, 1, 0, 3)


slacks = st.floats(-5, 5)
decodes = st.builds(Decode, slacks, st.integers(1, 500), st.floats(1e-4, 1.0))
prompts = st.builds(Prompt, st.integers(-3, 3), slacks | st.just(math.inf), st.integers(1, 5000))


@settings(max_examples=scaled(150), deadline=None)
@given(
    st.lists(decodes, max_size=6),
    st.lists(prompts, min_size=1, max_size=8),
    st.lists(st.tuples(st.integers(1, 64), st.floats(1e-4, 1.0)), min_size=1, max_size=6),
    st.floats(0, 1e5),
    st.integers(0, 40),
)
def test_every_choice_is_possible_and_prompts_are_never_starved(
    running: list[Decode], waiting: list[Prompt], steps: list[tuple[int, float]], rate: float, turn: int
) -> None:
    sizes, seconds = [(0, 1e-3)], 1e-3
    for more, longer in steps:
        seconds += longer
        sizes.append((sizes[-1][0] + more, seconds))
    found = view(tuple(running), tuple(waiting), sizes=tuple(sizes), rate=rate, turn=turn)
    choice = choose_step(found)
    assert choice.tokens in [size for size, _ in sizes]
    assert sorted(choice.order) == list(range(len(waiting)))
    assert choice.tokens > 0 or running
    assert choose_step(replace(found, starved=4)).tokens > 0
    assert choose_step(found) == choice


def test_an_idle_engine_takes_anyone_and_a_busy_one_says_when() -> None:
    idle = ArrivalView(0.2, 5000, 0, 0, 4, 0.0, 1000.0, 0.0)
    assert choose_arrival(idle).retry_after_s is None
    short = replace(idle, own_tokens=50)
    assert choose_arrival(replace(short, ahead_tokens=100)).retry_after_s is None
    assert choose_arrival(replace(short, ahead_tokens=4000)).retry_after_s == 4
    assert choose_arrival(replace(short, ahead_tokens=160)).retry_after_s == 1
    assert choose_arrival(replace(short, ahead_requests=9, free_places=0, finish_rate=1.0)).retry_after_s == 10
    assert choose_arrival(replace(short, ahead_tokens=10**9)).retry_after_s == 600


def test_an_sla_that_cannot_be_held_is_refused_by_name() -> None:
    held = HeldSla.parse("ttft.p95<200ms,tpot.p99<30ms")
    assert held == HeldSla(Slo(0.2, 0.03), 0.95, 0.99)
    for text, named in (
        ("e2e.p95<1s", "e2e"),
        ("ttft.mean<1s", "mean"),
        ("ttft.p95<1s,ttft.p99<2s", "twice"),
        ("ttft.p95<9999s", "ttft"),
        ("soon", "soon"),
    ):
        with pytest.raises(ConfigError, match=named):
            HeldSla.parse(text)


class House:
    """A paced scheduler over the fake runner, on a clock that the cost moves."""

    def __init__(self, held: HeldSla | None, cost: StepCost | None = COST, *, num_blocks: int = 64, **limits: int):
        info = fake_info(num_blocks=num_blocks, block_size=4, max_model_len=128)
        self.runner = FakeRunner(info)
        self.scheduler = Scheduler(info, SchedulerLimits(**limits), held=held, step_cost=cost)
        self.pacer = self.scheduler.pacer
        self.now = 0.0
        self.tokens: dict[str, list[int]] = {}

    def step(self) -> int:
        plan = self.scheduler.schedule(self.now)
        result = self.runner.execute(plan)
        self.now += 1e-3 + 3e-4 * plan.num_tokens
        for event in self.scheduler.commit(plan, result, self.now):
            assert event.error is None
            self.tokens.setdefault(event.request_id, []).extend(event.token_ids)
        self.scheduler.check_integrity()
        return plan.num_tokens

    def run(self) -> None:
        for _ in range(3000):
            if not self.scheduler.has_work:
                return
            self.step()
        raise AssertionError("requests wait for ever")


HELD = st.sampled_from(
    [
        HeldSla(Slo(0.05, 0.01)),
        HeldSla(Slo(1e-4, 1e-4)),  # impossible
        HeldSla(Slo(None, 0.004)),
        HeldSla(Slo(0.02, None)),
    ]
)
JOBS = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 12), st.integers(-1, 1), st.booleans()), max_size=12)


@settings(max_examples=scaled(40), deadline=None)
@given(HELD, JOBS, st.booleans(), st.sampled_from([16, 64]), st.sampled_from([2, 8]))
def test_tokens_are_the_same_and_everyone_is_served(
    held: HeldSla, jobs: list[tuple[int, int, int, bool]], probed: bool, num_blocks: int, seqs: int
) -> None:
    cost = COST if probed else None
    limits = {"max_num_seqs": seqs, "max_num_batched_tokens": 32}
    paced, plain = House(held, cost, num_blocks=num_blocks, **limits), House(None, num_blocks=num_blocks, **limits)
    entered = []
    for number, (length, output, priority, waits) in enumerate(jobs):
        prompt = [(number * 7 + place) % 50 + 1 for place in range(length)]
        fields = {"priority": priority, "max_tokens": output, "ignore_eos": True}
        try:
            paced.scheduler.add(request(str(number), prompt, **fields), paced.now)
            entered.append(number)
        except ShedError:
            continue
        plain.scheduler.add(request(str(number), prompt, **fields), plain.now)
        if waits:
            paced.step()
    paced.run()
    plain.run()
    assert paced.tokens == plain.tokens
    assert set(paced.tokens) == {str(number) for number in entered}
    assert paced.pacer is not None
    for decision in paced.pacer.decisions.latest():
        assert choose(decision.view) == decision.choice
        assert decision.document()["kind"] in ("step", "arrival")


def test_without_an_sla_the_plans_are_those_of_a_pacer_that_has_nothing_to_hold() -> None:
    plain, free = House(None), House(HeldSla(Slo(3600.0, 3600.0)))
    for house in (plain, free):
        for number in range(12):
            fields = {"max_tokens": 9, "ignore_eos": True}
            house.scheduler.add(request(str(number), range(1, 30 + number), **fields), house.now)
    while plain.scheduler.has_work:
        assert plain.step() == free.step()
    assert plain.tokens == free.tokens


def test_what_waits_is_refused_by_the_lowest_class_first_and_counted() -> None:
    house = House(HeldSla(Slo(0.03, 0.01)), num_blocks=256, max_num_batched_tokens=16)
    limits = {"max_tokens": 4, "ignore_eos": True}
    house.scheduler.add(request("first", range(1, 60), **limits), 0.0)
    house.step()
    refused = []
    for number in range(20):
        try:
            house.scheduler.add(request(f"low{number}", range(1, 40), priority=5, **limits), house.now)
        except ShedError as error:
            refused.append(error.retry_after_s)
    assert refused
    assert all(1 <= seconds <= 600 for seconds in refused)
    house.scheduler.add(request("high", range(1, 20), priority=-5, **limits), house.now)
    assert house.pacer is not None
    assert house.pacer.counters.shed == {5: len(refused)}
    house.run()
    assert "high" in house.tokens


@pytest.mark.parametrize("idle_steps", [0, 1])
def test_an_engine_that_was_full_and_is_idle_takes_anyone(idle_steps: int) -> None:
    """Nothing of what the last busy step told may shut the door once nobody is inside."""
    house = House(HeldSla(Slo(0.5, 0.05)), max_num_seqs=2, num_blocks=256)
    fields = {"max_tokens": 6, "ignore_eos": True}
    for number in range(4):
        house.scheduler.add(request(str(number), range(1, 20), **fields), house.now)
    house.run()
    for _ in range(idle_steps):
        house.step()
    house.now += 500.0
    house.scheduler.add(request("late", range(1, 20), **fields), house.now)
    house.run()
    assert len(house.tokens["late"]) == 6


def test_decisions_are_bounded() -> None:
    kept = Decisions()
    seen = view((), (Prompt(0, 1.0, 5),))
    for number in range(MAX_DECISIONS + 5):
        kept.add(float(number), seen, choose_step(seen))
    assert len(kept.latest()) == MAX_DECISIONS
    assert [decision.at_s for decision in kept.latest(2)] == [MAX_DECISIONS + 3.0, MAX_DECISIONS + 4.0]
    assert kept.latest(0) == []
