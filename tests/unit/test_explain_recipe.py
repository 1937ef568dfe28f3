"""`setpoint explain recipe.toml`: what each knob does where a queue says it, and plain refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_plan import regular
from test_plan import setup as plan_setup

from setpoint import assemble
from setpoint.cli.explain_recipe import Explained, draw
from setpoint.cli.main import run
from setpoint.config import EngineConfig
from setpoint.engine.limits import SchedulerLimits
from setpoint.engine.step_cost import Rising, StepCost, StepShape
from setpoint.loaders import hub
from setpoint.tune.explain.measured import compared, rejected
from setpoint.tune.explain.simulated import Question, explain, relieved
from setpoint.tune.probe import calibration_store
from setpoint.tune.probe.machine import this_identity
from setpoint.tune.recipe import Recipe, machine_fingerprint, model_hash, read_recipe, write_recipe
from setpoint.tune.search.space import Setting
from setpoint.tune.search.study import Study
from setpoint.tune.search.trial import Ask, Observation
from setpoint.tune.simulate.simulator import EngineSetup
from setpoint.tune.sla import Sla
from setpoint.workload.trace import write_trace

Capture = pytest.CaptureFixture[str]
SLA = Sla.parse("ttft.p95<450ms")
# A step takes 10 ms, however many answers it goes on with; a token of a prompt adds 0.1 ms.
COST = StepCost(Rising((1, 101), (10e-3, 20e-3)), Rising((0, 1), (0.0, 0.0)), 0.0, 0.0, 0.0)
# The default lets one request run at a time, which answers of 50 tokens keep for half a second; the recipe lets eight.
WIDE: Setting = (("max_num_seqs", 8),)
TRAFFIC = regular(count=60, gap=0.5, tokens=40, output=50)


def setup(**limits: int) -> EngineSetup:
    return replace(plan_setup(**limits), cost=COST)


def limits_of(setting: Setting) -> SchedulerLimits:
    return SchedulerLimits(**{"max_num_seqs": 1, "max_num_batched_tokens": 512, **dict(setting)})


def question(chosen: Setting, sla: Sla = SLA) -> Question:
    return Question(TRAFFIC, setup(max_num_seqs=1), sla, chosen, limits_of)


def raced(setting: Setting, score: float, seed: int = 1000, state: str = "ok") -> tuple[Ask, Observation]:
    ask = Ask("race", setting, 2.0, "tune", seed, 3.0)
    scores = tuple(score + 0.01 * (place % 2) for place in range(8))
    return ask, Observation(state, 3.0, "why", requests=9, scores=scores)  # type: ignore[arg-type]


def test_a_knob_put_back_costs_what_the_queue_says() -> None:
    found = explain(question((*WIDE, ("max_num_batched_tokens", 256))))
    assert found is not None
    assert found.default_change is not None
    assert found.default_change < -0.2
    assert found.flips["max_num_seqs"] == pytest.approx(found.default_change, abs=0.05)
    assert found.flips["max_num_batched_tokens"] == 0.0
    assert found.remainder == pytest.approx(0.0, abs=0.06)
    assert found.binding.terms[0].startswith("ttft.p95")
    worth = {price.name: price.per_unit for price in found.prices}
    assert worth["kv"] == 0.0
    assert worth["host"] == 0.0
    assert worth["bandwidth"] > 0.02  # a step is one pass over the weights, and little else
    assert worth[str(SLA)] > 0.0
    assert sum(found.time.parts.values()) == pytest.approx(1.0)
    assert max(found.time.parts, key=lambda part: found.time.parts[part]) == "weights"


def test_a_term_that_does_not_bind_is_worth_nothing() -> None:
    sla = Sla.parse("ttft.p95<450ms,tpot.p95<9s")
    found = explain(question(WIDE, sla))
    assert found is not None
    ttft, tpot = (next(p.per_unit for p in found.prices if p.name == str(term)) for term in sla.terms)
    assert ttft > 0
    assert tpot == 0.0


def test_what_holds_at_no_load_is_not_simulated_further() -> None:
    assert explain(question(WIDE, Sla.parse("ttft.p95<1ms"))) is None


def test_more_of_every_resource_is_a_quicker_step() -> None:
    shape, known = StepShape(2, 60, 2, 100, 100), setup()
    known = replace(known, cost=replace(COST, host_s=1e-3, per_context_s=1e-5, per_pair_s=1e-6, per_entry_s=1e-4))
    richer = known
    for resource in ("bandwidth", "arithmetic", "host"):
        quicker = relieved(known, resource, 0.1).cost.seconds(shape)
        assert quicker < known.cost.seconds(shape)
        richer = relieved(richer, resource, 0.1)
    assert richer.cost.seconds(shape) == pytest.approx(known.cost.seconds(shape) / 1.1)
    more = relieved(known, "kv", 0.1).info.kv_groups[0].num_blocks
    assert more == int(1.1 * known.info.kv_groups[0].num_blocks)


OTHER: Setting = (("max_num_seqs", 4),)


def test_measured_gains_come_from_pairs_alone() -> None:
    runs = [raced((), 0.5), raced(WIDE, 0.9), raced((), 0.3, 1001), raced(WIDE, 0.5, 1001), raced(OTHER, 0.4)]
    runs += [raced(WIDE, 9.0, 1002), raced(OTHER, 9.0, 1001, "invalid")]  # without its pair; invalid
    found = compared(runs, WIDE, (), 0.01)
    assert found is not None
    assert (found.change, found.pairs, found.sign) == (pytest.approx(0.3), 2, 1)
    assert found.source == "study:2,3,4,5"
    assert compared(runs, (("max_num_seqs", 2),), (), 0.01) is None
    loud = compared(runs, WIDE, (), 0.5)
    assert loud is not None
    assert loud.sign == 0


def test_what_was_not_chosen_has_its_reason() -> None:
    crashed: Setting = (("max_num_seqs", 256),)
    runs = [raced((), 0.5), raced(WIDE, 0.9), raced(OTHER, 0.4), raced(crashed, 0.0, state="failed")]
    made = Recipe("certified", str(SLA), dict(WIDE), {}, {}, {}, (), {})
    reasons = {one.setting: one.reason for one in rejected(made, runs, 0.01)}
    assert reasons == {OTHER: "not better than the default", crashed: "failed: why (study:5)"}
    worse = rejected(made, [raced((), 0.5), raced(WIDE, 0.9), raced(OTHER, 0.7)], 0.01)
    assert [one.reason for one in worse] == ["worse than the chosen one"]
    close = rejected(made, [raced((), 0.5), raced(WIDE, 0.9), raced(OTHER, 0.9)], 0.01)
    assert [one.reason for one in close] == ["not shown to be better than the chosen one"]


@pytest.fixture
def tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe with its trace and its study, on a machine that knows the model."""
    trace, path = tmp_path / "traffic.jsonl", tmp_path / "recipe.toml"
    write_trace(TRAFFIC, trace)
    of_trace = model_hash(trace)
    provenance = {"trace": {"file": trace.name, "sha256": of_trace}, "given": {}}
    evidence = {"gain": {"estimate": 0.4, "ci95": [0.3, 0.5]}, "noise": 0.01, "runs": 5}
    weights = tmp_path / "model.gguf"
    weights.write_bytes(b"weights")
    about = {"name": "any", "sha256": model_hash(weights)}
    machine = {"fingerprint": machine_fingerprint(this_identity())}
    monkeypatch.setattr(hub, "resolve_model", lambda name, folder: weights)
    write_recipe(Recipe("certified", str(SLA), dict(WIDE), about, machine, evidence, (), provenance), path)
    head = {"sla": str(SLA), "trace": of_trace, "given": {}}
    head |= {"model": about["sha256"], "machine": machine["fingerprint"]}
    study = Study(path.with_suffix(".study.jsonl"), head)
    for ask, seen in (raced((), 0.5), raced(WIDE, 0.9), raced((("max_num_seqs", 4),), 0.7)):
        study.add(ask, seen)
    default = replace(EngineConfig(model="any"), max_num_seqs=1)
    known = setup(max_num_seqs=1)
    surveyed = SimpleNamespace(
        info=known.info, limits=known.limits, fingerprint="f", config=replace(default, enable_prefix_caching=True)
    )
    monkeypatch.setattr(assemble, "survey", lambda config: surveyed)
    monkeypatch.setattr(
        assemble, "scheduler_limits", lambda config: limits_of((("max_num_seqs", config.max_num_seqs),))
    )
    monkeypatch.setattr(calibration_store, "load_calibration", lambda *_: SimpleNamespace(cost=COST))
    return path


