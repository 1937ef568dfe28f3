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
from setpoint.cli.explain_recipe import draw
from setpoint.cli.main import run
from setpoint.config import EngineConfig
from setpoint.engine.limits import SchedulerLimits
from setpoint.engine.step_cost import Rising, StepCost, StepShape
from setpoint.loaders import hub
from setpoint.tune.plan.counterfactual import faster, measured_gain, prices, reasons, rejected
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


def raced(setting: Setting, score: float, seed: int = 1000, state: str = "ok") -> tuple[Ask, Observation]:
    ask = Ask("race", setting, 2.0, "tune", seed, 3.0)
    return ask, Observation(state, 3.0, requests=9, scores=(score,) * 8)  # type: ignore[arg-type]


def test_a_knob_put_back_costs_what_the_queue_says() -> None:
    found = reasons((*WIDE, ("max_num_batched_tokens", 256)), SLA, TRAFFIC, setup(max_num_seqs=1), limits_of)
    assert found.capacity_rps is not None
    assert found.default_rps is not None
    assert found.default_rps < 0.8 * found.capacity_rps
    wide, budget = found.knobs
    assert wide.predicted == pytest.approx(found.default_rps / found.capacity_rps - 1, abs=0.05)
    assert budget.predicted == 0.0
    assert found.binding is not None
    assert found.binding.terms[0].startswith("ttft.p95")
    worth = {price.what: price.predicted for price in found.prices}
    assert worth["10% faster steps"] is not None
    assert worth["10% faster steps"] > 0.03
    assert worth["10% more KV cache"] == 0.0


def test_a_tenth_more_is_a_tenth() -> None:
    quick, shape = faster(COST, 1.1), StepShape(2, 60, 2, 100, 100)
    assert quick.seconds(shape) == pytest.approx(COST.seconds(shape) / 1.1)
    names = [what for what, *_ in prices(setup(), Sla.parse("ttft.p95<200ms,tpot.p95<30ms"))]
    assert names == [
        "ttft.p95<200ms relaxed by 10%",
        "tpot.p95<30ms relaxed by 10%",
        "10% more KV cache",
        "10% faster steps",
    ]


def test_measured_gains_come_from_pairs_alone() -> None:
    other: Setting = (("max_num_seqs", 4),)
    runs = [raced((), 0.5), raced(WIDE, 0.9), raced((), 0.3, 1001), raced(WIDE, 0.5, 1001), raced(other, 0.4)]
    runs += [raced(WIDE, 9.0, 1002), raced(other, 9.0, 1001, "invalid")]  # without its pair; invalid
    assert measured_gain(WIDE, runs) == (pytest.approx(0.3), 2)
    assert measured_gain((("max_num_seqs", 2),), runs) == (None, 0)
    assert [(change.what, change.pairs) for change in rejected(WIDE, runs)] == [("max_num_seqs=4", 1)]


@pytest.fixture
def tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe with its trace and its study, on a machine that knows the model."""
    trace, path = tmp_path / "traffic.jsonl", tmp_path / "recipe.toml"
    write_trace(TRAFFIC, trace)
    of_trace = model_hash(trace)
    provenance = {"trace": {"file": trace.name, "sha256": of_trace}, "given": {}}
    evidence = {"gain": {"estimate": 0.4, "ci95": [0.3, 0.5]}}
    weights = tmp_path / "model.gguf"
    weights.write_bytes(b"weights")
    about = {"name": "any", "sha256": model_hash(weights)}
    machine = {"fingerprint": machine_fingerprint(this_identity())}
    monkeypatch.setattr(hub, "resolve_model", lambda name, folder: weights)
    write_recipe(Recipe("certified", str(SLA), dict(WIDE), about, machine, evidence, (), provenance), path)
    study = Study(path.with_suffix(".study.jsonl"), {"sla": str(SLA), "trace": of_trace})
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
    assert knob["what"] == "max_num_seqs=8"
    assert knob["predicted"] < -0.1
    assert (knob["measured"], knob["pairs"]) == (pytest.approx(0.4), 1)
    assert [other["what"] for other in found["rejected"]] == ["max_num_seqs=4"]
    assert run("explain", [str(tuned)]) == 0
    told = capsys.readouterr().out
    assert "measured gain over the default: +40% (at least +30%, at most +50%)" in told
    assert "what binds" in told


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
    assert "the study of another recipe" in capsys.readouterr().err
    monkeypatch.setattr(calibration_store, "load_calibration", lambda *_: None)
    assert run("explain", [str(tuned)]) != 0
    assert "run `setpoint probe any`" in capsys.readouterr().err


def test_a_recipe_that_is_the_default_says_so() -> None:
    found = reasons((), SLA, TRAFFIC, setup(max_num_seqs=1), limits_of)
    recipe = Recipe("the default is best", str(SLA), {}, {}, {}, {}, (), {})
    assert found.interaction is None
    assert "no knob differs from its default" in draw(recipe, found)


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
    gain = {"gain": {"estimate": 0.4, "ci95": [-1.0, 1e9]}}
    assert run("explain", [str(_altered(tuned, evidence=gain))]) == 0
    assert "+40% (no bounds are known)" in capsys.readouterr().out
