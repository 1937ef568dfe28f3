"""`setpoint plan`: capacities that a queue explains, what binds where it was made to, and plain refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from setpoint import assemble
from setpoint.cli.main import run
from setpoint.engine.plan import KVGroup, RunnerInfo
from setpoint.engine.scheduler import SchedulerLimits
from setpoint.engine.step_cost import Rising, StepCost, StepShape
from setpoint.errors import ConfigError
from setpoint.tune.plan import plan as planning
from setpoint.tune.plan.plan import Loads, contexts, make_plan, replicas, shortened, tokens_held
from setpoint.tune.probe import calibration_store, machine
from setpoint.tune.probe.calibrate import SCHEMA, Calibration, MeasuredCell
from setpoint.tune.probe.grid import Cell
from setpoint.tune.probe.machine import MachineIdentity
from setpoint.tune.simulate.simulator import EngineSetup
from setpoint.tune.sla import Sla
from setpoint.workload.trace import Trace, TraceHeader, TraceRequest, write_trace
from setpoint.workload.transform import repeated

# A prompt of 100 tokens takes 101 ms, a token of output 2 ms, whoever else is there.
COST = StepCost(Rising((1, 101), (1e-3, 101e-3)), Rising((0, 1), (0.0, 1e-3)), 0.0, 0.0, 0.0)


def setup(num_blocks: int = 1000, **limits: int) -> EngineSetup:
    info = RunnerInfo(500, 512, (KVGroup(num_blocks, None, 1024),), 16)
    return EngineSetup(info, SchedulerLimits(**limits), COST)


def regular(count: int = 60, gap: float = 1.0, tokens: int = 100, output: int = 1) -> Trace:
    return Trace(TraceHeader("test"), [TraceRequest(gap * number, tokens, output) for number in range(count)])


def test_a_clockwork_of_prompts_saturates_when_its_steps_fill_the_time() -> None:
    """A prompt of 101 ms every 1 s: ten times as many fill the engine."""
    plan = make_plan(regular(), setup(), Sla.parse("ttft.p95<300ms"))
    assert plan.capacity is not None
    assert plan.is_feasible
    assert 8.5 < plan.capacity.load < 10.0
    assert plan.alone[0] == pytest.approx(0.101, rel=0.02)
    assert [point.holds for point in plan.curve] == [True] * 5 + [False] * 2
    assert [point.load for point in plan.curve] == sorted(point.load for point in plan.curve)
    assert plan.curve[-1].goodput_rps < plan.capacity.goodput_rps
    assert sum(plan.binding.shares.values()) == pytest.approx(1.0)
    assert max(plan.binding.shares, key=lambda part: plan.binding.shares[part]) == "arithmetic"
    assert {effect.change for effect in plan.knobs if effect.knob == "kv_cache_memory_bytes"} == {0.0}


def test_what_no_load_can_meet_is_certified_with_what_could_be() -> None:
    plan = make_plan(regular(), setup(), Sla.parse("ttft.p95<90ms,error.rate<1%"))
    assert plan.capacity is None
    assert not plan.is_feasible
    assert plan.impossible == ("ttft.p95<90ms (alone: 101 ms)",)
    assert plan.binding.terms == ("ttft.p95<90ms (101 ms)",)
    assert "every single request" in plan.binding.resource


def test_a_knob_that_strangles_is_found_and_named() -> None:
    """Answers cost nothing beside each other, but one place makes them wait."""
    flat = StepCost(Rising((1, 8, 101), (1e-3, 1e-3, 101e-3)), Rising((0, 1, 64), (0.0, 1e-3, 1e-3)), 0.0, 0.0, 0.0)
    narrow = replace(setup(max_num_seqs=1), cost=flat)
    plan = make_plan(regular(40, 0.2, 8, 40), narrow, Sla.parse("ttft.p95<100ms"))
    assert plan.capacity is not None
    assert "max_num_seqs: 1 run" in plan.binding.resource
    more = next(effect for effect in plan.knobs if (effect.knob, effect.value) == ("max_num_seqs", "2"))
    assert more.change > 0.3
    small = make_plan(regular(30, 0.2, 100, 60), setup(14), Sla.parse("ttft.p95<300ms"))
    assert "KV cache" in small.binding.resource


@settings(max_examples=6, deadline=None)
@given(st.floats(0.5, 400.0))
def test_replicas_are_as_few_as_hold(rate: float) -> None:
    loads = Loads(regular(), setup(), Sla.parse("ttft.p95<300ms"), lambda line: None)
    found = loads.capacity()
    assert found is not None
    chosen = replicas(loads, found, rate)
    assert chosen.point.holds
    assert chosen.point.load == pytest.approx(rate / chosen.count / loads.base_rate)
    assert chosen.count == 1 or not loads.at(rate / (0.9 * chosen.count - 1) / loads.base_rate).holds


def test_little_traffic_with_sessions_is_made_of_more_of_it_not_of_less() -> None:
    turns = [
        TraceRequest(float(number), 40, 4, (1, 10 + number // 2), session=f"s{number // 2}", turn=number % 2)
        for number in range(40)
    ]
    trace = Trace(TraceHeader("test"), turns)
    twice = repeated(trace, 2)
    assert len(twice.requests) == 80
    assert [request.arrival_s for request in twice.requests] == sorted(r.arrival_s for r in twice.requests)
    assert {request.hash_ids[0] for request in twice.requests} == {1}  # the product's prompt stays the same
    assert len({request.hash_ids[1] for request in twice.requests}) == 40
    assert len({request.session for request in twice.requests}) == 40
    loads = Loads(trace, setup(), Sla.parse("ttft.p95<300ms"), lambda line: None)
    point = loads.at(0.25)
    assert len(loads.simulation(0.25).run.logs) > 20
    assert point.rate_rps == pytest.approx(0.25 * loads.base_rate, rel=0.5)
    with pytest.raises(ConfigError, match="repeated"):
        repeated(trace, 0)


def test_a_trace_that_says_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="two requests"):
        make_plan(regular(1), setup(), Sla.parse("ttft.p95<1s"))
    with pytest.raises(ConfigError, match="longer than the context"):
        make_plan(regular(tokens=600), setup(), Sla.parse("ttft.p95<1s"))
    assert len(shortened(regular(), 7).requests) == 7


def test_the_memory_of_the_cache_by_sequences() -> None:
    assert contexts(1000, 512, 24) == {1: 512, 2: 500, 4: 250, 8: 125, 16: 62, 24: 41}
    info = RunnerInfo(9, 64, (KVGroup(10, None, 1), KVGroup(3, 32, 1)), 16)
    assert tokens_held(info, 8) == 160
    assert tokens_held(replace(info, kv_groups=(KVGroup(3, 32, 1),)), 8) == 512


IDENTITY = MachineIdentity("Abacus 9", 25, 17, 1, "x86_64", True, 2, ("avx2",), 24, 1 << 15, 1 << 20, 1 << 25, 2)


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that was surveyed and probed, and a trace; returns the trace's path."""
    config = SimpleNamespace(model="m", kv_cache_memory_bytes=1 << 20, kv_host_bytes=0, enable_prefix_caching=True)
    surveyed = SimpleNamespace(
        config=config, info=setup().info, limits=SchedulerLimits(), weight_bytes=1 << 20, step_bytes=1 << 10,
        available_bytes=1 << 30, fingerprint="f",
    )  # fmt: skip
    monkeypatch.setenv("SETPOINT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(machine, "this_identity", lambda: IDENTITY)
    monkeypatch.setattr(assemble, "survey", lambda config, progress: surveyed)
    monkeypatch.setattr(planning, "HIGHEST", 64.0)
    shape = StepShape(1, 1, 1, 1.0, 1.0)
    cells = (MeasuredCell(Cell(1, 1), shape, 1e-3, 1e-3),)
    found = Calibration(SCHEMA, IDENTITY, "m", "f", 1.7e9, 30.0, cells, COST, 0.02, 0.03, 0.08)
    calibration_store.store_calibration(found)
    path = tmp_path / "trace.jsonl"
    write_trace(regular(), path)
    return path


def invoke(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = run("plan", ["m", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_prints_and_certifies(known: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--trace", str(known), "--slo")
    code, out, _ = invoke(capsys, *flags, "ttft.p95<300ms", "--rate", "50")
    assert code == 0
    for told in ("memory, GiB", "holds up to", "what binds", "--max-num-seqs 16", "50 requests/s: ", "error of 3%"):
        assert told in out
    code, out, _ = invoke(capsys, *flags, "ttft.p95<50ms")
    assert code == 1
    assert "INFEASIBLE" in out
    assert "no load and no number of engines can meet: ttft.p95<50ms (alone: 101 ms)" in out


def test_the_document_is_json_without_infinities(known: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def no_constant(name: str) -> Any:
        raise AssertionError(name)

    code, out, _ = invoke(capsys, "--trace", str(known), "--slo", "ttft.p95<300ms", "--json")
    document = json.loads(out, parse_constant=no_constant)
    assert code == 0
    assert document["feasible"] is True
    assert document["capacity"]["rate_rps"] > 8
    assert document["memory"]["contexts"]["1"] == 512
    code, out, _ = invoke(capsys, "--trace", str(known), "--slo", "ttft.p95<50ms", "--json")
    assert code == 1
    assert json.loads(out, parse_constant=no_constant)["impossible"] == ["ttft.p95<50ms (alone: 101 ms)"]


def test_the_page_needs_nothing_else(known: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = known.with_name("plan.html")
    flags = ("--trace", str(known), "--slo", "ttft.p95<300ms,tpot.p95<1s")
    code, out, _ = invoke(capsys, *flags, "--html", str(page))
    assert code == 0
    text = page.read_text()
    assert text.count("<svg") == 3
    assert "Holds up to" in text
    assert "ttft.p95&lt;300ms" in text
    assert out.splitlines()[0] in text
    assert "<script" not in text
    assert "src=" not in text
    code, _, err = invoke(capsys, *flags, "--html", str(known / "no" / "folder.html"))
    assert code == 2
    assert "choose another --html" in err


@pytest.mark.parametrize(
    ("slo", "told"), [("fast", "SLA term 'fast'"), ("ttft.p95<1s,ttft.p95<2s", "same statistic twice")]
)
def test_a_bad_sla_is_one_line(known: Path, capsys: pytest.CaptureFixture[str], slo: str, told: str) -> None:
    code, out, err = invoke(capsys, "--trace", str(known), "--slo", slo)
    assert (code, out) == (2, "")
    assert told in err.splitlines()[-1]


def test_an_unknown_model_is_sent_to_the_probe(
    known: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "this_identity", lambda: replace(IDENTITY, num_cpus=64))
    code, _, err = invoke(capsys, "--trace", str(known), "--slo", "ttft.p95<1s")
    assert code == 2
    assert "run `setpoint probe m`" in err
