"""A plan as one page that needs nothing else: what is predicted over load, and the table below it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from setpoint.tune.plan.plan import LoadPoint, Plan
from setpoint.tune.replay.page import BAD, GOOD, PAGE
from setpoint.tune.svg import Chart, Line


def plan_page(plan: Plan, table: Sequence[str], title: str) -> str:
    """`table` is what the terminal shows."""
    charts = (
        _chart(plan, "Time to first token", "ms", "ttft", ("p50", "p95"), lambda p: (p.ttft_p50_s, p.ttft_p95_s)),
        _chart(plan, "Time per output token", "ms", "tpot", ("p50", "p95"), lambda p: (p.tpot_p50_s, p.tpot_p95_s)),
        _chart(plan, "Goodput", "good requests a second", "", ("good",), lambda p: (p.goodput_rps / 1e3,)),
    )
    found = plan.capacity
    verdict = (
        "Infeasible: no load meets the SLA" if found is None else f"Holds up to {found.rate_rps:.3g} requests a second"
    )
    figures = "".join(f"<figure>{chart.svg()}</figure>" for chart in charts)
    return PAGE.substitute(
        title=escape(f"{title}: plan for {plan.sla}"),
        verdict=escape(verdict),
        colour=BAD if found is None else GOOD,
        body=figures + f"<pre>{escape(chr(10).join(table))}</pre>",
        footer="Simulated from measured steps; nothing here is a measurement.",
    )


def _chart(
    plan: Plan, title: str, unit: str, metric: str, names: Sequence[str], of: Callable[[LoadPoint], Sequence[float]]
) -> Chart:
    """Over the load; bounds of the SLA on this metric as lines across."""
    chart = Chart(title, "requests a second", unit)
    points = sorted(plan.curve, key=lambda point: point.rate_rps)
    for number, name in enumerate(names):
        values = [(point.rate_rps, of(point)[number] * 1e3) for point in points]
        chart.lines.append(Line(name, [(x, y) for x, y in values if math.isfinite(y)], "#2b5c9e" if number else GOOD))
    chart.horizontals += [(t.bound * 1e3, t.statistic) for t in plan.sla.terms if t.metric == metric]
    if plan.capacity is not None:
        chart.verticals.append((plan.capacity.rate_rps, "capacity"))
    return chart
