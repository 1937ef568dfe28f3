"""What certifies: fresh runs on held-out traffic say whether the SLA holds, and whether the gain over the default does.

At one load, just below the finalist's capacity, default and finalist run in pairs with the same arrivals
(`proof.py`). The SLA holds if for every term the exact upper bound on misses (Clopper-Pearson, Bonferroni over terms,
effective counts) stays below what the term allows. The gain is the ratio of capacities: the distance of the two shares
on the probit scale over its slope, one figure a pair, Student's interval on their logarithms. Both sides run at the
same load, so that an estimate of a capacity that was lucky cannot look like a gain. Holm over the finalists.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from setpoint.tune.search.space import Setting
from setpoint.tune.search.trial import Observation, Share, normal_share
from setpoint.tune.statistics import NORMAL, Interval, beta_cdf, holm, miss_rate_bound, paired_gain, requests_needed

BELOW = 0.9  # of the highest load that held: where a certificate can be had
LEAST_GAIN = 0.02
MOST_LOST = 1  # of the runs
ONE_SIDED = 0.025
LEAST_SLOPE, MOST_SLOPE, USUAL_SLOPE = 2.0, 20.0, 4.0  # of the probit of the share on the logarithm of the load
Verdict = Literal["certified", "default", "holds", "not met", "invalid", "insufficient"]


@dataclass(frozen=True)
class TermCertificate:
    term: str
    missed: float
    n: float
    effective: float
    bound: float  # on the share of misses
    allowed: float

    @property
    def holds(self) -> bool:
        return self.bound <= self.allowed

    @property
    def looks_met(self) -> bool:
        return self.missed <= self.allowed * self.n


@dataclass(frozen=True)
class Certificate:
    """Of one setting at one load. `gain` over the default, None for the default itself."""

    setting: Setting
    load: float
    rate_rps: float
    terms: tuple[TermCertificate, ...]
    runs: int
    gain: Interval | None = None
    p_value: float = 1.0  # of no gain beyond the threshold, adjusted for the number of finalists
    attainment: float = 0.0
    invalid: str = ""
    noise: float = 0.0  # between equal runs

    @property
    def holds(self) -> bool:
        return not self.invalid and bool(self.terms) and all(term.holds for term in self.terms)

    @property
    def is_gain(self) -> bool:
        return self.gain is not None and self.p_value <= ONE_SIDED and self.gain.estimate > self.noise


@dataclass(frozen=True)
class Decision:
    verdict: Verdict
    chosen: Certificate | None
    why: str


def certificate(
    setting: Setting,
    load: float,
    seen: Sequence[Observation],
    default: Sequence[Observation] = (),
    *,
    slope: float,
    noise: float = 0.0,
    confidence: float = 0.95,
) -> Certificate:
    """From runs of fresh seeds; `default[i]` is the other half of the pair of `seen[i]`.

    One run may be lost to others' work on the machine, which says nothing of the setting.
    """
    good = [one for one in seen if one.counts]
    lost = [one for one in seen if not one.counts]
    if len(lost) > MOST_LOST or any(one.state == "failed" for one in lost) or not good:
        details = next((one.detail for one in lost), "no run")
        return Certificate(setting, load, 0.0, (), len(seen), invalid=details[:300])
    names = list(good[0].shares)
    terms = tuple(_term(name, [one.shares[name] for one in good], confidence, len(names)) for name in names)
    pairs = [(one, other) for one, other in zip(seen, default, strict=False) if one.counts and other.counts]
    gain, p_value = None, 1.0
    if len(pairs) >= 2:
        ratios = [math.exp(log_capacity_ratio(one, other, slope)) for one, other in pairs]
        gain = paired_gain([1.0] * len(ratios), ratios)
        p_value = _p_value([math.log(ratio) for ratio in ratios], math.log1p(LEAST_GAIN))
    rate = sum(one.rate_rps for one in good) / len(good)
    attainment = sum(one.attainment * one.requests for one in good) / sum(one.requests for one in good)
    return Certificate(setting, load, rate, terms, len(good), gain, p_value, attainment, noise=noise)


def log_capacity_ratio(one: Observation, other: Observation, slope: float) -> float:
    """How much more load the first carries, by the term that binds it, from runs at the same load."""

    def place(seen: Observation) -> float:
        return min(_distance(share) for share in seen.shares.values())

    return float((place(one) - place(other)) / slope)


def _distance(share: Share) -> float:
    return float(normal_share(share) - NORMAL.inv_cdf(share.level))


def probit_slope(points: Sequence[tuple[float, Observation]]) -> float:
    """Fall of the binding share per unit of the logarithm of the load, by least squares; bounded.

    `points` are (load, run); a steeper slope promises smaller gains.
    """
    usable = [(math.log(load), seen.margin[1]) for load, seen in points if seen.state == "ok"]
    usable = [(x, y) for x, y in usable if math.isfinite(y)]
    if len({x for x, _ in usable}) < 3:
        return USUAL_SLOPE
    mean_x, mean_y = (sum(column) / len(usable) for column in zip(*usable, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in usable)
    fall = -sum((x - mean_x) * (y - mean_y) for x, y in usable) / spread
    return float(min(max(fall, LEAST_SLOPE), MOST_SLOPE))


def _term(name: str, shares: Sequence[Share], confidence: float, num_terms: int) -> TermCertificate:
    n, met = sum(share.n for share in shares), sum(share.met for share in shares)
    effective = sum(share.effective for share in shares)
    each = 1 - (1 - confidence) / num_terms
    missed = n - met
    bound = miss_rate_bound(missed * effective / n, effective, each)
    return TermCertificate(name, missed, n, effective, bound, 1 - shares[0].level)


def _p_value(logs: Sequence[float], threshold: float) -> float:
    """One-sided Student test of a mean above the threshold."""
    n = len(logs)
    mean = sum(logs) / n
    variance = sum((value - mean) ** 2 for value in logs) / (n - 1)
    if variance <= 0:
        return 0.0 if mean > threshold else 1.0
    t = (mean - threshold) / math.sqrt(variance / n)
    degrees = n - 1
    tail = beta_cdf(degrees / (degrees + t * t), degrees / 2, 0.5) / 2
    return tail if t > 0 else 1 - tail


def adjusted(found: Sequence[Certificate]) -> list[Certificate]:
    """Corrected for so many finalists."""
    corrected = holm([one.p_value for one in found])
    return [replace(one, p_value=p_value) for one, p_value in zip(found, corrected, strict=True)]


def decide(finalists: Sequence[Certificate], default: Certificate | None) -> Decision:
    """The finalist that holds the SLA and gains the most; else the default, if it holds it; else who does."""
    winners = [one for one in adjusted(finalists) if one.holds and one.is_gain]
    if winners:
        best = max(winners, key=lambda one: one.gain.estimate if one.gain is not None else 0.0)
        return Decision("certified", best, "holds the SLA on held-out traffic; the gain is beyond the noise")
    if default is not None and default.holds:
        return Decision("default", default, "the default is best: no setting gained more than the noise")
    holding = [one for one in finalists if one.holds]
    if holding:  # no gain is claimed, but an SLA that is held is worth more than a tie
        best = max(holding, key=lambda one: one.rate_rps)
        return Decision("holds", best, "holds the SLA on held-out traffic, which the default was not shown to do")
    runs = [one for one in (default, *finalists) if one is not None]
    if not runs or all(one.invalid for one in runs):
        return Decision("invalid", None, runs[0].invalid if runs else "nothing was run")
    one = next(run for run in runs if not run.invalid)
    worst = max(one.terms, key=lambda term: term.bound / term.allowed)
    if worst.looks_met:
        level = 1 - worst.allowed
        more = _more_needed(worst, level)
        return Decision(
            "insufficient",
            None,
            f"{worst.term} looks met ({worst.missed:.0f} misses of {worst.n:.0f}) but is not shown: "
            f"about {more} more requests are needed; raise --budget",
        )
    missed = worst.missed / worst.n
    return Decision("not met", None, f"{worst.term}: {missed:.1%} of requests miss it, {worst.allowed:.1%} may")


def _more_needed(term: TermCertificate, level: float) -> int:
    share = term.missed / term.n
    for misses in (1, 2, 5, 10, 20, 50, 100, 200):
        needed = requests_needed(level, misses)
        if misses / needed >= share:
            return max(1, int(needed * term.n / term.effective - term.n))
    return int(10 * term.n)
