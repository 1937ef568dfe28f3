"""A trial of `setpoint tune`: what is asked for, and what one run of it says.

The score of a request is how far it stays below its SLA, as the logarithm of bound over latency for its worst term,
clipped to a factor of e^1.5 either way: a mean of these has far less variance than a percentile, and a request that
fails costs a bounded amount. A run gives the means of eight stretches of time, which pairs of runs are compared by.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from setpoint.errors import ConfigError
from setpoint.tune.measure import Run
from setpoint.tune.search.space import Setting
from setpoint.tune.sla import METRICS, Sla, Term, Timing
from setpoint.tune.statistics import NORMAL, effective_n

BATCHES = 8
CLIP = 1.5
QUANTILES = tuple(range(0, 101, 5))
MOST_UNFINISHED = 0.05  # of the arrivals, when patience ends: the queue grew

Part = Literal["tune", "holdout", "longer", "burstier"]  # the last two: held out, and changed
State = Literal["ok", "saturated", "invalid", "failed"]


@dataclass(frozen=True, slots=True)
class Ask:
    """One run: of a setting, at a load (times the trace's own), on a part of the trace, for so many seconds."""

    stage: str
    setting: Setting
    load: float
    part: Part
    seed: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Share:
    """Of the requests that met a term; `effective` is how many of them are independent."""

    met: float
    n: float
    effective: float
    level: float


@dataclass(frozen=True)
class Observation:
    """`failed`: it could not be run, which says the setting is no good; `invalid`: the run says nothing."""

    state: State
    cost_s: float
    detail: str = ""
    requests: int = 0
    rate_rps: float = 0.0
    attainment: float = 0.0
    token_s: float = 0.0  # time of answered requests for each of their tokens
    scores: tuple[float, ...] = ()
    shares: Mapping[str, Share] = field(default_factory=dict)
    values: Mapping[str, float | None] = field(default_factory=dict)  # statistic by term; None = infinite
    ttft_ms: tuple[float, ...] = ()  # at QUANTILES, of answered requests
    tpot_ms: tuple[float, ...] = ()

    @property
    def counts(self) -> bool:
        return self.state in ("ok", "saturated")

    @property
    def is_met(self) -> bool:
        return self.state == "ok" and all(share.met >= share.level * share.n for share in self.shares.values())

    @property
    def score(self) -> float:
        return sum(self.scores) / len(self.scores) if self.scores else -CLIP

    @property
    def margin(self) -> tuple[str, float]:
        """The binding term, and its distance from the level in standard normal units (positive: met)."""
        if not self.shares:
            return "", -math.inf
        distances = {name: normal_share(share) - NORMAL.inv_cdf(share.level) for name, share in self.shares.items()}
        name = min(distances, key=lambda found: distances[found])
        return name, distances[name]


def normal_share(share: Share) -> float:
    """The share on the probit scale, half a request away from 0 and 1."""
    return NORMAL.inv_cdf((share.met + 0.5) / (share.n + 1.0))


def check_sla(sla: Sla) -> None:
    """Raises ConfigError for a term that no share of requests certifies."""
    for term in sla.terms:
        if term.level is None or not 0 < term.level < 1:
            raise ConfigError(f"tune certifies percentiles of requests and error rates, not {term}; use p50 to p99")


def observe(run: Run, sla: Sla, cost_s: float) -> Observation:
    """What a run says. An invalid one says nothing but why."""
    if not run.is_valid:
        reasons = [f"{v.tripwire}: {v.detail}" for v in run.verdicts if v.outcome == "invalid"]
        return Observation("invalid", cost_s, "; ".join(reasons) or "cut short", len(run.arrivals))
    timings = run.timings
    if not timings:
        return Observation("invalid", cost_s, "no request arrived")
    shares = {str(term): _share(term, timings) for term in sla.terms}
    values = {str(term): term.value(timings) for term in sla.terms}
    answered = [timing for timing in timings if timing.ok]
    tokens = sum(timing.output_tokens for timing in answered)
    lost = sum(log.status == "timeout" for log in run.arrivals) / len(timings)
    saturated = run.is_saturated or lost > MOST_UNFINISHED
    tpots = [timing.tpot_s for timing in answered if timing.tpot_s is not None]
    return Observation(
        "saturated" if saturated else "ok",
        cost_s,
        f"{lost:.0%} of the requests were not answered in time" if lost > MOST_UNFINISHED else "",
        requests=len(timings),
        rate_rps=len(timings) / max(run.window.seconds, 1e-9),
        attainment=sla.attainment(timings),
        token_s=sum(timing.e2e_s for timing in answered) / max(tokens, 1),
        scores=_scores(run, sla),
        shares=shares,
        values={name: None if math.isinf(value) else value for name, value in values.items()},
        ttft_ms=_quantiles([timing.ttft_s for timing in answered]),
        tpot_ms=_quantiles(tpots),
    )


def pressure(timing: Timing, sla: Sla) -> float:
    """The logarithm of bound over latency for the term that is worst off, clipped."""
    if not timing.ok:
        return -CLIP
    found = CLIP
    for metric in METRICS:
        bound = sla.tightest(metric)
        if bound is None:
            continue
        value = {"ttft": timing.ttft_s, "tpot": timing.tpot_s, "stall": timing.stall_s, "e2e": timing.e2e_s}.get(metric)
        if value is not None and value > 0:
            found = min(found, math.log(bound / value))
    return max(-CLIP, found)


def _scores(run: Run, sla: Sla) -> tuple[float, ...]:
    logs = sorted(run.arrivals, key=lambda log: log.index)  # the same requests in each run of a pair
    found = np.asarray([pressure(log.timing, sla) for log in logs])
    parts = np.array_split(found, min(BATCHES, len(found)))
    return tuple(float(part.mean()) for part in parts)


def _share(term: Term, timings: Sequence[Timing]) -> Share:
    met = [float(timing.ok and term.met_by(timing)) for timing in timings]
    assert term.level is not None
    return Share(sum(met), len(met), effective_n(met), term.level)


def _quantiles(seconds: Sequence[float]) -> tuple[float, ...]:
    if not seconds:
        return ()
    return tuple(round(float(value) * 1e3, 3) for value in np.percentile(seconds, QUANTILES))


def document(ask: Ask, seen: Observation) -> dict[str, Any]:
    """One line of a study."""
    from dataclasses import asdict

    return {"ask": asdict(ask), "seen": asdict(seen)}
