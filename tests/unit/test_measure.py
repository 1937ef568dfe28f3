"""Logs of a run: what they say, what they lose on the way through a file, and that gaming them does not pay (T11)."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from engine_support import scaled
from hypothesis import given, settings
from hypothesis import strategies as st

from setpoint.tune.measure import (
    STATUSES,
    EngineCounters,
    MachineUse,
    RequestLog,
    Run,
    Verdict,
    Window,
    in_flight,
)
from setpoint.tune.metrics import Targets, class_names, deadline_attainment, summarize, term_results
from setpoint.tune.replay.run_file import RunFileError, read_run, write_run
from setpoint.tune.sla import Sla

SLA = "ttft.p95<200ms,tpot.p95<30ms"


def answered(index: int = 0, at: float = 0.0, ttft: float = 0.1, tpot: float = 0.02, tokens: int = 11) -> RequestLog:
    times = [at + ttft + tpot * i for i in range(tokens)]
    return RequestLog(
        index=index,
        scheduled_s=at,
        sent_s=at + 0.001,
        status="ok",
        deliveries=tuple((moment, 1) for moment in times),
        finished_s=times[-1],
        prompt_tokens=32,
        cached_tokens=16,
        output_tokens=tokens,
        wanted_tokens=tokens,
    )


def missed(index: int = 0, at: float = 0.0, tokens: int = 11) -> RequestLog:
    return RequestLog(index, at, at, "rejected", finished_s=at + 0.001, wanted_tokens=tokens, error="429")


def run_of(*logs: RequestLog, seconds: float = 10.0) -> Run:
    return Run(tuple(logs), Window(0.0, seconds), len(logs))


# --- one request -------------------------------------------------------------------------------------------------


def test_times_count_from_the_scheduled_arrival() -> None:
    late = replace(answered(at=1.0), sent_s=1.5)
    assert late.timing.ttft_s == pytest.approx(0.1)
    assert late.send_lag_s == pytest.approx(0.5)
    assert late.timing.tpot_s == pytest.approx(0.02)


def test_tokens_of_one_chunk_have_no_gap_between_them() -> None:
    log = RequestLog(0, 0.0, 0.0, "ok", ((0.1, 1), (0.3, 3), (0.4, 1)), 0.4, output_tokens=5)
    assert log.timing.gaps_s == pytest.approx((0.2, 0.0, 0.0, 0.1))
    assert log.timing.stall_s == pytest.approx(0.2)
    assert log.timing.tpot_s == pytest.approx(0.3 / 4)


def test_tokens_that_no_chunk_showed_came_last() -> None:
    log = RequestLog(0, 0.0, 0.0, "ok", ((0.1, 1), (0.3, 1)), 0.4, output_tokens=4)
    assert log.counted_tokens == 2
    assert log.token_times == [0.1, 0.3, 0.3, 0.3]
    assert log.timing.output_tokens == 4


@pytest.mark.parametrize("status", [status for status in STATUSES if status != "ok"])
def test_whatever_is_no_whole_answer_is_a_miss(status: str) -> None:
    log = replace(answered(), status=status)  # type: ignore[arg-type]
    assert not log.timing.ok
    assert log.timing.ttft_s == math.inf
    assert not Sla.parse("ttft.p95<1000s").is_good(log.timing)


# --- figures -----------------------------------------------------------------------------------------------------


def test_figures_by_hand() -> None:
    logs = [answered(i, at=float(i), ttft=0.1 if i < 9 else 0.5) for i in range(10)]
    found = summarize(run_of(*logs), Targets.parse([SLA]))
    assert found.arrivals == 10
    assert found.statuses == {"ok": 10}
    assert found.latencies["ttft"]["p90"] == pytest.approx(0.1)
    assert found.latencies["ttft"]["p95"] == pytest.approx(0.5)
    assert found.latencies["ttft"]["mean"] == pytest.approx(0.14)
    assert found.latencies["tpot"]["max"] == pytest.approx(0.02)
    assert found.samples == {"ttft": 10, "tpot": 10, "itl": 100, "stall": 10, "e2e": 10}
    assert found.attainment == pytest.approx(0.9)
    assert found.goodput == pytest.approx(0.9)
    assert found.request_rate == pytest.approx(1.0)
    assert found.output_token_rate == pytest.approx(11.0)
    assert found.cached_share == pytest.approx(0.5)
    assert found.in_flight_max == 1


def test_failures_do_not_enter_latencies_but_judgements() -> None:
    """A refusal is fast; it must not look so."""
    logs = [answered(i, at=float(i)) for i in range(5)] + [missed(i, at=float(i)) for i in range(5, 10)]
    found = summarize(run_of(*logs), Targets.parse([SLA]))
    assert found.samples["ttft"] == 5
    assert found.latencies["ttft"]["p50"] == pytest.approx(0.1)
    assert found.attainment == pytest.approx(0.5)
    results = term_results(run_of(*logs), Targets.parse([SLA]))
    assert [result.value for result in results] == [math.inf, math.inf]
    assert not any(result.met for result in results)


def test_only_arrivals_of_the_window_count() -> None:
    logs = [answered(i, at=float(i)) for i in range(10)]
    run = Run(tuple(logs), Window(2.0, 5.5), 10)
    assert [log.index for log in run.arrivals] == [2, 3, 4, 5]


def test_classes_have_their_own_sla_and_a_request_too() -> None:
    chat = [replace(answered(i, ttft=0.1), class_name="chat") for i in range(4)]
    batch = [replace(answered(i, ttft=5.0), class_name="batch") for i in range(4, 8)]
    strict = replace(answered(8, ttft=0.1), class_name="chat", slo="ttft.p95<50ms")
    run = run_of(*chat, *batch, strict)
    targets = Targets.parse([SLA, "batch=ttft.p95<10s"])
    assert class_names(run) == ["batch", "chat"]
    assert summarize(run, targets, "batch").attainment == 1.0
    assert summarize(run, targets, "chat").attainment == pytest.approx(0.8)
    assert all(result.met for result in term_results(run, targets))
    assert {result.class_name for result in term_results(run, targets)} == {"", "batch"}


def test_a_run_without_answers_has_figures() -> None:
    found = summarize(run_of(missed()), Targets.parse([SLA]))
    assert found.latencies == {}
    assert found.goodput == 0.0
    assert found.attainment == 0.0
    assert summarize(run_of()).attainment is None


def test_in_flight_counts_what_is_due_and_not_over() -> None:
    logs = [answered(0, at=0.0), answered(1, at=0.1), replace(missed(2, at=0.2), finished_s=None)]
    assert in_flight(logs, [-0.1, 0.05, 0.25, 0.35, 9.0]) == [0, 1, 3, 2, 1]


# --- gaming (T11) ------------------------------------------------------------------------------------------------

late_runs = st.lists(
    st.tuples(st.floats(0.01, 1.0), st.floats(0.001, 0.1), st.integers(1, 40)), min_size=1, max_size=30
).map(lambda rows: [answered(i, float(i), *row) for i, row in enumerate(rows)])


@given(late_runs)
@settings(max_examples=scaled(50))
def test_dropping_late_requests_never_pays(logs: list[RequestLog]) -> None:
    targets = Targets.parse([SLA])
    sla = Sla.parse(SLA)
    kept = [log if sla.is_good(log.timing) else missed(log.index, log.scheduled_s, log.wanted_tokens) for log in logs]
    honest, gamed = summarize(run_of(*logs), targets), summarize(run_of(*kept), targets)
    assert honest.goodput is not None
    assert gamed.goodput is not None
    assert gamed.goodput <= honest.goodput
    assert gamed.attainment == honest.attainment
    before, after = deadline_attainment(logs, targets), deadline_attainment(kept, targets)
    assert before is not None
    assert after is not None
    assert after <= before
    in_time = sum(deadline_attainment([log], targets) for log in logs if not sla.is_good(log.timing))  # type: ignore[misc]
    if in_time > 0:
        assert after < before  # tokens that came in time were thrown away


@given(late_runs, st.floats(0.0, 2.0), st.integers(2, 20))
@settings(max_examples=scaled(50))
def test_holding_tokens_back_never_pays(logs: list[RequestLog], hold_s: float, lump: int) -> None:
    """Tokens handed out in lumps, each when its last token is there and a while later."""
    targets = Targets.parse([SLA])

    def held(log: RequestLog) -> RequestLog:
        times = log.token_times
        first, rest = times[0], times[1:]
        lumps = [rest[i : i + lump] for i in range(0, len(rest), lump)]
        deliveries = ((first, 1), *((part[-1] + hold_s, len(part)) for part in lumps))
        return replace(log, deliveries=deliveries)

    honest, gamed = deadline_attainment(logs, targets), deadline_attainment(list(map(held, logs)), targets)
    assert honest is not None
    assert gamed is not None
    assert gamed <= honest
    if hold_s > 1.0 and any(len(log.deliveries) > 1 for log in logs) and honest > 0.99:
        assert gamed < honest


# --- the file ----------------------------------------------------------------------------------------------------

any_log = st.builds(
    RequestLog,
    index=st.integers(0, 1000),
    scheduled_s=st.floats(0, 1e5),
    sent_s=st.none() | st.floats(0, 1e5),
    status=st.sampled_from(STATUSES),  # type: ignore[arg-type]
    deliveries=st.lists(st.tuples(st.floats(0, 1e5), st.integers(0, 9)), max_size=5).map(tuple),
    finished_s=st.none() | st.floats(0, 1e5),
    prompt_tokens=st.integers(0, 99),
    output_tokens=st.integers(0, 99),
    class_name=st.sampled_from(["", "chat"]),
    session=st.none() | st.text(max_size=8),
    slo=st.none() | st.just(SLA),
    error=st.text(max_size=20),
)


@given(st.lists(any_log, max_size=8), st.booleans())
@settings(max_examples=scaled(30))
def test_a_run_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, logs: list[RequestLog], cut: bool
) -> None:
    run = Run(
        tuple(logs),
        Window(1.0, 9.0),
        12,
        before=EngineCounters(generation_tokens=5),
        preemptions=3,
        machine=MachineUse(0.01, None),
        is_cut_short=cut,
        notes=("a note",),
        provenance={"seed": 1, "trace": "t"},
        verdicts=(Verdict("client lag", "invalid", "late"),),
    )
    path = tmp_path_factory.mktemp("run") / "run.jsonl"
    write_run(run, path)
    assert read_run(path) == run
    assert not read_run(path).is_valid


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([], "begins with"),
        (["{}"], "begins with"),
        (['{"schema": "setpoint.run/1"}'], "line 1 is not the head"),
        (["HEAD", "{"], "line 2 is not JSON"),
        (["HEAD", "[]"], "line 2 is not a JSON object"),
        (["HEAD", '{"i": 0}'], "line 2: fields are missing"),
        (["HEAD", '{"i": 0, "scheduled": 0, "sent": 0, "status": "ok", "x": 1}'], "line 2: fields are"),
        (["HEAD", '{"i": 0, "scheduled": NaN, "sent": 0, "status": "ok"}'], "line 2: scheduled cannot"),
        (["HEAD", '{"i": 0, "scheduled": 0, "sent": 0, "status": "fine"}'], "line 2: status cannot"),
        (["HEAD", '{"i": 0, "scheduled": 0, "sent": 0, "status": "ok", "deliveries": [[0]]}'], "line 2: deliveries"),
    ],
)
def test_a_malformed_log_is_named(tmp_path: Path, lines: list[str], says: str) -> None:
    path = tmp_path / "run.jsonl"
    write_run(run_of(), path)
    head = path.read_text().strip()
    path.write_text("\n".join(line.replace("HEAD", head) if line == "HEAD" else line for line in lines))
    with pytest.raises(RunFileError) as caught:
        read_run(path)
    assert says in str(caught.value)


def test_figures_are_the_same_from_the_file(tmp_path: Path) -> None:
    run = run_of(*(answered(i, float(i), 0.01 * i) for i in range(20)), missed(20, 9.0))
    write_run(run, tmp_path / "run.jsonl")
    targets = Targets.parse([SLA])
    assert summarize(read_run(tmp_path / "run.jsonl"), targets) == summarize(run, targets)
    assert json.dumps(summarize(run, targets).document)
