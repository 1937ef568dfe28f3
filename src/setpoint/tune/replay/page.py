"""One self-contained page of a run, or of a search for capacity: no scripts, no network, charts as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from string import Template

import numpy as np

from setpoint.tune.measure import RequestLog, Run, in_flight
from setpoint.tune.metrics import Targets, summarize
from setpoint.tune.replay.capacity import Capacity
from setpoint.tune.replay.report import capacity_lines, is_met, run_lines
from setpoint.tune.svg import Band, Chart, Line, Marks

PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>$title</title><style>
body{font:15px/1.5 system-ui,sans-serif;max-width:980px;margin:2em auto;padding:0 1em;color:#1d2433;background:#fff}
h1{font-size:1.4em}h2{font-size:1.05em;margin:1.6em 0 .3em}
pre{background:#f5f6f8;padding:1em;overflow-x:auto;font-size:13px;line-height:1.45}
.verdict{padding:.7em 1em;border-left:5px solid $colour;background:#f5f6f8;font-weight:600}
figure{margin:0 0 1em;display:inline-block}svg{max-width:100%;height:auto}
footer{color:#667;font-size:13px;margin-top:2em}</style></head><body>
<h1>$title</h1><p class="verdict">$verdict</p>
$body
<footer>$footer</footer></body></html>
""")
GOOD, BAD, QUIET = "#2a7d4f", "#b3372f", "#8a6d1b"
PARTS = 24  # of the window, for attainment over time


def run_page(run: Run, targets: Targets) -> str:
    """The page of one run."""
    charts = [
        _distribution(run, targets, "ttft", "Time to first token"),
        _distribution(run, targets, "tpot", "Time per output token"),
        _attainment(run, targets),
        _flying(run),
        _misses(run, targets),
    ]
    verdict, colour = _verdict(run, targets)
    body = "".join(f"<figure>{chart.svg()}</figure>" for chart in charts)
    return _page(
        f"{run.provenance.get('model', 'A run')}: {run.num_requests} requests", verdict, colour, body, run, targets
    )


def capacity_page(capacity: Capacity, base_rate: float, last: Run, targets: Targets) -> str:
    """The page of a search; `last` is a run of it, for what the server and the trace are."""
    found = capacity.interval
    verdict = (
        f"No capacity: {capacity.reason}"
        if found is None
        else capacity_lines(capacity, base_rate)[-2 if capacity.binding else -1]
    )
    table = escape("\n".join(capacity_lines(capacity, base_rate)))
    body = f"<figure>{_loads(capacity, base_rate).svg()}</figure><pre>{table}</pre><h2>The last run</h2>"
    title = f"{last.provenance.get('model', 'Server')}: capacity"
    return _page(title, verdict, BAD if found is None else GOOD, body, last, targets)


def _page(title: str, verdict: str, colour: str, body: str, run: Run, targets: Targets) -> str:
    table = escape("\n".join(run_lines(run, targets)))
    provenance = "; ".join(f"{name} {value}" for name, value in run.provenance.items())
    return PAGE.substitute(
        title=escape(title),
        verdict=escape(verdict),
        colour=colour,
        body=f"{body}<h2>Figures</h2><pre>{table}</pre>",
        footer=escape(provenance),
    )


def _verdict(run: Run, targets: Targets) -> tuple[str, str]:
    if run.is_cut_short:
        return "The run was cut short.", QUIET
    broken = [verdict for verdict in run.verdicts if verdict.outcome == "invalid"]
    if broken:
        return "Invalid: " + "; ".join(f"{verdict.tripwire} ({verdict.detail})" for verdict in broken), BAD
    if run.is_saturated:
        return "Saturated: at this load the queue grows for as long as the run lasts.", BAD
    attainment = summarize(run, targets).attainment
    if attainment is None:
        return "Valid; no SLA was given to judge it by.", GOOD
    met = is_met(run, targets)
    return f"The SLA is {'met' if met else 'not met'}; {attainment:.1%} of requests are good.", GOOD if met else BAD