def test_a_recipe_is_explained_from_records(tuned: Path, capsys: Capture) -> None:
    assert run("explain", [str(tuned), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["gain"]["estimate"] == 0.4
    (knob,) = found["knobs"]
    assert knob["knob"] == "max_num_seqs"
    assert knob["predicted"] < -0.1
    assert knob["measured"]["source"] == "recipe:evidence.gain"
    assert knob["measured"]["change"] == pytest.approx(1 / 1.4 - 1)
    (other,) = found["rejected"]
    assert other["knobs"] == {"max_num_seqs": 4}
    assert other["reason"] == "worse than the chosen one"
    assert other["to_default"]["source"] == "study:2,4"
    assert other["predicted"] > 0
    assert {price["name"] for price in found["prices"]} == {str(SLA), "kv", "bandwidth", "arithmetic", "host"}
    assert run("explain", [str(tuned)]) == 0
    told = capsys.readouterr().out
    assert "measured gain over the default: +40% (at least +30%, at most +50%)" in told
    assert "what binds" in told
    assert "time at the capacity: weights" in told
    assert "memory bandwidth +10 %" in told


def test_the_trace_must_be_the_one_of_the_recipe(tuned: Path, tmp_path: Path, capsys: Capture) -> None:
    other = tmp_path / "other.jsonl"
    write_trace(regular(count=30), other)
    assert run("explain", [str(tuned), "--trace", str(other)]) != 0
    assert "not the trace that this recipe was tuned on" in capsys.readouterr().err
    (tmp_path / "traffic.jsonl").unlink()
    assert run("explain", [str(tuned)]) != 0
    assert "give it with --trace" in capsys.readouterr().err


def test_a_model_that_was_not_probed_and_a_study_of_another(
    tuned: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    study = tuned.with_suffix(".study.jsonl")
    head, *rest = study.read_text().splitlines()
    study.write_text("\n".join([json.dumps(json.loads(head) | {"sla": "ttft.p95<1s"}), *rest, ""]))
    assert run("explain", [str(tuned)]) == 0
    assert "is of another tuning (sla differ)" in capsys.readouterr().out
    monkeypatch.setattr(calibration_store, "load_calibration", lambda *_: None)
    assert run("explain", [str(tuned)]) != 0
    assert "run `setpoint probe any`" in capsys.readouterr().err


def test_a_recipe_that_is_the_default_says_so() -> None:
    found = explain(question(()))
    assert found is not None
    assert found.flips == {}
    made = Recipe("the default is best", str(SLA), {}, {}, {}, {}, (), {})
    told = draw(Explained(made, found, (), (), "nothing ran"))
    assert "no knob differs from its default" in told
    assert "no runs are shown: nothing ran" in told


def _altered(path: Path, **fields: object) -> Path:
    write_recipe(replace(read_recipe(path), **fields), path)  # type: ignore[arg-type]
    return path


def test_a_recipe_of_another_machine_or_version_is_refused_in_a_line(tuned: Path, capsys: Capture) -> None:
    made = read_recipe(tuned)
    assert run("explain", [str(_altered(tuned, machine={"fingerprint": "0" * 64}))]) == 2
    assert "certified on another machine" in capsys.readouterr().err
    given = dict(made.provenance) | {"given": {"a_knob_of_old": 1}}
    assert run("explain", [str(_altered(tuned, machine=made.machine, provenance=given))]) == 2
    assert "knobs that this version does not have" in capsys.readouterr().err
    for name in ("given", "trace"):
        provenance = dict(made.provenance) | {name: "no table"}
        assert run("explain", [str(_altered(tuned, provenance=provenance))]) == 2
        assert f"the recipe's {name} must be a table" in capsys.readouterr().err


def test_an_interval_without_ends_has_none(tuned: Path, capsys: Capture) -> None:
    gain = {"gain": {"estimate": 0.4, "ci95": [-1.0, 1e9]}, "noise": 0.01, "runs": 5}
    assert run("explain", [str(_altered(tuned, evidence=gain))]) == 0
    assert "+40% (no bounds are known)" in capsys.readouterr().out
