"""A run as lines for a terminal and as one JSON document; the page for a browser is `page.py`."""

from __future__ import annotations

import math
from typing import Any

from setpoint.tune.measure import Run
from setpoint.tune.metrics import FIGURES, Summary, Targets, TermResult, class_names, summarize, term_results
from setpoint.tune.replay.capacity import Capacity, capacity_document
from setpoint.tune.statistics import clopper_pearson, effective_n

_MARKS = {"ok": "ok", "unknown": "?", "saturated": "SATURATED", "invalid": "INVALID"}


def run_document(run: Run, targets: Targets) -> dict[str, Any]:
    """Figures, judgements and provenance. Latencies in seconds; what is infinite is null."""
    return {
        "valid": run.is_valid,
        "saturated": run.is_saturated,
        "cut_short": run.is_cut_short,
        "met": is_met(run, targets),
        "window_s": run.window.seconds,
        "requests": run.num_requests,
        "summary": summarize(run, targets).document,
        "classes": {name: summarize(run, targets, name).document for name in class_names(run)},
        "attainment_ci95": attainment_interval(run, targets),
        "terms": [_term_document(result) for result in term_results(run, targets)],
        "joint_floor": None if targets.everyone is None else targets.everyone.joint_floor,
        "preemptions": run.preemptions,
        "verdicts": [
            {"tripwire": verdict.tripwire, "outcome": verdict.outcome, "detail": verdict.detail}
            for verdict in run.verdicts
        ],
        "notes": list(run.notes),
        "provenance": run.provenance,
    }


def is_met(run: Run, targets: Targets) -> bool | None:
    """Whether every SLA holds; None if there is none, or the run does not count."""
    results = term_results(run, targets)
    if not results or not run.is_valid:
        return None
    return all(result.met for result in results) and not run.is_saturated


def attainment_interval(run: Run, targets: Targets) -> list[float] | None:
    """Exact bounds on the share of good requests, for as many requests as are independent."""
    judged = [(targets.of(log), log.timing) for log in run.arrivals]
    good = [float(sla.is_good(timing)) for sla, timing in judged if sla is not None]
    if not good:
        return None
    n = effective_n(good)
    misses = clopper_pearson((1 - sum(good) / len(good)) * n, n)
    return [1 - misses.high, 1 - misses.low]


def run_lines(run: Run, targets: Targets) -> list[str]:
    """The table of a run, its SLA terms and what the tripwires say."""
    lines = _table(summarize(run, targets), "")
    for name in class_names(run):
        lines += ["", *_table(summarize(run, targets, name), f"class {name or '(none)'}: ")]
    results = term_results(run, targets)
    if results:
        lines.append("")
    for result in results:
        value = "missed" if math.isinf(result.value) else _shown(result)
        who = f"{result.class_name}: " if result.class_name else ""
        lines.append(f"{'met' if result.met else 'NOT MET':<8} {who}{result.term}: {value}")
    if targets.everyone is not None and results and targets.everyone.joint_floor is not None:
        lines.append(f"         all terms at once are sure for {targets.everyone.joint_floor:.1%} of requests only")
    lines.append("")
    for verdict in run.verdicts:
        lines.append(f"{_MARKS[verdict.outcome]:<9} {verdict.tripwire}: {verdict.detail}")
    lines += [f"note: {note}" for note in run.notes]
    if run.is_cut_short:
        lines.append("The run was cut short: these figures are of its first part and are not compared with others.")
    elif not run.is_valid:
        lines.append("This run is INVALID: it says nothing about the server.")
    return lines


def _table(summary: Summary, title: str) -> list[str]:
    statuses = ", ".join(f"{count} {status}" for status, count in sorted(summary.statuses.items()))
    lines = [
        f"{title}{summary.arrivals} requests ({statuses}), {summary.request_rate:.2f}/s; "
        f"{summary.in_flight_mean:.1f} in flight, at most {summary.in_flight_max}",
        f"prompt {summary.prompt_token_rate:.0f} tok/s ({summary.cached_share:.0%} cached), "
        f"output {summary.output_token_rate:.0f} tok/s",
    ]
    if summary.attainment is not None and summary.goodput is not None:
        deadlines = (
            "" if summary.deadline_attainment is None else f"; {summary.deadline_attainment:.1%} of tokens in time"
        )
        lines.append(f"goodput {summary.goodput:.2f}/s, attainment {summary.attainment:.1%} of arrivals{deadlines}")
    if summary.latencies:
        lines.append(f"{'ms':<8}" + "".join(f"{name:>10}" for name in FIGURES) + f"{'n':>9}")
    for metric, figures in summary.latencies.items():
        row = "".join(f"{figures[name] * 1e3:>10.2f}" for name in FIGURES)
        lines.append(f"{metric:<8}{row}{summary.samples[metric]:>9}")
    return lines


def capacity_lines(capacity: Capacity, base_rate: float) -> list[str]:
    lines = [f"{'load':>8}{'req/s':>9}{'requests':>10}{'attainment':>12}"]
    for point in sorted(capacity.points, key=lambda point: point.factor):
        said = "saturated" if point.is_saturated else "met" if point.is_met else "not met"
        n = max((share.n for share in point.shares.values()), default=0)
        lines.append(f"{point.factor:>8.3f}{point.rate:>9.2f}{n:>10.0f}{point.attainment:>12.1%}  {said}")
    found = capacity.interval
    if found is None:
        return [*lines, f"no capacity: {capacity.reason}"]
    high = "?" if math.isinf(found.high) else f"{found.high * base_rate:.2f}"
    lines.append(
        f"capacity {found.estimate * base_rate:.2f} req/s, 95 % interval {found.low * base_rate:.2f} to {high} "
        f"({found.estimate:.3f} times the trace)"
    )
    if capacity.binding:
        lines.append(f"what binds: {capacity.binding}")
    return [*lines, capacity.reason] if capacity.reason else lines


def capacity_report(capacity: Capacity, base_rate: float, targets: Targets, **more: Any) -> dict[str, Any]:
    slas = {name or "all": str(sla) for name, sla in (("", targets.everyone), *targets.classes.items()) if sla}
    return {"capacity": capacity_document(capacity, base_rate), "slo": slas, **more}


def _term_document(result: TermResult) -> dict[str, Any]:
    value = None if math.isinf(result.value) else result.value
    return {
        "term": result.term,
        "class": result.class_name,
        "value": value,
        "bound": result.bound,
        "met": result.met,
    }


def _shown(result: TermResult) -> str:
    if result.term.startswith("error"):
        return f"{result.value:.2%}"
    return f"{result.value * 1e3:.2f} ms"
