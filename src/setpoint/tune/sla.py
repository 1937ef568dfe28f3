"""Service level agreements: `ttft.p95<200ms,tpot.p95<30ms`, and whether measured requests keep one.

A term holds when the statistic over *all* arrivals is below its bound: a request that was refused, failed or came too
late for the client counts as infinitely slow. `error.rate` is the share of arrivals that gave no whole answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from setpoint.engine.slo import METRICS, PERCENTILES, STATISTICS, read_terms

__all__ = ["METRICS", "PERCENTILES", "STATISTICS", "Sla", "Term", "Timing"]


@dataclass(frozen=True, slots=True)
class Timing:
    """One request as its client saw it; times in seconds since it should have been sent."""

    ttft_s: float
    e2e_s: float
    output_tokens: int
    gaps_s: tuple[float, ...] = ()  # between deliveries; tokens that come together share one
    ok: bool = True  # a whole answer

    @property
    def tpot_s(self) -> float | None:
        """Undefined for an answer of one token."""
        return (self.e2e_s - self.ttft_s) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    @property
    def stall_s(self) -> float:
        """The longest gap."""
        return max(self.gaps_s, default=0.0)


@dataclass(frozen=True, slots=True)
class Term:
    metric: str
    statistic: str
    bound: float  # seconds, or a share for error.rate

    def __str__(self) -> str:
        if self.metric == "error":
            return f"error.rate<{self.bound * 100:g}%"
        return f"{self.metric}.{self.statistic}<{self.bound * 1e3:g}ms"

    @property
    def level(self) -> float | None:
        """The share of requests that must meet the bound; None for means, and for gaps of all tokens."""
        if self.metric == "error":
            return 1.0 - self.bound
        if self.statistic == "max":
            return 1.0
        if self.metric == "itl" or self.statistic not in PERCENTILES:
            return None
        return PERCENTILES[self.statistic] / 100

    def value(self, timings: Sequence[Timing]) -> float:
        """The statistic; inf where misses reach into it."""
        if self.metric == "error":
            return sum(not timing.ok for timing in timings) / len(timings)
        values = np.asarray([value for timing in timings for value in _values(timing, self.metric)], np.float64)
        if not len(values):
            return 0.0
        if self.statistic == "mean":
            return float(values.mean())
        if self.statistic == "max":
            return float(values.max())
        # The smallest value that the share of arrivals reaches: P(X <= value) >= p, without interpolation to inf.
        return float(np.sort(values)[math.ceil(PERCENTILES[self.statistic] / 100 * len(values)) - 1])

    def met_by(self, timing: Timing) -> bool:
        """Whether one request meets this bound by itself."""
        if self.metric == "error":
            return timing.ok
        return all(value < self.bound for value in _values(timing, self.metric))


@dataclass(frozen=True, slots=True)
class Sla:
    terms: tuple[Term, ...]

    @classmethod
    def parse(cls, text: str) -> Sla:
        """Raises ConfigError naming the term."""
        return cls(tuple(Term(*term) for term in read_terms(text)))

    def __str__(self) -> str:
        return ",".join(map(str, self.terms))

    @property
    def joint_floor(self) -> float | None:
        """The least share of requests that meets all terms when each term holds by itself (union bound)."""
        levels = [term.level for term in self.terms]
        if any(level is None for level in levels):
            return None
        return max(0.0, 1.0 - sum(1.0 - level for level in levels if level is not None))

    def tightest(self, metric: str) -> float | None:
        """The smallest bound on any statistic of this metric, in seconds."""
        return min((term.bound for term in self.terms if term.metric == metric), default=None)

    def is_good(self, timing: Timing) -> bool:
        """A whole answer that meets every bound by itself."""
        return timing.ok and all(term.met_by(timing) for term in self.terms)

    def attainment(self, timings: Sequence[Timing]) -> float:
        """Good requests over arrivals."""
        return sum(map(self.is_good, timings)) / len(timings)

    def holds(self, timings: Sequence[Timing]) -> bool:
        """Whether every term's statistic is below its bound."""
        return all(term.value(timings) < term.bound for term in self.terms)


def _values(timing: Timing, metric: str) -> Sequence[float]:
    if metric == "itl":
        return timing.gaps_s if timing.ok else (math.inf,)
    if not timing.ok:
        return (math.inf,)
    if metric == "tpot":
        return () if timing.tpot_s is None else (timing.tpot_s,)
    return ({"ttft": timing.ttft_s, "stall": timing.stall_s, "e2e": timing.e2e_s}[metric],)
