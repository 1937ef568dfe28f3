"""Tripwires (T9): every way of lying is injected into a good run and found, and a queue that grows is told."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from setpoint.tune.measure import EngineCounters, MachineUse, RequestLog, Run, Window
from setpoint.tune.replay.tripwires import judged
from setpoint.tune.sla import Sla

TOKENS = 8
SLAS = (Sla.parse("ttft.p95<200ms,tpot.p95<30ms"),)


def log_of(index: int, at: float, ttft: float = 0.05, tpot: float = 0.0101) -> RequestLog:
    times = [at + ttft + tpot * i for i in range(TOKENS)]
    return RequestLog(
        index=index,
        scheduled_s=at,
        sent_s=at + 0.0004,
        status="ok",
        deliveries=tuple((moment, 1) for moment in times),
        finished_s=times[-1] + 0.0001,
        prompt_tokens=32,
        output_tokens=TOKENS,
        wanted_tokens=TOKENS,
    )


def good_run(count: int = 100, seconds: float = 60.0) -> Run:
    rng = np.random.default_rng(1)
    arrivals = sorted(rng.random(count) * seconds)
    logs = tuple(log_of(i, float(at), 0.05 + 0.02 * float(rng.random())) for i, at in enumerate(arrivals))
    return Run(
        logs,
        Window(0.0, seconds),
        count,
        before=EngineCounters(1000, 500, 10, 0, 0, 4096),
        after=EngineCounters(1000 + 32 * count, 500 + TOKENS * count, 10 + count, 0, 0, 4096),
        preemptions=0,
        machine=MachineUse(0.001, 0.01),
    )


def outcome(run: Run, tripwire: str, reference: Run | None = None) -> str:
    (verdict,) = (v for v in judged(run, SLAS, reference).verdicts if v.tripwire == tripwire)
    return verdict.outcome


def with_logs(run: Run, change: object, every: int = 10) -> Run:
    logs = [change(log) if log.index % every == 0 else log for log in run.logs]  # type: ignore[operator]
    return replace(run, logs=tuple(log for log in logs if log is not None))


def test_a_good_run_is_valid() -> None:
    run = judged(good_run(), SLAS)
    assert {verdict.outcome for verdict in run.verdicts} == {"ok"}
    assert run.is_valid
    assert not run.is_saturated


def test_a_server_that_tells_nothing_is_not_held_against_it() -> None:
    run = replace(good_run(), before=EngineCounters(), after=EngineCounters(), preemptions=None, machine=None)
    found = {verdict.tripwire: verdict.outcome for verdict in judged(run, SLAS).verdicts}
    assert {name for name, said in found.items() if said == "unknown"} == {
        "preemptions",
        "KV pool",
        "accounting",
        "machine",
    }
    assert judged(run).is_valid


INJECTED = {
    "client lag": lambda run: with_logs(run, lambda log: replace(log, sent_s=log.scheduled_s + 0.004)),
    "load reached": lambda run: with_logs(
        run, lambda log: replace(log, sent_s=None, status="error", deliveries=(), output_tokens=0)
    ),
    "preemptions": lambda run: replace(run, after=replace(run.after, preemptions=21)),
    "KV pool": lambda run: replace(run, after=replace(run.after, kv_pool_tokens=2048)),
    "failures": lambda run: with_logs(run, lambda log: replace(log, status="short", output_tokens=3)),
    "clock": lambda run: replace(run, clock_skew_s=-0.003),
    "machine": lambda run: replace(run, machine=MachineUse(0.03, 0.0)),
}


@pytest.mark.parametrize("tripwire", INJECTED)
def test_what_is_injected_is_found_and_the_run_is_invalid(tripwire: str) -> None:
    run = judged(INJECTED[tripwire](good_run()), SLAS)
    assert outcome(run, tripwire) == "invalid"
    assert not run.is_valid


def test_preemptions_that_are_reported_are_no_lie() -> None:
    run = good_run()
    assert outcome(replace(run, after=replace(run.after, preemptions=21), preemptions=21), "preemptions") == "ok"


def test_a_pool_of_another_size_than_at_an_equal_start() -> None:
    run = good_run()
    other = replace(run, after=replace(run.after, kv_pool_tokens=47_888))
    assert outcome(run, "KV pool", reference=run) == "ok"
    assert outcome(run, "KV pool", reference=other) == "invalid"


def test_tokens_and_requests_must_add_up() -> None:
    run = good_run()

    def after(**fields: int) -> Run:
        return replace(run, after=replace(run.after, **fields))

    assert outcome(after(generation_tokens=run.after.generation_tokens + 1), "accounting") == "invalid"  # type: ignore[operator]
    assert outcome(after(prompt_tokens=run.after.prompt_tokens - 1), "accounting") == "invalid"  # type: ignore[operator]
    assert outcome(after(finished=run.after.finished - 1), "accounting") == "invalid"  # type: ignore[operator]
    assert outcome(with_logs(run, lambda log: None), "accounting") == "invalid"  # dropped from the result
    assert outcome(replace(run, logs=(*run.logs, run.logs[0])), "accounting") == "invalid"
    more = with_logs(run, lambda log: replace(log, deliveries=(*log.deliveries, (log.deliveries[-1][0], 1))))
    assert outcome(more, "accounting") == "invalid"


def test_a_miss_may_have_cost_the_server_more_than_the_client_saw() -> None:
    run = good_run()
    missed = with_logs(run, lambda log: replace(log, status="timeout", deliveries=(), output_tokens=0))
    assert outcome(missed, "accounting") == "ok"
    finished = run.after.finished
    assert finished is not None
    assert outcome(replace(missed, after=replace(run.after, finished=finished - 50)), "accounting") == "invalid"


def test_time_must_go_forward_in_fractions_of_a_millisecond() -> None:
    run = good_run()
    back = with_logs(run, lambda log: replace(log, deliveries=(*log.deliveries, (log.scheduled_s + 0.01, 1))))
    assert outcome(back, "clock") == "invalid"
    coarse = [
        replace(log, deliveries=tuple((round(moment, 3) + 0.001, count) for moment, count in log.deliveries))
        for log in run.logs
    ]
    assert outcome(replace(run, logs=tuple(replace(log, finished_s=99.0) for log in coarse)), "clock") == "invalid"


def test_other_processes_count_where_they_can_be_told() -> None:
    run = good_run()
    assert outcome(replace(run, machine=MachineUse(0.0, 0.2)), "machine") == "invalid"
    assert outcome(replace(run, machine=MachineUse(0.0, None)), "machine") == "ok"


def queue_run(load: float, seed: int, seconds: float = 60.0) -> Run:
    """One server, 0.1 s each, Poisson arrivals."""
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(0.1 / load, size=int(seconds * load * 15)))
    arrivals = arrivals[arrivals < seconds]
    free, logs = 0.0, []
    for index, at in enumerate(arrivals):
        free = max(free, float(at)) + 0.1
        logs.append(log_of(index, float(at), free - float(at)))
    return Run(tuple(logs), Window(0.0, seconds), len(logs))


def test_a_growing_queue_is_told_from_a_busy_one() -> None:
    def share(load: float) -> float:
        return float(np.mean([outcome(queue_run(load, seed), "saturation") == "saturated" for seed in range(40)]))

    assert share(1.5) == 1.0
    assert share(1.2) >= 0.9
    assert share(0.5) <= 0.05
    assert share(0.8) <= 0.15
    assert outcome(queue_run(1.5, 1, seconds=20.0), "saturation") == "unknown"


def test_lag_is_held_against_the_metrics_that_it_distorts() -> None:
    run, sla = good_run(), Sla.parse("ttft.p95<2s,tpot.p95<30ms")
    late = replace(run, logs=tuple(replace(log, sent_s=log.scheduled_s + 0.005) for log in run.logs))
    said = [judged(late, (sla,), late_metrics=metrics).verdicts[0] for metrics in (("ttft", "tpot"), ("ttft", "e2e"))]
    assert [verdict.tripwire for verdict in said] == ["client lag"] * 2
    assert [verdict.outcome for verdict in said] == ["invalid", "ok"]
