"""The page of a tuning: verdict, attainment over rate, latencies, knobs, every run, provenance. No network."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from setpoint.tune.replay.page import BAD, GOOD, PAGE, QUIET
from setpoint.tune.search.outcome import TITLES, lines
from setpoint.tune.search.space import DEFAULT, Setting, text
from setpoint.tune.search.study import Study
from setpoint.tune.search.trial import QUANTILES, Observation
from setpoint.tune.search.tuned import Tuned
from setpoint.tune.statistics import clopper_pearson
from setpoint.tune.svg import ACCENT, Chart, Line, Marks

_COLOURS = {"certified": GOOD, "default": GOOD, "holds": GOOD, "not met": BAD, "invalid": BAD, "insufficient": QUIET}
_DEFAULT_COLOUR = "#8a6d1b"


def tune_page(tuned: Tuned, study: Study, provenance: Mapping[str, Any]) -> str:
    compared = next((loads.setting for loads in tuned.loads[1:]), DEFAULT)
    chosen = tuned.decision.chosen
    if chosen is not None and chosen.setting != DEFAULT:
        compared = chosen.setting
    charts = [
        _attainment(study, compared),
        _latencies(study, compared, "ttft_ms", "TTFT, held out"),
        _latencies(study, compared, "tpot_ms", "TPOT, held out"),
    ]
    body = "".join(f"<figure>{chart.svg()}</figure>" for chart in charts)
    body += "<p>Rates, TTFT and TPOT: the default beside " + escape(text(compared)) + "</p>"
    body += _block("Result", lines(tuned)) + _block("Knobs: gain of the score over the default", _waterfall(tuned))
    body += _block("Runs", _trials(study))
    body += _block("Provenance", [json.dumps(dict(provenance), indent=1), f"again: {provenance.get('command', '')}"])
    verdict = f"{TITLES[tuned.decision.verdict]}: {tuned.decision.why}"
    return PAGE.substitute(
        title="setpoint tune", verdict=escape(verdict), colour=_COLOURS[tuned.decision.verdict], body=body, footer=""
    )


def _block(title: str, content: list[str]) -> str:
    return f"<h2>{escape(title)}</h2><pre>{escape(chr(10).join(content))}</pre>"


def _seen(study: Study, setting: Setting, *, held_out: bool) -> Iterator[Observation]:
    for ask, seen in study.lines:
        if ask.setting == setting and seen.counts and (ask.part == "holdout" or not held_out):
            yield seen


def _attainment(study: Study, compared: Setting) -> Chart:
    """A mark a run, lines for its exact 95 % interval."""
    chart = Chart("Attainment over rate, 95 % intervals", "requests/s", "share of good requests", y_max=1.0)
    for setting, name, colour in _sides(compared):
        found = [one for one in _seen(study, setting, held_out=False) if one.requests]
        chart.marks.append(Marks(name, [(one.rate_rps, one.attainment) for one in found], colour))
        for one in found:
            misses = clopper_pearson((1 - one.attainment) * one.requests, one.requests)
            ends = [(one.rate_rps, 1 - misses.high), (one.rate_rps, 1 - misses.low)]
            chart.lines.append(Line("", ends, colour))
    return chart


def _latencies(study: Study, compared: Setting, what: str, title: str) -> Chart:
    """The mean of the runs' quantiles."""
    chart = Chart(title, "ms", "share of answered requests", y_max=1.0)
    for setting, name, colour in _sides(compared):
        rows = [row for one in _seen(study, setting, held_out=True) if (row := getattr(one, what))]
        if rows:
            means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
            chart.lines.append(Line(name, [(x, q / 100) for x, q in zip(means, QUANTILES, strict=True)], colour))
    return chart


def _sides(compared: Setting) -> list[tuple[Setting, str, str]]:
    sides = [(DEFAULT, "default", _DEFAULT_COLOUR)]
    return sides if compared == DEFAULT else [*sides, (compared, "tuned", ACCENT)]


def _waterfall(tuned: Tuned) -> list[str]:
    ranked = sorted((racer for racer in tuned.racers if racer.pairs), key=lambda racer: -racer.mean)
    return [f"{racer.mean:+.3f}  {text(racer.setting):<70} {racer.out or 'stayed'}" for racer in ranked]


def _trials(study: Study) -> list[str]:
    return [
        f"{ask.stage:<18} {text(ask.setting):<60} {ask.part:<8} load {ask.load:<7.3g} seed {ask.seed:<5} "
        f"{seen.state:<10} {seen.attainment:>6.1%} {seen.rate_rps:>8.2f}/s {seen.detail}"
        for ask, seen in study.lines
    ]
