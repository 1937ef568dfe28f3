"""The simulator: nobody gets lost, time only passes, and what a trace says about prompts, turns and lengths holds."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from engine_support import scaled
from hypothesis import given, settings
from hypothesis import strategies as st

from setpoint.engine.plan import KVGroup, RunnerInfo
from setpoint.engine.scheduler import SchedulerLimits
from setpoint.engine.step_cost import Rising, StepCost
from setpoint.errors import ConfigError
from setpoint.tune.simulate.simulator import EngineSetup, Simulation, simulate
from setpoint.workload.prompts import PromptTokens
from setpoint.workload.synth import PRESETS, synthesize
from setpoint.workload.trace import Trace, TraceHeader, TraceRequest

COST = StepCost(
    Rising((1, 8, 64), (4e-3, 6e-3, 30e-3)), Rising((0, 1, 32), (0.0, 1e-3, 4e-3)), 1e-5, 1e-7, 1e-9, 1e-4, 1e-5
)


def setup(num_blocks: int = 400, *, survival: tuple[float, ...] = (), **limits: int) -> EngineSetup:
    info = RunnerInfo(1000, 1024, (KVGroup(num_blocks, None, 1024),), 16)
    return EngineSetup(info, SchedulerLimits(**limits), COST, survival=survival)


def trace(*requests: TraceRequest, block_size: int = 16) -> Trace:
    return Trace(TraceHeader("test", block_size=block_size), sorted(requests, key=lambda r: r.arrival_s))


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    requests = []
    for number in range(draw(st.integers(1, 15))):
        num_in = draw(st.integers(1, 120))
        ids = draw(st.lists(st.integers(0, 3), max_size=num_in // 16))
        session = draw(st.sampled_from([None, "a", "b"]))
        requests.append(
            TraceRequest(
                draw(st.floats(0, 2)),
                num_in,
                draw(st.integers(1, 20)),
                tuple(ids),
                session=session,
                turn=number,
                think_s=draw(st.sampled_from([None, 0.0, 0.3])),
            )
        )
    return trace(*requests)


@settings(max_examples=scaled(15), deadline=None)
@given(traces(), st.sampled_from([12, 400]), st.sampled_from([1, 3, 64]), st.sampled_from([2, 1024]), st.booleans())
def test_every_request_has_its_end_and_time_only_passes(
    traffic: Trace, num_blocks: int, seqs: int, queue: int, guesses: bool
) -> None:
    limits = {"max_num_seqs": seqs, "max_num_batched_tokens": 64, "max_num_queued_reqs": queue, "max_drafts": 4}
    survival = (0.7, 0.5, 0.2) if guesses else ()
    done = simulate(traffic, setup(num_blocks, survival=survival, **limits), seed=5)
    assert [log.index for log in done.run.logs] == list(range(len(traffic.requests)))
    for log, request in zip(done.run.logs, traffic.requests, strict=True):
        assert log.status in ("ok", "rejected")
        assert log.status == "ok" or queue == 2
        assert log.finished_s is not None
        times = [moment for moment, _ in log.deliveries]
        assert times == sorted(times)
        if log.ok:
            assert log.output_tokens == request.output_tokens
            assert times[0] > log.scheduled_s
            assert times[-1] == log.finished_s
            assert log.cached_tokens < request.input_tokens
    moments = [step.at_s for step in done.steps]
    assert all(before < after for before, after in pairwise(moments))
    assert moments[-1] <= done.virtual_s
    assert done.preemptions == 0 or num_blocks == 12
    assert max(step.num_running for step in done.steps) <= seqs


def test_the_same_seed_gives_the_same_run() -> None:
    traffic = trace(*(TraceRequest(0.1 * number, 20, 30) for number in range(10)))
    runs = [simulate(traffic, setup(survival=(0.6, 0.3), max_drafts=2), seed=seed).run for seed in (1, 1, 2)]
    assert runs[0].logs == runs[1].logs
    assert runs[0].logs != runs[2].logs


def test_equal_blocks_are_found_in_the_cache() -> None:
    first = TraceRequest(0.0, 70, 4, (1, 2, 3, 4))
    later = [replace(first, arrival_s=1.0), replace(first, arrival_s=2.0, hash_ids=(1, 2, 9, 4))]
    done = simulate(trace(first, *later), setup())
    assert [log.cached_tokens for log in done.run.logs] == [0, 64, 32]
    off = simulate(trace(first, *later), replace(setup(), prefix_caching=False))
    assert [log.cached_tokens for log in off.run.logs] == [0, 0, 0]
    assert off.run.logs[1].timing.ttft_s > done.run.logs[1].timing.ttft_s
    fine = simulate(trace(*(replace(r, hash_ids=(1, 2)) for r in (first, *later)), block_size=32), setup())
    assert [log.cached_tokens for log in fine.run.logs] == [0, 64, 64]


def test_prompts_say_what_their_blocks_say() -> None:
    requests = [TraceRequest(0.0, 40, 1, (7, 8)), TraceRequest(0.0, 24, 1, (7,)), TraceRequest(0.0, 40, 1)]
    prompts = PromptTokens(trace(*requests), 500)
    assert [len(prompts[index]) for index in range(3)] == [40, 24, 40]
    assert prompts[0][:16] == prompts[1][:16] != prompts[2][:16]
    assert prompts[0][16:] != prompts[1][16:]
    assert prompts[0] == PromptTokens(trace(*requests), 500)[0] != PromptTokens(trace(*requests), 500, seed=1)[0]
    assert 0 <= min(prompts[0]) <= max(prompts[0]) < 500


def test_a_turn_waits_for_the_answer_and_the_thought() -> None:
    turns = [
        TraceRequest(0.0, 16, 100, session="s"),
        TraceRequest(0.01, 16, 4, session="s", turn=1, think_s=0.5),
        TraceRequest(9.0, 16, 4, session="s", turn=2, think_s=0.5),
        TraceRequest(0.02, 16, 4),
    ]
    logs = {log.turn if log.session else "alone": log for log in simulate(trace(*turns), setup()).run.logs}
    assert logs["alone"].scheduled_s == pytest.approx(0.02)
    assert logs[0].finished_s is not None
    assert logs[1].scheduled_s == pytest.approx(logs[0].finished_s + 0.5)
    assert logs[2].scheduled_s == 9.0


def mean_tpot(done: Simulation) -> float:
    found = [timing.tpot_s for timing in done.run.timings if timing.tpot_s is not None]
    return sum(found) / len(found)


def test_guesses_that_survive_make_answers_faster_and_others_do_not_make_them_slower() -> None:
    traffic = trace(*(TraceRequest(0.2 * number, 20, 100) for number in range(10)))
    plain = mean_tpot(simulate(traffic, setup(max_drafts=4)))
    good = simulate(traffic, setup(survival=(0.9, 0.8, 0.7, 0.6), max_drafts=4))
    bad = simulate(traffic, setup(survival=(0.02, 0.0), max_drafts=4))
    assert mean_tpot(good) < 0.6 * plain
    assert mean_tpot(bad) < 1.05 * plain
    assert mean_tpot(simulate(traffic, setup(survival=(0.9,), max_drafts=0))) == pytest.approx(plain)
    with pytest.raises(ConfigError, match="survival"):
        setup(survival=(0.5, 0.6))


def test_a_machine_that_is_too_slow_answers_late_and_patience_ends() -> None:
    traffic = trace(*(TraceRequest(0.01 * number, 100, 50) for number in range(200)))
    late = simulate(traffic, setup(max_num_seqs=2))
    assert max(timing.ttft_s for timing in late.run.timings) > 10
    cut = simulate(traffic, setup(max_num_seqs=2), patience_s=3.0)
    assert {log.status for log in cut.run.logs} == {"ok", "timeout"}
    assert cut.virtual_s < 6


def test_a_trace_longer_than_the_context_is_told_with_the_divisor() -> None:
    with pytest.raises(ConfigError, match=r"1 of 2 requests .* 1024 tokens \(the longest has 2030\).* 2\.0 with"):
        simulate(trace(TraceRequest(0.0, 2000, 30), TraceRequest(0.0, 10, 30)), setup())


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_can_be_simulated(preset: str) -> None:
    traffic = synthesize(preset, rate=2.0, seconds=20, seed=3, length_scale=100)
    done = simulate(traffic, setup(1000))
    assert all(log.ok for log in done.run.logs)
    assert done.speed > 1
