"""Why a recipe is what it is: each of its knobs put back, each term of its SLA moved, by simulation.

A counterfactual is a capacity with one thing changed. Those of the knobs need not add up to the whole gain; what they
leave is their interaction. A shadow price is what a tenth more of something would be worth. All of it is predicted;
what was measured stands beside it, read from the recipe and its study.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from setpoint.engine.limits import SchedulerLimits
from setpoint.engine.step_cost import Rising, StepCost
from setpoint.errors import ConfigError
from setpoint.tune.plan.plan import Binding, Loads, binding, first_failure
from setpoint.tune.search.space import DEFAULT, Setting, text
from setpoint.tune.search.trial import Ask, Observation
from setpoint.tune.simulate.simulator import EngineSetup
from setpoint.tune.sla import Sla
from setpoint.workload.trace import Trace

STEP = 1.02  # capacities are found to this ratio: smaller differences are not told apart
MORE = 1.1
NOT_SIMULATED = ("speculative_config",)  # what guesses are worth, only runs say
Limits = Callable[[Setting], SchedulerLimits]


@dataclass(frozen=True)
class Change:
    """`predicted` is the capacity over the recipe's, less one; None where nothing is known, -1 where no load holds."""

    what: str
    predicted: float | None
    measured: float | None = None  # mean difference of scores to the default, from the study's pairs
    pairs: int = 0


@dataclass(frozen=True)
class Reasons:
    capacity_rps: float | None
    default_rps: float | None
    knobs: tuple[Change, ...]  # back to the default, one at a time
    interaction: float | None  # of the whole gain, what the knobs one at a time do not explain
    prices: tuple[Change, ...]
    rejected: tuple[Change, ...]
    binding: Binding | None
    gain: Mapping[str, Any] | None  # measured on held-out traffic, from the recipe


def reasons(
    setting: Setting,
    sla: Sla,
    trace: Trace,
    setup: EngineSetup,
    limits_of: Limits,
    *,
    gain: Mapping[str, Any] | None = None,
    runs: Sequence[tuple[Ask, Observation]] = (),
    report: Callable[[str], None] = lambda line: None,
) -> Reasons:
    """`setup` is the default's; `runs` are the lines of a study."""

    def capacity(what: str, changed: EngineSetup, held: Sla = sla, start: float = 1.0) -> tuple[float, float, Loads]:
        report(what)
        loads = Loads(trace, changed, held, lambda line: None)
        try:
            point = loads.capacity(STEP, start)
        except ConfigError:  # the trace does not fit what this leaves
            point = None
        return (0.0, start, loads) if point is None else (point.rate_rps, point.load, loads)

    mine = replace(setup, limits=limits_of(setting))
    rate, load, loads = capacity("the recipe", mine)
    default_rate, _, _ = capacity("the default", setup, start=load)

    def change(found: float) -> float | None:
        return None if not rate else _told(found / rate - 1)

    knobs = []
    for name, value in setting:
        rest = tuple(pair for pair in setting if pair[0] != name)
        what, known = f"{name}={value}", name not in NOT_SIMULATED
        found = change(capacity(f"without {what}", replace(setup, limits=limits_of(rest)), start=load)[0])
        measured, pairs = measured_gain(((name, value),), runs)
        knobs.append(Change(what, found if known else None, measured, pairs))
    alone = [knob.predicted for knob in knobs if knob.predicted is not None]
    whole = change(default_rate)
    return Reasons(
        capacity_rps=rate or None,
        default_rps=default_rate or None,
        knobs=tuple(knobs),
        interaction=_interaction(whole, alone),
        prices=tuple(
            Change(what, change(capacity(what, richer, held, load)[0])) for what, richer, held in prices(mine, sla)
        ),
        rejected=tuple(rejected(setting, runs)),
        binding=binding(loads, first_failure(loads, loads.at(load * STEP**2))) if rate else None,
        gain=gain,
    )


def _interaction(whole: float | None, alone: Sequence[float]) -> float | None:
    """Changes multiply: what all knobs back change beyond the product of each."""
    if whole is None or not alone or whole <= -1 or min(alone) <= -1:
        return None
    return _told((1 + whole) / math.prod(1 + change for change in alone) - 1)


def _told(change: float) -> float:
    return 0.0 if abs(change) < STEP - 1 else change


def prices(setup: EngineSetup, sla: Sla) -> list[tuple[str, EngineSetup, Sla]]:
    """A tenth more of each: time of every term, KV cache, speed of what steps do."""
    found = []
    for place, term in enumerate(sla.terms):
        terms = list(sla.terms)
        terms[place] = replace(term, bound=term.bound * MORE)
        found.append((f"{term} relaxed by 10%", setup, Sla(tuple(terms))))
    groups = tuple(replace(group, num_blocks=int(group.num_blocks * MORE)) for group in setup.info.kv_groups)
    found.append(("10% more KV cache", replace(setup, info=replace(setup.info, kv_groups=groups)), sla))
    found.append(("10% faster steps", replace(setup, cost=faster(setup.cost, MORE)), sla))
    return found


def faster(cost: StepCost, times: float) -> StepCost:
    """The same machine with so many times the arithmetic and bandwidth; the host's share stays."""

    def shorter(part: Rising) -> Rising:
        return Rising(part.sizes, tuple(seconds / times for seconds in part.seconds))

    return replace(
        cost,
        body=shorter(cost.body),
        head=shorter(cost.head),
        per_entry_s=cost.per_entry_s / times,
        per_context_s=cost.per_context_s / times,
        per_pair_s=cost.per_pair_s / times,
    )


def measured_gain(setting: Setting, runs: Sequence[tuple[Ask, Observation]]) -> tuple[float | None, int]:
    """Mean difference of scores to the default over pairs of the race with equal arrivals, and their number."""
    raced = [(ask, seen) for ask, seen in runs if ask.stage.startswith("race") and seen.counts and seen.scores]
    defaults: dict[tuple[float, int, float], list[float]] = {}
    for ask, seen in raced:
        if ask.setting == DEFAULT:
            defaults.setdefault((ask.load, ask.seed, ask.seconds), []).append(seen.score)
    found = []
    for ask, seen in raced:
        beside = defaults.get((ask.load, ask.seed, ask.seconds))
        if ask.setting == setting and beside:
            found.append(seen.score - sum(beside) / len(beside))
    return (sum(found) / len(found), len(found)) if found else (None, 0)


def rejected(setting: Setting, runs: Sequence[tuple[Ask, Observation]], most: int = 5) -> list[Change]:
    """The settings that raced and were not chosen, those that did best first."""
    others = dict.fromkeys(ask.setting for ask, _ in runs if ask.stage.startswith("race"))
    found = []
    for other in others:
        if other in (setting, DEFAULT):
            continue
        gain, pairs = measured_gain(other, runs)
        if gain is not None:
            found.append(Change(text(other), None, gain, pairs))
    return sorted(found, key=lambda change: (-change.pairs, -(change.measured or 0.0)))[:most]
