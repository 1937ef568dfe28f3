"""What is thought of settings that were not run, from predictions and from those that were: a Gaussian process.

Two layers over the ranks of the knobs' values: what the simulation says (a smooth function, each prediction off by its
error, all together by a common one), and a smooth discrepancy between the simulation and this machine (Kennedy and
O'Hagan 2001). Runs see the sum, with their noise. So twenty noisy runs and two hundred rough predictions say together
what neither says alone, and the best of many noisy means is not believed for its luck. Values are gains over the
default, in units of the score; the default's is 0. Scales come from the marginal likelihood over a small grid.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from setpoint.tune.search.space import DEFAULT, Dimension, Setting
from setpoint.tune.statistics import NORMAL, Floats

AMPLITUDES = (0.1, 0.3, 0.9)
LENGTHS = (0.25, 0.5, 1.0)  # of the range of a knob's values
DISCREPANCY_LENGTH = 0.5
CERTAIN = 1e-6  # variance of what is known: the default's gain over itself


@dataclass(frozen=True, slots=True)
class Seen:
    """Of a setting that ran: its mean gain, and the variance of that mean."""

    setting: Setting
    gain: float
    variance: float


class Surrogate:
    def __init__(
        self,
        dimensions: Sequence[Dimension],
        predicted: Mapping[Setting, float],
        model_error: float,
        seen: Sequence[Seen] = (),
    ) -> None:
        """`predicted` are scores; those that say nothing (not finite) are left out."""
        self._dimensions = dimensions
        base = predicted.get(DEFAULT, 0.0)
        known = [(s, score - base) for s, score in predicted.items() if s != DEFAULT and math.isfinite(score)]
        measured = [Seen(DEFAULT, 0.0, CERTAIN), *seen]
        self._places = self._at([s for s, _ in known] + [one.setting for one in measured])
        self._num_predicted = len(known)
        values = np.asarray([gain for _, gain in known] + [one.gain for one in measured])
        count, error = self._num_predicted, max(model_error, 1e-3)
        self._error = error
        noise = np.diag([error**2] * count + [one.variance + CERTAIN for one in measured])
        noise[:count, :count] += error**2  # the default's own prediction is off, and all are compared with it
        noise[count:, count:] += _kernel(self._places[count:], self._places[count:], error, DISCREPANCY_LENGTH)
        self._scale, self._factor, self._weights = max(
            (self._fitted(amplitude, length, noise, values) for amplitude, length in _grid()),
            key=lambda found: found[0],
        )[1:]

    def _fitted(
        self, amplitude: float, length: float, noise: Floats, values: Floats
    ) -> tuple[float, tuple[float, float], Floats, Floats]:
        """The logarithm of the likelihood, and what posteriors are made from."""
        covariance = _kernel(self._places, self._places, amplitude, length) + noise
        factor = np.asarray(np.linalg.cholesky(covariance + 1e-9 * np.eye(len(values))), np.float64)
        half: Floats = np.asarray(np.linalg.solve(factor, values), np.float64)
        likelihood = -0.5 * float(half @ half) - float(np.log(np.diag(factor)).sum())
        weights = np.asarray(np.linalg.solve(factor.T, half), np.float64)
        return likelihood, (amplitude, length), factor, weights

    def gains(self, settings: Sequence[Setting]) -> tuple[Floats, Floats]:
        """Mean and deviation of each setting's gain over the default on this machine."""
        places = self._at(settings)
        cross = _kernel(self._places, places, *self._scale)
        ran = self._places[self._num_predicted :]
        cross[self._num_predicted :] += _kernel(ran, places, self._error, DISCREPANCY_LENGTH)
        half = np.linalg.solve(self._factor, cross)
        variance = self._scale[0] ** 2 + self._error**2 - (half**2).sum(axis=0)
        return cross.T @ self._weights, np.sqrt(np.maximum(variance, 1e-12))

    def improvement(self, settings: Sequence[Setting], best: float) -> Floats:
        """Expected gain of each beyond `best` (Mockus 1975)."""
        means, deviations = self.gains(settings)
        z = (means - best) / deviations
        cdf = np.asarray([NORMAL.cdf(float(value)) for value in z])
        density = np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
        return np.asarray((means - best) * cdf + deviations * density, np.float64)

    def _at(self, settings: Sequence[Setting]) -> Floats:
        return np.asarray([[self._rank(d, dict(setting)) for d in self._dimensions] for setting in settings])

    @staticmethod
    def _rank(dimension: Dimension, chosen: Mapping[str, Any]) -> float:
        rank = dimension.values.index(chosen.get(dimension.knob, dimension.default))
        return rank / max(len(dimension.values) - 1, 1)


def _grid() -> itertools.product[tuple[float, float]]:
    return itertools.product(AMPLITUDES, LENGTHS)


def _kernel(one: Floats, other: Floats, amplitude: float, length: float) -> Floats:
    """Squared exponential, by squared distances of ranks."""
    squares = ((one[:, None, :] - other[None, :, :]) ** 2).sum(axis=2)
    return np.asarray(amplitude**2 * np.exp(-squares / (2 * length**2)))
