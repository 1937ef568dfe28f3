"""From measured steps to a `StepCost`: least squares on relative errors, with coefficients that are never negative.

The size of a step that was measured is a knot of `body` and `head`, and what is fitted are the rises between knots: so
the result is monotone by construction. Where the samples leave a rise open it is spread evenly, as a straight line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from setpoint.engine.step_cost import Rising, StepCost, StepShape
from setpoint.errors import ConfigError

Floats = NDArray[np.float64]

MAX_KNOTS = 48
_RIDGE = 1e-7  # decides only what the samples do not


@dataclass(frozen=True, slots=True)
class StepSample:
    """Steps of one shape, and the seconds that the runner took."""

    shape: StepShape
    seconds: float


def fit_step_cost(samples: Sequence[StepSample], *, host_s: float = 0.0, host_per_entry_s: float = 0.0) -> StepCost:
    """Raises ConfigError when there is nothing to fit."""
    if not samples or any(sample.seconds <= 0 or sample.shape.tokens < 1 for sample in samples):
        raise ConfigError("a step cost needs measured steps; run `setpoint probe MODEL`")
    token_knots = _knots([sample.shape.tokens for sample in samples], 1)
    row_knots = _knots([sample.shape.rows for sample in samples], 0)
    seconds = np.asarray([sample.seconds for sample in samples])
    columns = np.hstack(
        [
            np.ones((len(samples), 1)),
            _rises([sample.shape.tokens for sample in samples], token_knots),
            _rises([sample.shape.rows for sample in samples], row_knots),
            np.asarray([[s.shape.entries, s.shape.context, s.shape.pairs] for s in samples], np.float64),
        ]
    )
    num_token, num_row = len(token_knots) - 1, len(row_knots) - 1
    relative = columns / seconds[:, None]
    scale = np.maximum(relative.max(axis=0), 1e-300)
    scale[1 : 1 + num_token + num_row] = scale[1 : 1 + num_token + num_row].mean() or 1.0  # one unit for all rises
    solved = nonnegative_least_squares(relative / scale, np.ones(len(samples))) / scale
    base, token_rises, row_rises, rates = np.split(solved, np.cumsum([1, num_token, num_row]))
    body = base[0] + np.concatenate(([0.0], np.cumsum(token_rises * np.sqrt(np.diff(token_knots)))))
    head = np.concatenate(([0.0], np.cumsum(row_rises * np.sqrt(np.diff(row_knots)))))
    return StepCost(
        body=Rising(tuple(token_knots), tuple(body.tolist())),
        head=Rising(tuple(row_knots), tuple(head.tolist())),
        per_entry_s=float(rates[0]),
        per_context_s=float(rates[1]),
        per_pair_s=float(rates[2]),
        host_s=host_s,
        host_per_entry_s=host_per_entry_s,
    )


def relative_errors(cost: StepCost, samples: Sequence[StepSample]) -> list[float]:
    """(predicted - measured) / measured of the runner's seconds."""
    return [cost.runner_seconds(sample.shape) / sample.seconds - 1.0 for sample in samples]


def leave_one_out(samples: Sequence[StepSample]) -> list[float]:
    """The error at each sample of a fit to all others: what to expect of shapes between them.

    The ends of the grid are left out: a model that has never seen a step as large has to guess, which no user needs.
    """
    errors = []
    tokens, rows = [s.shape.tokens for s in samples], [s.shape.rows for s in samples]
    for index, sample in enumerate(samples):
        others = [*samples[:index], *samples[index + 1 :]]
        inside = _is_inside(sample.shape.tokens, tokens, index) and _is_inside(sample.shape.rows, rows, index)
        if others and inside:
            errors += relative_errors(fit_step_cost(others), [sample])
    return errors


def _is_inside(value: int, values: Sequence[int], index: int) -> bool:
    others = [*values[:index], *values[index + 1 :]]
    return min(others, default=value + 1) <= value <= max(others, default=value - 1)


def _knots(sizes: Sequence[int], first: int) -> list[int]:
    """The sizes that occur, from `first` on; thinned evenly by rank where there are too many."""
    distinct = sorted({first, *sizes})
    if len(distinct) <= MAX_KNOTS:
        return distinct
    places = np.unique(np.round(np.linspace(0, len(distinct) - 1, MAX_KNOTS)).astype(int))
    return [distinct[place] for place in places]


def _rises(sizes: Sequence[int], knots: Sequence[int]) -> Floats:
    """[samples, knots - 1]: how much of each segment lies below the size, scaled by the root of its width.

    The least norm of coefficients scaled like this is a straight line wherever no sample says otherwise.
    """
    low, high = np.asarray(knots[:-1], np.float64), np.asarray(knots[1:], np.float64)
    width = high - low
    share: Floats = np.clip((np.asarray(sizes, np.float64)[:, None] - low) / np.maximum(width, 1.0), 0.0, 1.0)
    return share * np.sqrt(width)


def nonnegative_least_squares(matrix: Floats, target: Floats) -> Floats:
    """argmin |matrix x - target| over x >= 0: the active set method of Lawson and Hanson (1974), chapter 23."""
    num = matrix.shape[1]
    gram, moment = matrix.T @ matrix + _RIDGE * np.eye(num), matrix.T @ target
    solution, passive = np.zeros(num), np.zeros(num, bool)
    for _ in range(3 * num):
        gradient = moment - gram @ solution
        gradient[passive] = -np.inf
        best = int(np.argmax(gradient))
        if gradient[best] <= 1e-10 * len(target):
            break
        passive[best] = True
        while True:
            trial = np.zeros(num)
            chosen = np.flatnonzero(passive)
            trial[chosen] = np.linalg.solve(gram[np.ix_(chosen, chosen)], moment[chosen])
            if trial[chosen].min() > 0:
                break
            falling = chosen[trial[chosen] <= 0]
            step = float(np.min(solution[falling] / np.maximum(solution[falling] - trial[falling], 1e-300)))
            solution += step * (trial - solution)
            passive &= solution > 1e-14
            solution[~passive] = 0.0
            if not passive.any():
                break
        solution = np.where(passive, trial, 0.0)
    return solution
