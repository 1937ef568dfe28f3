"""Targets of requests, and the language of agreements over all of them: `ttft.p95<200ms,tpot.p95<30ms`.

An agreement's terms are read here, whoever judges them (`setpoint.tune.sla` does over measured runs). An `Slo` is what
one request shall meet: the bounds of such terms, without their statistics.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from setpoint.engine.envelope import EnvelopeRow, Traffic
from setpoint.errors import ConfigError

METRICS = ("ttft", "tpot", "itl", "stall", "e2e")
PERCENTILES = {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0}
STATISTICS = (*PERCENTILES, "mean", "max")
MAX_TERMS = 16
LEAST_S, MOST_S = 1e-4, 3600.0  # of a target that is held
_HELD = ("ttft", "tpot")
_UNITS = {"ms": 1e-3, "s": 1.0, "us": 1e-6}
_TERM = re.compile(r"([a-z0-9]+)\.([a-z0-9]+)\s*<\s*([0-9]+(?:\.[0-9]+)?)\s*(ms|us|s|%)")


def read_terms(text: str) -> list[tuple[str, str, float]]:
    """(metric, statistic, bound in seconds or as a share) of each term. Raises ConfigError naming the term."""
    parts = [part.strip() for part in text.split(",")]
    if not text.strip() or len(parts) > MAX_TERMS:
        raise ConfigError(f"an SLA has 1 to {MAX_TERMS} terms, such as ttft.p95<200ms,tpot.p95<30ms")
    terms = [_read_term(part) for part in parts]
    names = [(metric, statistic) for metric, statistic, _ in terms]
    if len(set(names)) != len(names):
        raise ConfigError(f"the SLA {text[:200]!r} bounds the same statistic twice")
    return terms


def _read_term(text: str) -> tuple[str, str, float]:
    found = _TERM.fullmatch(text)
    if found is None:
        raise ConfigError(f"the SLA term {text[:64]!r} is not of the form metric.statistic<value unit")
    metric, statistic, number, unit = found.groups()
    if metric == "error":
        if statistic != "rate" or unit != "%":
            raise ConfigError(f"the SLA term {text[:64]!r}: errors are bounded as error.rate<0.1%")
        return metric, statistic, float(number) / 100
    if metric not in METRICS:
        raise ConfigError(f"the SLA term {text[:64]!r}: choose one of {', '.join(METRICS)}, error")
    if statistic not in STATISTICS:
        raise ConfigError(f"the SLA term {text[:64]!r}: choose one of {', '.join(STATISTICS)}")
    if unit == "%":
        raise ConfigError(f"the SLA term {text[:64]!r} needs a time: ms or s")
    bound = float(number) * _UNITS[unit]
    if bound <= 0:
        raise ConfigError(f"the SLA term {text[:64]!r}: the bound must be above 0")
    return metric, statistic, bound


@dataclass(frozen=True, slots=True)
class Slo:
    """What one request shall meet, in seconds; None: no target."""

    ttft_s: float | None = None
    tpot_s: float | None = None

    def __str__(self) -> str:
        bounds = (("ttft", self.ttft_s), ("tpot", self.tpot_s))
        return ",".join(f"{name}.max<{seconds * 1e3:g}ms" for name, seconds in bounds if seconds is not None)

    def __post_init__(self) -> None:
        if self.ttft_s is None and self.tpot_s is None:
            raise ConfigError("an SLO bounds ttft, tpot or both")
        for name, value in (("ttft", self.ttft_s), ("tpot", self.tpot_s)):
            if value is not None and not LEAST_S <= value <= MOST_S:
                raise ConfigError(f"the SLO's {name} must be in {LEAST_S * 1e3:g}..{MOST_S * 1e3:g} ms")


@dataclass(frozen=True, slots=True)
class HeldSla:
    """What `--slo` asks the engine to hold: every request's target, and the share of requests that shall meet each.

    `rows` are settings that a recipe certified for it, by ascending load, and `traffic` is what it was certified on.
    """

    slo: Slo
    ttft_level: float = 0.95
    tpot_level: float = 0.95
    rows: tuple[EnvelopeRow, ...] = ()
    traffic: Traffic | None = None

    @property
    def level(self) -> float:
        """Share of requests that meet all of their targets at least, where each share is just met."""
        missed = [(self.slo.ttft_s, 1 - self.ttft_level), (self.slo.tpot_s, 1 - self.tpot_level)]
        return max(0.0, 1 - sum(share for bound, share in missed if bound is not None))

    @classmethod
    def parse(cls, text: str) -> HeldSla:
        """Raises ConfigError for what is not a term, or cannot be held step by step."""
        found: dict[str, tuple[float, float]] = {}
        for metric, statistic, bound in read_terms(text):
            if metric not in _HELD:
                raise ConfigError(f"{metric} cannot be held while serving; give targets of {' and '.join(_HELD)} only")
            if statistic == "mean":
                raise ConfigError(f"{metric}.mean cannot be held; give a percentile, such as {metric}.p95")
            if metric in found:
                raise ConfigError(f"{metric} is bounded twice; what is held is one target for each request")
            found[metric] = (bound, 1.0 if statistic == "max" else PERCENTILES[statistic] / 100)
        ttft_s, ttft_level = found.get("ttft", (None, 0.95))
        tpot_s, tpot_level = found.get("tpot", (None, 0.95))
        return cls(Slo(ttft_s, tpot_s), ttft_level, tpot_level)
