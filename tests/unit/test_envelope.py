"""The slow loop: load moves the row with hysteresis, a trial that does no better ends, nothing happens too often."""

from __future__ import annotations

import random
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from setpoint.engine.decisions import choose
from setpoint.engine.envelope import (
    BARRED_S,
    DWELL_S,
    ENOUGH,
    Drift,
    Envelope,
    EnvelopeRow,
    RowView,
    Traffic,
    choose_row,
)
from setpoint.engine.limits import SchedulerLimits
from setpoint.engine.plan import KVGroup, RunnerInfo
from setpoint.engine.slo import HeldSla
from setpoint.engine.step_cost import Rising, StepCost
from setpoint.tune.simulate.simulator import EngineSetup, simulate
from setpoint.workload.trace import Trace, TraceHeader, TraceRequest

CALM = RowView(4.0, (5.0, 10.0), 0, 0, 100.0, 1.0, 100, 0.9, None, 0.0, ())


def rows(count: int) -> tuple[EnvelopeRow, ...]:
    return tuple(EnvelopeRow(5.0 * (at + 1), SchedulerLimits(max_num_seqs=64 >> at)) for at in range(count))


def test_the_load_chooses_the_row_with_hysteresis() -> None:
    assert choose_row(CALM).row == 0
    up = choose_row(replace(CALM, rate_rps=5.1))
    assert (up.row, up.band, up.why, up.outside) == (1, 1, "load", False)
    high = replace(CALM, band=1, row=1)
    assert choose_row(replace(high, rate_rps=4.5)).row == 1
    assert choose_row(replace(high, rate_rps=3.9)).row == 0
    beyond = choose_row(replace(high, rate_rps=11.0))
    assert (beyond.row, beyond.outside) == (1, True)


def test_a_row_is_in_force_for_half_a_minute_at_least() -> None:
    assert choose_row(replace(CALM, rate_rps=9.0, for_s=DWELL_S - 0.1)).why == "stays"


def test_a_missed_agreement_tries_another_certified_row_and_goes_back_if_that_is_no_better() -> None:
    missed = replace(CALM, attainment=0.7)
    assert choose_row(replace(missed, num_answers=ENOUGH - 1)).why == "stays"
    tried = choose_row(missed)
    assert (tried.row, tried.band, tried.why) == (1, 0, "missed")
    trial = replace(missed, row=1, left=0, left_attainment=0.7)
    assert choose_row(trial).why == "worse"
    assert choose_row(trial).row == 0
    kept = choose_row(replace(trial, attainment=0.8))
    assert (kept.row, kept.why) == (1, "better")
    assert choose_row(replace(missed, barred=(1,))).why == "stays"
    assert choose_row(replace(missed, rate_rps=20.0, band=1, row=1)).why == "stays"  # no row is certified there


def test_a_trial_on_an_envelope_goes_there_and_back() -> None:
    envelope, now, seen = Envelope(rows(2), 0.9, None), 0.0, []
    for second in range(400):
        now = float(second)
        envelope.arrived()
        envelope.answered(now, ttft=second % 2 == 0, tpot=True, num_prompt=10, num_output=10)
        view = envelope.view(now)
        choice = choose_row(view)
        assert choose(view) == choice
        envelope.follow(choice, now)
        if choice.why != "stays":
            seen.append((choice.why, envelope.row))
    assert seen[:3] == [("load", 0), ("missed", 1), ("worse", 0)]
    assert len(seen) == 3  # barred for ten minutes
    assert BARRED_S > 400


class _Walk:
    """Ticks of random length under random load and answers."""

    def __init__(self, seed: int, num_rows: int) -> None:
        self.chance, self.envelope, self.now = random.Random(seed), Envelope(rows(num_rows), 0.9, None), 0.0
        self.switched: list[float] = []

    def tick(self) -> None:
        chance, envelope = self.chance, self.envelope
        self.now += chance.choice((0.0, 1.0, 1.0, 7.0, 40.0))
        for _ in range(chance.randrange(60)):
            envelope.arrived()
        for _ in range(chance.randrange(30)):
            good = chance.random() < chance.choice((0.2, 0.8, 1.0))
            envelope.answered(self.now - chance.random() * 5, good, True, 10, 10)
        before, choice = envelope.row, choose_row(envelope.view(self.now))
        assert 0 <= choice.row < len(envelope.rows)
        assert 0 <= choice.band < len(envelope.rows)
        envelope.follow(choice, self.now)
        if envelope.row != before:
            self.switched.append(self.now)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(1, 4))
def test_switches_are_half_a_minute_apart_whatever_happens(seed: int, num_rows: int) -> None:
    walk = _Walk(seed, num_rows)
    for _ in range(120):
        walk.tick()
    assert all(later - earlier >= DWELL_S for earlier, later in zip(walk.switched, walk.switched[1:], strict=False))
    assert walk.envelope.num_switches == len(walk.switched)


def test_drift_is_seen_and_seen_to_end() -> None:
    chance, drift = random.Random(1), Drift(5.0, 0.7)
    false = 0
    for _ in range(2000):
        drift.note(chance.gauss(5.0, 0.7))
        false += drift.found
    assert false < 40
    for _ in range(30):
        drift.note(chance.gauss(6.4, 0.7))  # four times as long
    assert drift.found
    for _ in range(60):
        drift.note(chance.gauss(5.0, 0.7))
    assert not drift.found


def test_lengths_that_no_certificate_speaks_of_are_told() -> None:
    envelope = Envelope(rows(1), 0.9, Traffic(5.0, 0.5, 4.0, 0.5))
    for _ in range(40):
        envelope.answered(0.0, True, True, num_prompt=1000, num_output=55)
    assert envelope.outside == {"rate": False, "input": True, "output": False}


COST = StepCost(Rising((1, 512), (2e-3, 100e-3)), Rising((0, 64), (0.0, 1e-3)), 1e-5, 1e-7, 1e-7, 1e-4, 1e-5)


def test_an_engine_follows_its_load_through_the_envelope() -> None:
    """Sixty quiet seconds, sixty busy ones: the limits of both rows were in force, and the record repeats itself."""
    chance, at, requests = random.Random(3), 0.0, []
    while at < 120:
        at += chance.expovariate(1.0 if at < 60 else 8.0)
        requests.append(TraceRequest(at, 40, 10))
    held = replace(HeldSla.parse("ttft.p95<2s"), rows=rows(2))
    limits = SchedulerLimits(max_num_seqs=64, max_num_batched_tokens=512)
    info = RunnerInfo(4096, 2048, (KVGroup(2000, None, 1 << 15),), 16)
    done = simulate(Trace(TraceHeader("steps"), requests), EngineSetup(info, limits, COST, held=held), seed=1)
    assert {decision.choice.row for decision in done.decisions if decision.kind == "row"} == {0, 1}
    assert all(choose(decision.view) == decision.choice for decision in done.decisions)
