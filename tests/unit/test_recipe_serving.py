"""`serve --recipe`: the knobs and the SLA of a recipe, and when its evidence does not count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from setpoint import assemble
from setpoint.cli.serve import with_recipe
from setpoint.config import EngineConfig
from setpoint.engine.envelope import Traffic
from setpoint.engine.slo import HeldSla
from setpoint.errors import ConfigError
from setpoint.loaders import hub
from setpoint.tune.probe import machine
from setpoint.tune.probe.machine import this_identity
from setpoint.tune.recipe import Recipe, machine_fingerprint, model_hash, write_recipe

KNOBS = {"max_num_seqs": 4}
NAMES = ("input_log_mean", "input_log_deviation", "output_log_mean", "output_log_deviation")
TRAFFIC = (5.0, 0.7, 4.0, 0.6)
SLA = "ttft.p95<3000ms,tpot.p95<100ms"


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"weights")
    monkeypatch.setattr(hub, "resolve_model", lambda name, folder, progress: path)
    identity = this_identity()
    monkeypatch.setattr(machine, "this_identity", lambda: identity)
    return path


def recipe(model: Path, sla: str = SLA, rows: tuple[Mapping[str, Any], ...] = (), **given: object) -> Path:
    fingerprint = machine_fingerprint(machine.this_identity())
    made = Recipe(
        verdict="certified",
        sla=sla,
        knobs=KNOBS,
        model={"name": "any", "sha256": model_hash(model)},
        machine={"fingerprint": fingerprint},
        evidence={},
        envelope=rows,
        provenance={"given": given, "traffic": dict(zip(NAMES, TRAFFIC, strict=True))},
    )
    path = model.with_name("recipe.toml")
    write_recipe(made, path)
    return path


def test_a_recipe_sets_its_knobs_and_its_sla_is_held(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    default = EngineConfig(model="any")
    tuned = with_recipe(default, recipe(model), anyway=False)
    assert tuned.config.max_num_seqs == 4
    assert tuned.config.max_num_batched_tokens == default.max_num_batched_tokens
    assert tuned.built == default  # as in the trials: a cache for fewer sequences would be a smaller one
    assert tuned.held == replace(HeldSla.parse(SLA), traffic=Traffic(*TRAFFIC))
    assert "certified" in capsys.readouterr().err


def test_an_sla_that_no_step_can_hold_is_said_and_served_without(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert with_recipe(EngineConfig(model="any"), recipe(model, "e2e.p95<3000ms"), anyway=False).held is None
    assert "is not held while serving" in capsys.readouterr().err


def test_another_model_other_knobs_and_missing_ones_do_not_count(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(model)
    with pytest.raises(ConfigError, match="--max-num-seqs 8 is not what it sets"):
        with_recipe(EngineConfig(model="any", max_num_seqs=8), path, anyway=False)
    with pytest.raises(ConfigError, match="without --max-num-batched-tokens 128"):
        with_recipe(EngineConfig(model="any", max_num_batched_tokens=128), path, anyway=False)
    model.write_bytes(b"other weights")
    with pytest.raises(ConfigError, match="for another model"):
        with_recipe(EngineConfig(model="any"), path, anyway=False)
    assert with_recipe(EngineConfig(model="any"), path, anyway=True).config.max_num_seqs == 4
    assert "UNCERTIFIED (it was certified for another model)" in capsys.readouterr().err


def test_knobs_that_it_was_certified_with_must_be_given(model: Path) -> None:
    path = recipe(model, max_num_batched_tokens=128)
    with_recipe(EngineConfig(model="any", max_num_batched_tokens=128), path, anyway=False)
    with pytest.raises(ConfigError, match="without --max-num-batched-tokens"):
        with_recipe(EngineConfig(model="any"), path, anyway=False)


def test_larger_limits_are_built_for_beside_the_cache_of_the_default(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KNOBS, "max_num_seqs", 128)
    resolved = EngineConfig(model="any", kv_cache_memory_bytes=1 << 20)
    monkeypatch.setattr(assemble, "survey", lambda config: SimpleNamespace(config=resolved))
    tuned = with_recipe(EngineConfig(model="any"), recipe(model), anyway=False)
    assert tuned.built.max_num_seqs == tuned.config.max_num_seqs == 128
    assert tuned.built.kv_cache_memory_bytes == 1 << 20


def test_the_rows_of_the_envelope_are_limits_by_load_and_the_engine_has_room_for_all(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved = EngineConfig(model="any", kv_cache_memory_bytes=1 << 20)
    monkeypatch.setattr(assemble, "survey", lambda config: SimpleNamespace(config=resolved))
    rows = ({"up_to_rps": 3.0, "set": {"max_num_seqs": 128}}, {"up_to_rps": 5, "set": KNOBS})
    tuned = with_recipe(EngineConfig(model="any"), recipe(model, rows=rows), anyway=False)
    assert tuned.held is not None
    assert [row.up_to_rps for row in tuned.held.rows] == [3.0, 5.0]
    assert [row.limits.max_num_seqs for row in tuned.held.rows] == [128, 4]
    assert tuned.built.max_num_seqs == 128
    assert tuned.config.max_num_seqs == 4


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (({"up_to_rps": 3.0, "set": {}}, {"up_to_rps": 2.0, "set": {}}), "envelope.1..up_to_rps"),
        (({"up_to_rps": 0, "set": {}},), "envelope.0..up_to_rps"),
        (({"up_to_rps": True, "set": {}},), "envelope.0..up_to_rps"),
        (({"up_to_rps": 1.0},), "envelope.0..set"),
        (({"up_to_rps": 1.0, "set": {"dtype": "f32"}},), "dtype"),
    ],
)
def test_an_envelope_that_says_nothing_is_refused(model: Path, rows: tuple[Mapping[str, Any], ...], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        with_recipe(EngineConfig(model="any"), recipe(model, rows=rows), anyway=False)
