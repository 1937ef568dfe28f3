"""Racing: settings run in pairs with the default, in rungs of growing length, and leave when they cannot be better.

Pairs share arrivals and prompts. The default is run again every few candidates, so that a drift of the machine hits
both sides. What decides is a mean score with little variance, never a percentile. After Birattari et al. 2002 (F-Race)
and successive halving (Karnin et al. 2013).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from setpoint.tune.search.space import DEFAULT, Setting
from setpoint.tune.search.trial import Ask, Observation
from setpoint.tune.statistics import Interval, t_quantile

AGAIN = 3  # candidates between two runs of the default
GROWTH = 3.0  # of a rung over the one before
Measure = Callable[[Ask], Observation]


@dataclass
class Racer:
    setting: Setting
    differences: list[float] = field(default_factory=list)  # of scores to the default's, by stretch of time
    pairs: int = 0
    out: str = ""  # why it left

    @property
    def mean(self) -> float:
        return sum(self.differences) / len(self.differences) if self.differences else -math.inf


def mean_variance(racer: Racer, noise: float) -> float:
    """Of its mean: the scatter of its stretches, and the noise between equal runs that they do not show."""
    n = len(racer.differences)
    spread = sum((value - racer.mean) ** 2 for value in racer.differences) / max(n - 1, 1) / n
    return spread + 2 * noise**2 / max(racer.pairs, 1)


def joined(before: Racer | None, later: Racer) -> Racer:
    """All pairs of a setting. Whoever was called back is in again, unless it failed now."""
    if before is None:
        return later
    is_out = later.out.startswith(("failed", "saturated"))
    return Racer(
        later.setting,
        [*before.differences, *later.differences],
        before.pairs + later.pairs,
        later.out if is_out else "",
    )


@dataclass(frozen=True)
class RaceResult:
    """`ranked` are those still in, best first, with their gain in score; the default has 0."""

    ranked: tuple[Setting, ...]
    racers: tuple[Racer, ...]
    rungs: int


def paired_interval(differences: Sequence[float], pairs: int, noise: float, confidence: float = 0.95) -> Interval:
    """Student's, for stretches of paired runs, plus the noise between equal runs that no stretch shows."""
    n = len(differences)
    mean = sum(differences) / n
    spread = sum((value - mean) ** 2 for value in differences) / max(n - 1, 1) / n
    error = math.sqrt(spread + 2 * noise**2 / max(pairs, 1))
    reach = t_quantile((1 + confidence) / 2, max(n - 1, 1)) * error
    return Interval(mean, mean - reach, mean + reach)


def race(
    settings: Sequence[Setting],
    measure: Measure,
    *,
    load: float,
    first_s: float,
    noise: float,
    has_time: Callable[[float], bool],
    keep: int = 2,
    seed: int = 1000,
) -> RaceResult:
    """Until `keep` are left or `has_time(seconds of the next rung)` says no. A rung that was begun is finished."""
    racers = [Racer(setting) for setting in settings if setting != DEFAULT]
    seconds, rung = first_s, 0
    while True:
        still = [racer for racer in racers if not racer.out]
        if not still or (rung and len(still) <= keep) or not has_time(_cost(len(still), seconds)):
            break
        _rung(still, measure, load, seconds, seed + rung)
        _eliminate(still, noise, keep)
        rung += 1
        seconds *= GROWTH
    still = sorted((racer for racer in racers if not racer.out), key=lambda racer: -racer.mean)
    return RaceResult(tuple(racer.setting for racer in still), tuple(racers), rung)


def _cost(count: int, seconds: float) -> float:
    return (count + math.ceil(count / AGAIN)) * seconds


def _rung(racers: Sequence[Racer], measure: Measure, load: float, seconds: float, seed: int) -> None:
    default: Observation | None = None
    for place, racer in enumerate(racers):
        if place % AGAIN == 0:
            again = measure(Ask(f"race {place // AGAIN}", DEFAULT, load, "tune", seed, seconds))
            default = again if again.counts else default
        seen = measure(Ask("race", racer.setting, load, "tune", seed, seconds))
        if seen.state == "failed":
            racer.out = f"failed: {seen.detail}"[:200]
        elif seen.counts and default is not None and len(seen.scores) == len(default.scores):
            racer.differences += [mine - theirs for mine, theirs in zip(seen.scores, default.scores, strict=True)]
            racer.pairs += 1
            if seen.state == "saturated" and default.state == "ok":
                racer.out = "saturated where the default is not"


def _eliminate(racers: Sequence[Racer], noise: float, keep: int) -> None:
    """Who cannot be better than the default, or than the best; and the lower half, once they were seen."""
    still = [racer for racer in racers if not racer.out and racer.pairs]
    for racer in racers:
        if not racer.out and not racer.pairs:
            racer.out = "no valid pair of runs"
    for racer in list(still):
        found = paired_interval(racer.differences, racer.pairs, noise)
        if found.high <= 0:
            racer.out = f"not better than the default: {found.estimate:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
            still.remove(racer)
    ranked = sorted(still, key=lambda racer: -racer.mean)
    for racer in ranked[1:]:
        leader = ranked[0]
        between = [a - b for a, b in zip(racer.differences, leader.differences, strict=False)]
        found = paired_interval(between, racer.pairs, noise)
        if found.high < 0:
            racer.out = f"worse than the best: {found.estimate:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
    ranked = [racer for racer in ranked if not racer.out]
    for racer in ranked[max(keep, math.ceil(len(ranked) / 2)) :]:
        racer.out = "in the lower half of its rung"
