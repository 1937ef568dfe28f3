"""The figures of a run: latencies, goodput, attainment; all of it computed from the logs and nothing else.

Latency tables are over the requests that were answered, with their number; whatever judges (attainment, goodput, the
statistics of an SLA) is over all arrivals, where a miss is infinitely slow. Percentiles of TPOT weight requests, those
of ITL weight tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from setpoint.tune.measure import RequestLog, Run, Window, in_flight
from setpoint.tune.sla import METRICS, PERCENTILES, Sla, Timing

FIGURES = (*PERCENTILES, "mean", "max")


@dataclass(frozen=True, slots=True)
class Targets:
    """Whose SLA is whose: a request's own, that of its class, or the one for all."""

    everyone: Sla | None = None
    classes: Mapping[str, Sla] = field(default_factory=dict)

    @classmethod
    def parse(cls, texts: Sequence[str]) -> Targets:
        """`SLA` for all requests, `CLASS=SLA` for a class. Raises ConfigError naming the term."""
        everyone, classes = None, {}
        for text in texts:
            name, separator, terms = text.partition("=")
            if separator:
                classes[name.strip()] = Sla.parse(terms)
            else:
                everyone = Sla.parse(text)
        return cls(everyone, classes)

    def of(self, log: RequestLog) -> Sla | None:
        if log.slo is not None:
            return Sla.parse(log.slo)
        return self.classes.get(log.class_name, self.everyone)

    @property
    def all(self) -> tuple[Sla, ...]:
        return (*((self.everyone,) if self.everyone is not None else ()), *self.classes.values())


@dataclass(frozen=True, slots=True)
class TermResult:
    term: str
    value: float  # seconds, or a share; inf where misses reach into it
    bound: float
    met: bool
    class_name: str = ""


@dataclass(frozen=True, slots=True)
class Summary:
    """Rates are per second of the window, latencies in seconds. None: no SLA says what is good."""

    arrivals: int
    statuses: dict[str, int]
    latencies: dict[str, dict[str, float]]  # metric -> statistic -> seconds, over answered requests
    samples: dict[str, int]  # metric -> values behind its row
    request_rate: float
    prompt_token_rate: float
    output_token_rate: float
    cached_share: float  # of the prompt tokens
    in_flight_mean: float
    in_flight_max: int
    good: int | None
    goodput: float | None
    attainment: float | None
    deadline_attainment: float | None  # share of tokens that came by their deadline

    @property
    def document(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def summarize(run: Run, targets: Targets | None = None, class_name: str | None = None) -> Summary:
    """Of all arrivals of the window, or of one class."""
    targets = targets or Targets()
    logs = [log for log in run.arrivals if class_name is None or log.class_name == class_name]
    timings = [log.timing for log in logs]
    seconds = max(run.window.seconds, 1e-9)
    judged = [(targets.of(log), timing) for log, timing in zip(logs, timings, strict=True)]
    is_judged = any(sla is not None for sla, _ in judged)
    good = sum((sla is None and timing.ok) or (sla is not None and sla.is_good(timing)) for sla, timing in judged)
    answered = [log for log in logs if log.ok]
    prompt_tokens = sum(log.prompt_tokens for log in answered)
    flying = in_flight(logs, _ticks(run.window)) if logs else [0]
    values = {metric: _values(timings, metric) for metric in METRICS}
    return Summary(
        arrivals=len(logs),
        statuses=dict(Counter(log.status for log in logs)),
        latencies={metric: _figures(found) for metric, found in values.items() if len(found)},
        samples={metric: len(found) for metric, found in values.items()},
        request_rate=len(logs) / seconds,
        prompt_token_rate=prompt_tokens / seconds,
        output_token_rate=sum(log.output_tokens for log in answered) / seconds,
        cached_share=sum(log.cached_tokens for log in answered) / max(prompt_tokens, 1),
        in_flight_mean=float(np.mean(flying)),
        in_flight_max=max(flying),
        good=good if is_judged else None,
        goodput=good / seconds if is_judged else None,
        attainment=good / len(logs) if is_judged and logs else None,
        deadline_attainment=deadline_attainment(logs, targets),
    )


def class_names(run: Run) -> list[str]:
    """Those of the arrivals; empty where there is only one."""
    names = sorted({log.class_name for log in run.arrivals})
    return names if len(names) > 1 else []


def term_results(run: Run, targets: Targets) -> list[TermResult]:
    """Every term of every SLA with its statistic over all arrivals that it is for."""
    found = []
    for class_name, sla in (("", targets.everyone), *targets.classes.items()):
        if sla is None:
            continue
        mine = class_name != ""
        timings = [
            log.timing
            for log in run.arrivals
            if (log.class_name == class_name if mine else log.class_name not in targets.classes)
        ]
        if timings:
            for term in sla.terms:
                value = term.value(timings)
                found.append(TermResult(str(term), value, term.bound, value < term.bound, class_name))
    return found


def deadline_attainment(logs: Sequence[RequestLog], targets: Targets) -> float | None:
    """The share of tokens i with t_i <= t0 + TTFT + (i - 1) TPOT, by the tightest bounds of the SLA.

    Tokens that the trace asks for and that never came missed their deadline: neither dropping requests nor holding
    tokens back pays. None where no SLA bounds both TTFT and TPOT.
    """
    tokens = in_time = 0
    for log in logs:
        sla = targets.of(log)
        ttft, tpot = (None, None) if sla is None else (sla.tightest("ttft"), sla.tightest("tpot"))
        if ttft is None or tpot is None:
            continue
        times = log.token_times if log.ok else []
        deadlines = log.scheduled_s + ttft + tpot * np.arange(len(times))
        in_time += int((np.asarray(times) <= deadlines).sum())
        tokens += max(log.wanted_tokens, len(times), 1)
    return in_time / tokens if tokens else None


def _values(timings: Sequence[Timing], metric: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    answered = [timing for timing in timings if timing.ok]
    match metric:
        case "ttft":
            values = [timing.ttft_s for timing in answered]
        case "tpot":
            values = [timing.tpot_s for timing in answered if timing.tpot_s is not None]
        case "itl":
            values = [gap for timing in answered for gap in timing.gaps_s]
        case "stall":
            values = [timing.stall_s for timing in answered if timing.gaps_s]
        case _:
            values = [timing.e2e_s for timing in answered]
    return np.asarray(values, np.float64)


def _figures(values: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, float]:
    """Percentiles are values that occur: the smallest that the share of requests reaches."""
    levels = np.percentile(values, list(PERCENTILES.values()), method="inverted_cdf")
    figures = dict(zip(PERCENTILES, map(float, levels), strict=True))
    return figures | {"mean": float(values.mean()), "max": float(values.max())}


def _ticks(window: Window, count: int = 400) -> list[float]:
    return [float(tick) for tick in np.linspace(window.begin_s, window.end_s, count)]
