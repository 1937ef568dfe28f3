"""What is thought of settings: predictions where nothing ran, runs where they contradict, and no belief in luck."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from setpoint.tune.search.race import Racer, joined, mean_variance
from setpoint.tune.search.space import DEFAULT, Dimension, Setting, setting_of
from setpoint.tune.search.surrogate import Seen, Surrogate

DIMENSIONS = (Dimension("a", 4, (1, 2, 4, 8, 16, 32)), Dimension("b", 4, (1, 2, 4, 8, 16, 32)))
ALL = [setting_of(DIMENSIONS, (a, b)) for a in DIMENSIONS[0].values for b in DIMENSIONS[1].values]


def truth(setting: Setting) -> float:
    """A hill over the ranks, 0 at the default."""
    chosen = dict(setting)
    a, b = (math.log2(chosen.get(name, 4)) for name in "ab")
    return 0.4 - 0.05 * ((a - 4) ** 2 + (b - 2) ** 2) + 0.05 * 4 - 0.4


def predictions(error: float, shift: float = 0.0, seed: int = 0) -> dict[Setting, float]:
    chance = random.Random(seed)
    return {setting: truth(setting) + shift + chance.gauss(0, error) for setting in ALL}


def test_rough_predictions_say_together_what_one_does_not() -> None:
    raw, smooth = [], []
    for seed in range(5):
        predicted = predictions(0.1, seed=seed)
        thought = Surrogate(DIMENSIONS, predicted, 0.1).gains(ALL)[0]
        raw.append(np.std([predicted[s] - truth(s) for s in ALL]))
        offset = thought - np.asarray([truth(s) for s in ALL])
        smooth.append(np.std(offset))
    assert np.mean(smooth) < 0.5 * np.mean(raw)


def test_the_default_is_the_measure_whatever_was_predicted_of_it() -> None:
    mean, deviation = Surrogate(DIMENSIONS, predictions(0.05, shift=7.0), 0.05).gains([DEFAULT])
    assert mean[0] == pytest.approx(0.0, abs=1e-3)
    assert deviation[0] < 0.01


def test_runs_correct_a_prediction_that_is_wrong_and_their_neighbours() -> None:
    best = max(ALL, key=truth)
    wrong = {setting: -truth(setting) for setting in ALL}
    far = setting_of(DIMENSIONS, (32, 32))
    before = Surrogate(DIMENSIONS, wrong, 0.1)
    after = Surrogate(DIMENSIONS, wrong, 0.1, [Seen(best, truth(best), 1e-4), Seen(far, truth(far), 1e-4)])
    assert before.gains([best])[0][0] < 0
    assert after.gains([best])[0][0] == pytest.approx(truth(best), abs=0.05)
    beside = setting_of(DIMENSIONS, (16, 8))
    assert after.gains([beside])[0][0] > before.gains([beside])[0][0]


def test_a_lucky_run_is_not_believed() -> None:
    lucky = setting_of(DIMENSIONS, (16, 4))
    seen = [Seen(setting, 0.0, 0.02**2) for setting in ALL if setting not in (DEFAULT, lucky)]
    thought = Surrogate(DIMENSIONS, {}, 0.05, [*seen, Seen(lucky, 0.1, 0.05**2)])
    assert thought.gains([lucky])[0][0] < 0.05


def test_improvement_is_expected_where_little_is_known() -> None:
    known = setting_of(DIMENSIONS, (8, 4))
    thought = Surrogate(DIMENSIONS, {}, 0.05, [Seen(known, 0.1, 1e-6)])
    hopes = thought.improvement([known, setting_of(DIMENSIONS, (32, 4))], 0.1)
    assert hopes[1] > hopes[0] >= 0


def test_pairs_of_a_setting_are_joined_and_calling_back_lets_in() -> None:
    setting = setting_of(DIMENSIONS, (8, 4))
    before = Racer(setting, [0.1, 0.2], 1, "in the lower half of its rung")
    both = joined(before, Racer(setting, [0.3, 0.2], 1))
    assert (both.differences, both.pairs, both.out) == ([0.1, 0.2, 0.3, 0.2], 2, "")
    assert joined(before, Racer(setting, out="failed: crash")).out == "failed: crash"
    assert mean_variance(both, 0.0) < mean_variance(both, 0.05)
