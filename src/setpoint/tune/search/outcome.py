"""What a tuning comes to: the recipe, the summary for a terminal, the document for machines."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from setpoint.tune.recipe import Recipe
from setpoint.tune.search.certify import Certificate
from setpoint.tune.search.space import text
from setpoint.tune.search.tuned import Tuned
from setpoint.tune.statistics import Interval

TITLES = {
    "certified": "certified",
    "default": "certified, gain not shown: the default is best",
    "holds": "certified, gain not shown: the default was not shown to hold",
    "not met": "not met",
    "invalid": "invalid run",
    "insufficient": "insufficient evidence",
}


def recipe_of(
    tuned: Tuned, *, sla: str, model: Mapping[str, Any], machine: Mapping[str, Any], provenance: Mapping[str, Any]
) -> Recipe | None:
    """None unless something was certified."""
    chosen = tuned.decision.chosen
    if chosen is None:
        return None
    evidence = {
        **certificate_document(chosen),
        "noise": tuned.noise,
        "shrinkage": tuned.shrinkage,
        "why": tuned.decision.why,
    }
    default = tuned.default
    if default is not None:
        evidence["default"] = certificate_document(default)
    evidence["stressed"] = stressed(tuned)
    rows = [{"up_to_rps": chosen.rate_rps, "set": dict(chosen.setting)}]
    if default is not None and default.holds and default is not chosen and default.rate_rps < chosen.rate_rps:
        rows.insert(0, {"up_to_rps": default.rate_rps, "set": {}})
    return Recipe(
        TITLES[tuned.decision.verdict], sla, dict(chosen.setting), model, machine, evidence, tuple(rows), provenance
    )


def certificate_document(found: Certificate) -> dict[str, Any]:
    return {
        "rate_rps": found.rate_rps,
        "load": found.load,
        "attainment": found.attainment,
        "runs": found.runs,
        "holds": found.holds,
        "gain": _interval(found.gain),
        "gain_p_value": found.p_value if found.gain is not None else None,
        "terms": [
            {
                "term": term.term,
                "missed": term.missed,
                "requests": term.n,
                "independent": round(term.effective, 1),
                "misses_at_most": term.bound,
                "allowed": term.allowed,
                "holds": term.holds,
            }
            for term in found.terms
        ],
    }


def stressed(tuned: Tuned) -> list[dict[str, Any]]:
    """How the chosen setting did under other traffic; one run each, so an outlook and no certificate."""
    return [
        {
            "traffic": one.what,
            "rate_rps": one.seen.rate_rps,
            "requests": one.seen.requests,
            "attainment": one.seen.attainment,
            "meets_sla": one.seen.is_met,
        }
        for one in tuned.stressed
        if one.seen.counts
    ]


def document(tuned: Tuned) -> dict[str, Any]:
    """Everything but the runs, which are in the study; what is infinite is null."""
    chosen = tuned.decision.chosen
    return {
        "verdict": TITLES[tuned.decision.verdict],
        "why": tuned.decision.why,
        "knobs": None if chosen is None else dict(chosen.setting),
        "chosen": None if chosen is None else certificate_document(chosen),
        "default": None if tuned.default is None else certificate_document(tuned.default),
        "finalists": [{"knobs": dict(one.setting), **certificate_document(one)} for one in tuned.finalists],
        "capacities": [
            {
                "knobs": dict(found.setting),
                "load": found.capacity,
                "points": [[load, asdict(seen)] for load, seen in found.points],
            }
            for found in tuned.loads
        ],
        "race": [
            {
                "knobs": dict(racer.setting),
                "gain": racer.mean if racer.pairs else None,
                "pairs": racer.pairs,
                "out": racer.out,
            }
            for racer in tuned.racers
        ],
        "stressed": stressed(tuned),
        "noise": tuned.noise,
        "slope": tuned.slope,
        "shrinkage": tuned.shrinkage,
        "spent_s": tuned.spent_s,
        "notes": tuned.notes,
    }


def lines(tuned: Tuned) -> list[str]:
    found = [f"verdict: {TITLES[tuned.decision.verdict]}", f"  {tuned.decision.why}"]
    chosen = tuned.decision.chosen
    for name, one in (("chosen", chosen), ("default", tuned.default)):
        if one is None or (name == "default" and one is chosen):
            continue
        found.append(f"{name}: {text(one.setting)}")
        found.append(f"  {one.rate_rps:.2f} requests/s held out, {one.attainment:.1%} good, {one.runs} runs")
        for term in one.terms:
            sure = "shown" if term.holds else "not shown"
            found.append(
                f"  {term.term}: {term.missed:.0f} of {term.n:.0f} miss it, surely at most {term.bound:.1%} "
                f"({term.allowed:.1%} may): {sure}"
            )
        if one.gain is not None:
            found.append(
                f"  capacity {one.gain.estimate:+.1%} over the default, 95 % interval {one.gain.low:+.1%} to "
                f"{one.gain.high:+.1%}, p {one.p_value:.4f}"
            )
    for one in tuned.finalists:
        if one is not chosen and one.gain is not None and (chosen is None or one.setting != chosen.setting):
            found.append(
                f"finalist {text(one.setting)}: capacity {one.gain.estimate:+.1%} [{one.gain.low:+.1%}, "
                f"{one.gain.high:+.1%}], not claimed"
            )
    for row in stressed(tuned):
        met = "meets" if row["meets_sla"] else "misses"
        share = f"{row['attainment']:.1%} of {row['requests']} good"
        found.append(f"with {row['traffic']}: {share}, {met} the SLA (one run)")
    if tuned.shrinkage is not None:
        found.append(f"tuned minus held-out gain: {tuned.shrinkage:+.1%}")
    found.append(f"noise between equal runs {tuned.noise:.1%}; {tuned.spent_s:.0f} s of measuring")
    return found + [f"note: {note}" for note in tuned.notes]


def _interval(found: Interval | None) -> dict[str, Any] | None:
    if found is None:
        return None
    finite = {name: value for name, value in asdict(found).items() if math.isfinite(value)}
    return {"estimate": found.estimate, "ci95": [finite.get("low", -1.0), finite.get("high", 1e9)]}
