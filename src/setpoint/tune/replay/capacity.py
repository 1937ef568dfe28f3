"""The highest load at which an SLA holds, with an interval, from few runs.

Each run at one load gives, for every term of the SLA, how many requests met its bound. A probit line of that share on
the logarithm of the load crosses the term's level at its capacity; the SLA's is that of its tightest term. The next
load is where that line says the border is. A saturated run counts as failed and gives no shares: they depend on its
length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from setpoint.errors import ConfigError
from setpoint.tune.measure import Run
from setpoint.tune.metrics import Targets
from setpoint.tune.statistics import NORMAL, Floats, Interval, clopper_pearson, effective_n, t_quantile

LOWEST, HIGHEST = 1e-3, 1e3  # load multipliers
LOCAL = 1.6  # points within this factor of the border decide where it is
PATTERN = (1.0, 0.85, 1.12, 0.92, 1.06)  # of the estimate: loads on both sides of the border
MIN_POINTS = 5
FUTILE_RANGE = 3.9  # loads that are so far apart and miss the SLA alike say that load is not why
BATCHES = 10  # of a run: longer than what a busy period makes alike


@dataclass(frozen=True, slots=True)
class Share:
    met: float
    n: float
    level: float


@dataclass(frozen=True, slots=True)
class Point:
    """One run. `design_effect` is n over the effective n: how much less correlated requests say."""

    factor: float
    shares: Mapping[str, Share]
    is_met: bool
    is_saturated: bool = False
    design_effect: float = 1.0
    rate: float = 0.0  # arrivals a second
    attainment: float = 0.0


@dataclass(frozen=True, slots=True)
class Fit:
    """P(a request meets the bound) = Phi(intercept + slope log(load))."""

    intercept: float
    slope: float
    capacity: Interval  # as a load multiplier; infinite ends where the data do not say

    def share(self, factor: float) -> float:
        return NORMAL.cdf(self.intercept + self.slope * math.log(factor))


@dataclass(frozen=True)
class Capacity:
    """`interval` is None if no load was found that meets the SLA, or none that does not."""

    interval: Interval | None
    binding: str  # the term with the lowest capacity
    isotonic: float | None  # the same without a curve: where monotone shares cross the level
    points: tuple[Point, ...]
    reason: str
    fits: Mapping[str, Fit] = field(default_factory=dict)


def check_targets(targets: Targets) -> None:
    """Raises ConfigError for terms that no share of requests says."""
    terms = [term for sla in targets.all for term in sla.terms]
    if not terms:
        raise ConfigError("--find-capacity needs an SLA: --slo ttft.p95<200ms,tpot.p95<30ms")
    for term in terms:
        if term.level is None or term.level >= 1.0:
            raise ConfigError(f"capacity is found for percentiles and error rates of requests, not for {term}")


def point_of(run: Run, factor: float, targets: Targets) -> Point:
    """What one run says. Raises ValueError for an invalid run: it says nothing."""
    if not run.is_valid:
        raise ValueError("an invalid run is no point")
    shares: dict[str, Share] = {}
    effects, met, good = [1.0], True, np.zeros(0)
    for name, sla in (("", targets.everyone), *targets.classes.items()):
        if sla is None:
            continue
        logs = [
            log for log in run.arrivals if (log.class_name == name if name else log.class_name not in targets.classes)
        ]
        timings = [log.timing for log in logs]
        if not timings:
            continue
        good = np.concatenate([good, [float(sla.is_good(timing)) for timing in timings]])
        met = met and sla.holds(timings)
        for term in sla.terms:
            passes = [float(timing.ok and term.met_by(timing)) for timing in timings]
            assert term.level is not None
            shares[f"{name}={term}" if name else str(term)] = Share(sum(passes), len(passes), term.level)
            effects.append(len(passes) / effective_n(passes, BATCHES))
    return Point(
        factor,
        shares,
        is_met=met and not run.is_saturated,
        is_saturated=run.is_saturated,
        design_effect=max(effects),
        rate=len(run.arrivals) / max(run.window.seconds, 1e-9),
        attainment=float(good.mean()) if len(good) else 0.0,
    )


class CapacitySearch:
    """Ask `next_factor`, measure there, `add` the point; until it returns None. Then `result`."""

    def __init__(self, *, start: float = 1.0, tolerance: float = 0.05, max_points: int = 12) -> None:
        self.points: list[Point] = []
        self._start = start
        self._tolerance = tolerance
        self._max_points = max_points

    def add(self, point: Point) -> None:
        self.points.append(point)

    def next_factor(self) -> float | None:
        """None: precise enough, or enough points, or out of the range of loads."""
        if len(self.points) >= self._max_points:
            return None
        if not self.points:
            return self._start
        met = [point.factor for point in self.points if point.is_met]
        failed = [point.factor for point in self.points if not point.is_met]
        if not failed:
            return self._within(max(met) * 2.0)
        if not met:
            return None if self.futile() else self._within(min(failed) / 2.0)
        low, high = _bracket(met, failed)
        if high / low > 1.25:
            return math.sqrt(low * high)
        capacity = self.result().interval
        if capacity is None:
            return math.sqrt(low * high)
        half_width = math.log(capacity.high / capacity.low) / 2 if capacity.low > 0 else math.inf
        if len(self.points) >= MIN_POINTS and half_width <= self._tolerance:
            return None
        return self._within(capacity.estimate * PATTERN[len(self.points) % len(PATTERN)])

    def result(self) -> Capacity:
        points = tuple(self.points)
        met = [point.factor for point in points if point.is_met]
        failed = [point.factor for point in points if not point.is_met]
        if not met or not failed:
            reason = self.futile() or "no load that meets the SLA was found"
            if met:
                reason = (
                    f"every load that was tried meets the SLA, up to {max(met):.3g} times the trace's; give more runs"
                )
            return Capacity(None, "", None, points, reason)
        low, high = _bracket(met, failed)
        centre = math.sqrt(low * high)
        usable = [point for point in points if not point.is_saturated]
        names = {name for point in usable for name in point.shares}
        fits: dict[str, Fit] = {}
        for _ in range(3):  # the border decides which points are near it
            near = [p for p in usable if centre / LOCAL <= p.factor <= centre * LOCAL] or usable
            fits = {name: fit for name in sorted(names) if (fit := probit([p for p in near if name in p.shares], name))}
            if not fits:
                break
            centre = min(max(min(fit.capacity.estimate for fit in fits.values()), low / LOCAL), high * LOCAL)
        if not fits:
            bracket = Interval(math.sqrt(low * high), min(met), max(failed)) if low < high else None
            return Capacity(
                bracket, "", None, points, "between the last load that met the SLA and the first that did not"
            )
        binding = min(fits, key=lambda name: fits[name].capacity.estimate)
        found = fits[binding].capacity
        saturated = [point.factor for point in points if point.is_saturated and point.factor > found.estimate]
        capacity = Interval(found.estimate, found.low, min([found.high, *saturated]))
        return Capacity(capacity, binding, isotonic_border(usable, binding), points, "", fits)

    def futile(self) -> str:
        """Why no load meets the SLA, once the lowest one misses it surely and no less than higher ones; else nothing.

        A p95 that long prompts miss by themselves is missed at every load: halving it further shows the same again.
        """
        if not self.points or any(point.is_met for point in self.points):
            return ""
        lowest = min(self.points, key=lambda point: point.factor)
        far = [p for p in self.points if p.factor >= FUTILE_RANGE * lowest.factor and not p.is_saturated]
        for name, share in lowest.shares.items():
            effective = share.n / lowest.design_effect
            missed = 1 - share.met / share.n
            surely = clopper_pearson(missed * effective, effective)
            others = [1 - p.shares[name].met / p.shares[name].n for p in far if name in p.shares]
            if others and surely.low > 1 - share.level and surely.high >= min(others):
                return (
                    f"this SLA cannot be met at any load: {missed:.1%} of the requests miss {name} at "
                    f"{lowest.factor:.3g} x the trace's load ({1 - share.level:.1%} may), as many as at higher ones; "
                    "relax it or shorten the prompts"
                )
        return ""

    def _within(self, factor: float) -> float | None:
        return factor if LOWEST <= factor <= HIGHEST else None


def _bracket(met: Sequence[float], failed: Sequence[float]) -> tuple[float, float]:
    """The loads between which the border lies; they may have changed places where runs disagree."""
    low, high = max(met), min(failed)
    return (low, high) if low < high else (min(failed), max(met))


def probit(points: Sequence[Point], name: str, confidence: float = 0.95) -> Fit | None:
    """Weighted maximum likelihood; None where the shares do not fall.

    The interval is Fieller's, for the ratio that the capacity is: scaled by what runs scatter more than independent
    requests would (Pearson's chi-square, or the correlation inside the runs, whichever is larger), with Student's law
    for the points that there are. Ends are infinite where the slope is not certain.
    """
    x = np.log([point.factor for point in points])
    met = np.asarray([point.shares[name].met for point in points])
    n = np.asarray([point.shares[name].n for point in points])
    if len(points) < 2 or np.ptp(x) == 0:
        return None
    border = NORMAL.inv_cdf(points[0].shares[name].level)
    centre = float(x.mean())
    height, slope, covariance = _maximum(x - centre, met, n)
    if slope >= -1e-6:
        return None
    expected = _phi(height + slope * (x - centre))
    variance = np.maximum(n * expected * (1 - expected), 0.25)  # a share next to 1 must not scatter infinitely
    degrees = max(len(points) - 2, 1)
    pearson = float(((met - n * expected) ** 2 / variance).sum()) / degrees
    effects = np.asarray([point.design_effect for point in points])
    scatter = max(1.0, pearson, float((variance * effects).sum() / variance.sum()))  # of the points that decide
    reach = scatter * t_quantile((1 + confidence) / 2, max(degrees, 2)) ** 2
    low, high = _fieller(height - border, slope, covariance, reach)
    at = (border - height) / slope
    return Fit(height - slope * centre, slope, Interval(_exp(centre + at), _exp(centre + low), _exp(centre + high)))


def _fieller(height: float, slope: float, covariance: Floats, reach: float) -> tuple[float, float]:
    """All u with (height + slope u)^2 <= reach Var(height + slope u)."""
    a = slope**2 - reach * covariance[1, 1]
    b = 2 * (height * slope - reach * covariance[0, 1])
    c = height**2 - reach * covariance[0, 0]
    if a <= 0:
        return -math.inf, math.inf
    root = math.sqrt(max(b * b - 4 * a * c, 0.0))
    return (-b - root) / (2 * a), (-b + root) / (2 * a)


def _maximum(x: Floats, met: Floats, n: Floats) -> tuple[float, float, Floats]:
    """Intercept, slope and their covariance; Newton's method with expected information (Fisher scoring)."""
    design = np.stack([np.ones_like(x), x], axis=1)
    share = float(np.clip(met.sum() / n.sum(), 1e-4, 1 - 1e-4))
    beta = np.asarray([NORMAL.inv_cdf(share), -1.0])
    information = np.eye(2)
    for _ in range(100):
        z = design @ beta
        p = np.clip(_phi(z), 1e-9, 1 - 1e-9)
        density = np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
        weights = n * density**2 / (p * (1 - p))
        gradient = design.T @ (density * (met - n * p) / (p * (1 - p)))
        information = (design * weights[:, None]).T @ design + np.diag([1e-9, 1e-6])  # shares of 1 and 0 alone: no end
        step = np.linalg.solve(information, gradient)
        size = float(np.abs(step).max())
        beta = beta + step * min(1.0, 2.0 / max(size, 1e-12))
        if size < 1e-9:
            break
    return float(beta[0]), float(beta[1]), np.asarray(np.linalg.inv(information), np.float64)


def _phi(z: Floats) -> Floats:
    return np.asarray([NORMAL.cdf(float(value)) for value in z])


def _exp(value: float) -> float:
    return 0.0 if value == -math.inf else math.inf if value == math.inf else math.exp(value)


def isotonic_border(points: Sequence[Point], name: str) -> float | None:
    """Where shares, made monotone by pooling neighbours, cross the level; between loads in proportion of logarithms."""
    ordered = sorted((point for point in points if name in point.shares), key=lambda point: point.factor)
    blocks: list[tuple[float, float, list[float]]] = []  # met, n, logs of the loads
    for point in ordered:
        share = point.shares[name]
        block = (share.met, share.n, [math.log(point.factor)])
        while blocks and blocks[-1][0] / blocks[-1][1] < block[0] / block[1]:
            met, n, at = blocks.pop()
            block = (met + block[0], n + block[1], at + block[2])
        blocks.append(block)
    level = ordered[0].shares[name].level if ordered else 0.0
    for (met, n, at), (met_after, n_after, at_after) in pairwise(blocks):
        before, after = met / n, met_after / n_after
        if before >= level > after:
            part = (before - level) / (before - after)
            return math.exp(at[-1] + part * (at_after[0] - at[-1]))
    return None


def capacity_document(capacity: Capacity, base_rate: float) -> dict[str, Any]:
    """For JSON; loads as multipliers of the trace and as requests a second."""
    found = capacity.interval

    def interval(scale: float) -> dict[str, Any] | None:
        if found is None:
            return None
        high = None if math.isinf(found.high) else found.high * scale
        return {"estimate": found.estimate * scale, "ci95": [found.low * scale, high]}

    return {
        "factor": interval(1.0),
        "rate_rps": interval(base_rate),
        "binding": capacity.binding,
        "isotonic_factor": capacity.isotonic,
        "reason": capacity.reason,
        "points": [
            {
                "factor": point.factor,
                "rate_rps": point.rate,
                "attainment": point.attainment,
                "met": point.is_met,
                "saturated": point.is_saturated,
                "design_effect": point.design_effect,
                "shares": {name: share.met / share.n for name, share in point.shares.items()},
                "n": max((share.n for share in point.shares.values()), default=0),
            }
            for point in capacity.points
        ],
    }