def _distribution(run: Run, targets: Targets, metric: str, title: str) -> Chart:
    answered = [timing for timing in run.timings if timing.ok]
    values = [timing.ttft_s if metric == "ttft" else timing.tpot_s for timing in answered]
    ordered = np.sort([value * 1e3 for value in values if value is not None])
    total = len(run.timings) if metric == "ttft" else len(ordered)  # misses keep the curve below 1
    chart = Chart(title, "ms", "share of arrivals" if metric == "ttft" else "share of answers", y_max=1.0, is_log=True)
    if len(ordered):
        shares = np.arange(1, len(ordered) + 1) / max(total, 1)
        chart.lines.append(Line("", list(zip(ordered.tolist(), shares.tolist(), strict=True)), is_step=True))
    for sla in targets.all:
        for term in sla.terms:
            if term.metric == metric:
                chart.verticals.append((term.bound * 1e3, str(term)))
                if term.level is not None:
                    chart.horizontals.append((term.level, ""))
    return chart


def _attainment(run: Run, targets: Targets) -> Chart:
    chart = Chart("Attainment over time", "s", "share of arrivals", y_max=1.0)
    judged = [(log.scheduled_s, _is_good(log, targets)) for log in run.arrivals]
    width = max(run.window.seconds, 1e-9) / PARTS
    points = []
    for part in range(PARTS):
        begin = run.window.begin_s + part * width
        mine = [good for at, good in judged if begin <= at < begin + width]
        if mine:
            points.append((begin + width / 2, sum(mine) / len(mine)))
    chart.lines.append(Line("", points))
    return chart


def _flying(run: Run) -> Chart:
    chart = Chart("Requests in flight", "s", "requests")
    ticks = np.linspace(run.window.begin_s, run.window.end_s, 400).tolist()
    chart.lines.append(Line("", list(zip(ticks, map(float, in_flight(run.logs, ticks)), strict=True)), is_step=True))
    return chart


def _misses(run: Run, targets: Targets) -> Chart:
    """Each request at its time, by how long its answer took; those that are not good stand out."""
    chart = Chart("Answers over time", "s", "e2e, s")
    rows: dict[str, list[tuple[float, float]]] = {"good": [], "not good": [], "no answer": []}
    for log in run.arrivals:
        end = log.finished_s if log.finished_s is not None else log.scheduled_s
        kind = "no answer" if not log.ok else "good" if _is_good(log, targets) else "not good"
        rows[kind].append((log.scheduled_s, max(end - log.scheduled_s, 0.0)))
    colours = {"good": "#9db4cf", "not good": "#d98c2b", "no answer": BAD}
    chart.marks += [Marks(kind, points, colours[kind]) for kind, points in rows.items() if points]
    return chart


def _loads(capacity: Capacity, base_rate: float) -> Chart:
    chart = Chart("Requests that meet the bound, by load", "requests a second", "share", y_max=1.0)
    fit = capacity.fits.get(capacity.binding)
    factors = [point.factor for point in capacity.points]
    if fit is not None and factors:
        loads = np.geomspace(min(factors), max(factors), 80)
        chart.lines.append(Line("", [(load * base_rate, fit.share(load)) for load in loads.tolist()]))
    named: dict[str, list[tuple[float, float]]] = {"run": [], "saturated": []}
    for point in capacity.points:
        share = point.shares.get(capacity.binding)
        if share is not None:
            named["saturated" if point.is_saturated else "run"].append((point.factor * base_rate, share.met / share.n))
    chart.marks += [Marks(name, at, BAD if name == "saturated" else "#2b5c9e") for name, at in named.items() if at]
    found = capacity.interval
    if found is not None and math.isfinite(found.high):
        chart.bands.append(Band(found.low * base_rate, found.high * base_rate))
        chart.verticals.append((found.estimate * base_rate, "capacity"))
    levels: Sequence[float] = [
        s.level for point in capacity.points for n, s in point.shares.items() if n == capacity.binding
    ]
    chart.horizontals += [(level, "") for level in set(levels)]
    return chart


def _is_good(log: RequestLog, targets: Targets) -> bool:
    sla = targets.of(log)
    return log.ok if sla is None else sla.is_good(log.timing)
