from __future__ import annotations

import math
from dataclasses import replace

import pytest

from setpoint.tune.search.study import Study
from setpoint.tune.search.trial import Ask, Observation
from setpoint.tune.search.tuner import AGAIN, Job, TooNoisyError, Tuner


def _ok(cost_s: float = 1.0) -> Observation:
    return Observation("ok", cost_s, requests=10, token_s=0.01, attainment=1.0, scores=(0.5,) * 8)


def _tuner(answers: dict[str, int], study: Study) -> tuple[Tuner, list[Ask]]:
    """`answers` says how many times in a row a stage is invalid."""
    asked: list[Ask] = []

    def measure(ask: Ask) -> Observation:
        asked.append(ask)
        base = ask.stage.partition(" again ")[0]
        if answers.get(base, 0) > 0:
            answers[base] -= 1
            return replace(_ok(), state="invalid", detail="machine: others worked")
        return _ok()

    return Tuner(Job((), 100.0), measure, study), asked


def test_an_invalid_run_is_repeated_under_a_name_of_its_own() -> None:
    study = Study(None, {})
    tuner, asked = _tuner({"noise a": AGAIN}, study)
    assert math.isclose(tuner._noise(), 0.0)
    assert [ask.stage for ask in asked[: AGAIN + 2]] == ["noise a", "noise a again 1", "noise a again 2", "noise b"]
    assert len({repr(ask) for ask, _ in study.lines}) == len(study.lines)


def test_a_machine_that_stays_disturbed_is_refused() -> None:
    tuner, _ = _tuner({"noise a": 100}, Study(None, {}))
    with pytest.raises(TooNoisyError, match="others worked"):
        tuner._noise()
