from __future__ import annotations

import math
from dataclasses import replace

import pytest

from setpoint.tune.search.certify import Decision
from setpoint.tune.search.study import Study
from setpoint.tune.search.trial import Ask, Observation, Share
from setpoint.tune.search.tuned import Loads, Tuned
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


def _shares(misses: float, allowed: float = 0.05) -> dict[str, Share]:
    n = 200.0
    return {"ttft.p95<1ms": Share(n * (1 - misses), n, n, 1 - allowed)}


def test_a_finalist_whose_gain_is_shown_gets_a_second_look_at_a_lower_load() -> None:
    """At 0.9 of the guessed capacity it misses the SLA, at 0.87 of that it does not."""
    setting = (("max_num_seqs", 8),)

    def measure(ask: Ask) -> Observation:
        misses = 0.02 if ask.load < 1.6 else 0.055 if ask.setting == setting else 0.5
        return replace(_ok(), rate_rps=ask.load, shares=_shares(misses))

    tuner = Tuner(Job((), 100.0), measure, Study(None, {}))
    own = Loads((), 1.0, 1.1, ((1.0, measure(Ask("", (), 1.0, "tune", 0, 1.0))),))
    other = Loads(setting, 1.9, 1.95, own.points)
    tuned = Tuned(Decision("invalid", None, ""), 0.01, 1.0, loads=[own, other], slope=4.0)
    tuner._certify(tuned)
    assert not tuned.finalists[0].holds
    assert tuned.decision.verdict == "certified"
    chosen = tuned.decision.chosen
    assert chosen is not None
    assert chosen.setting == setting
    assert chosen.load == pytest.approx(0.87 * tuned.finalists[0].load)
    assert chosen.gain == tuned.finalists[0].gain
    assert all(term.bound < 0.05 for term in chosen.terms)
