"""What simulation says of a recipe: each knob back at its default, what binds, and what relief would be worth.

A price is a central difference: the capacity with a bound (or a resource) moved up and down, over the way between. So a
term that does not bind costs exactly nothing, and one simulated run is judged by every SLA in between.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from setpoint.engine.limits import SchedulerLimits
from setpoint.engine.step_cost import PARTS, Rising, StepCost
from setpoint.errors import ConfigError
from setpoint.tune.plan.plan import Binding, LoadPoint, Loads, binding
from setpoint.tune.search.space import DEFAULT, Setting
from setpoint.tune.search.trial import observe
from setpoint.tune.simulate.simulator import EngineSetup
from setpoint.tune.sla import Sla, Term
from setpoint.workload.trace import Trace

STEP = 1.02  # capacities are found to this ratio: changes below it are not told apart
FINE = 1.005  # those that prices come from
BOUND_SHARE, RELIEF = 0.1, 0.1  # how far a bound is moved to both sides; a resource
LEAST_MOVE_S = 1e-3
RESOURCES = ("kv", "bandwidth", "arithmetic", "host")
NOT_SIMULATED = ("speculative_config",)  # what of the guesses is right on this traffic is not known before it ran
Report = Callable[[str], None]


@dataclass(frozen=True)
class Question:
    """A recipe's traffic on a calibrated engine. `limits_of(setting)` are the hot limits under a setting."""

    trace: Trace
    setup: EngineSetup
    sla: Sla
    chosen: Setting
    limits_of: Callable[[Setting], SchedulerLimits]

    def loads(self, setting: Setting, report: Report = lambda line: None) -> Loads:
        return Loads(self.trace, replace(self.setup, limits=self.limits_of(simulable(setting))), self.sla, report)


@dataclass(frozen=True)
class TimeShares:
    """Shares of the time at the capacity, by what took it; `waiting` those of steps that began while requests waited,
    by what they lacked."""

    parts: Mapping[str, float]
    waiting: Mapping[str, float]


@dataclass(frozen=True)
class Price:
    """Per unit, as a share of the capacity."""

    name: str
    unit: str
    per_unit: float


@dataclass(frozen=True)
class Simulated:
    """`flips[knob]` is the change of the capacity when it goes back to its default; `remainder` what they do together
    beyond each alone, in the logarithm of the capacity."""

    capacity: LoadPoint
    default_change: float | None
    flips: Mapping[str, float]
    remainder: float | None
    binding: Binding
    time: TimeShares
    prices: tuple[Price, ...]


def simulable(setting: Setting) -> Setting:
    return tuple(pair for pair in setting if pair[0] not in NOT_SIMULATED)


def explain(asked: Question, report: Report = lambda line: None) -> Simulated | None:
    """None where the SLA holds at no load by simulation. Raises ConfigError for a trace that does not fit."""
    if len(asked.trace.requests) < 2 or asked.trace.seconds <= 0:
        raise ConfigError("an explanation needs a trace of two requests or more that do not come at once")
    report("simulating the recipe")
    loads = asked.loads(asked.chosen)
    found = loads.capacity(FINE) if loads.is_possible else None
    if found is None:
        return None
    flips: dict[str, float] = {}
    for knob, _ in simulable(asked.chosen):
        report(f"simulating the recipe without its {knob}")
        rest = tuple(pair for pair in asked.chosen if pair[0] != knob)
        flips[knob] = _change(asked.loads(rest), found)
    report("simulating the default")
    default = _change(asked.loads(DEFAULT), found) if simulable(asked.chosen) else 0.0
    return Simulated(
        found,
        default,
        flips,
        _remainder(default, flips),
        binding(loads, _failing(loads, found)),
        _time(loads, found),
        tuple(_prices(asked, loads, found, report)),
    )


def score(asked: Question, setting: Setting, load: float) -> float:
    """What a tuning predicts a setting by, at one load."""
    return float(observe(asked.loads(setting).simulation(load).run, asked.sla, 0.0).score)


def relieved(setup: EngineSetup, resource: str, share: float) -> EngineSetup:
    """With so much more (or less) of one resource."""
    if resource == "kv":
        groups = tuple(replace(g, num_blocks=max(1, int(g.num_blocks * (1 + share)))) for g in setup.info.kv_groups)
        return replace(setup, info=replace(setup.info, kv_groups=groups))
    return replace(setup, cost=_faster(setup.cost, resource, 1 / (1 + share)))


def _faster(cost: StepCost, resource: str, factor: float) -> StepCost:
    """The parts that `StepCost.parts` counts to a resource take `factor` of their time: reading the weights once and
    the context; what grows with tokens; the host's work."""
    if resource == "host":
        return replace(cost, host_s=cost.host_s * factor, host_per_entry_s=cost.host_per_entry_s * factor)
    if resource == "bandwidth":
        body, head = (_scaled(of, factor, 1.0) for of in (cost.body, cost.head))
        return replace(cost, body=body, head=head, per_context_s=cost.per_context_s * factor)
    body, head = (_scaled(of, 1.0, factor) for of in (cost.body, cost.head))
    return replace(
        cost, body=body, head=head, per_entry_s=cost.per_entry_s * factor, per_pair_s=cost.per_pair_s * factor
    )


def _scaled(of: Rising, once: float, growing: float) -> Rising:
    """One pass takes `once` of its time, what is beyond it `growing`. Below one token nothing changes shape."""
    one = of(1)
    seconds = (min(value, one) * once + max(value - one, 0.0) * growing for value in of.seconds)
    return Rising(of.sizes, tuple(seconds))


def _change(loads: Loads, found: LoadPoint) -> float:
    try:
        point = loads.capacity(STEP, found.load) if loads.is_possible else None
    except ConfigError:  # the trace does not fit what this leaves
        point = None
    change = (0.0 if point is None else point.load) / found.load - 1.0
    return 0.0 if abs(change) < STEP - 1.0 else change


def _remainder(default: float, flips: Mapping[str, float]) -> float | None:
    if min([default, *flips.values()]) <= -1.0:
        return None  # one of them holds at no load: there is no logarithm
    return math.log1p(default) - sum(map(math.log1p, flips.values()))


def _failing(loads: Loads, found: LoadPoint) -> LoadPoint:
    load = found.load * STEP
    while loads.at(load).holds and load < 1e3 / STEP**4:
        load *= STEP**4
    return loads.at(load)


def _time(loads: Loads, found: LoadPoint) -> TimeShares:
    done, cost, limits = loads.simulation(found.load), loads.setup.cost, loads.setup.limits
    parts = dict.fromkeys(PARTS, 0.0)
    waiting = dict.fromkeys(("places", "budget", "kv_blocks"), 0.0)
    for step in done.steps:
        for name, seconds in cost.parts(step.shape).items():
            parts[name] += seconds
        if step.num_waiting:
            full, spent = step.num_running >= limits.max_num_seqs, step.shape.tokens >= limits.max_num_batched_tokens
            waiting["places" if full else "budget" if spent else "kv_blocks"] += cost.seconds(step.shape)
    whole = max(done.virtual_s, sum(parts.values()), 1e-12)
    shares = {name: seconds / whole for name, seconds in parts.items()}
    shares["idle"] = max(0.0, 1.0 - sum(shares.values()))
    return TimeShares(shares, {name: seconds / whole for name, seconds in waiting.items()})


def _prices(asked: Question, loads: Loads, found: LoadPoint, report: Report) -> Iterator[Price]:
    for term in asked.sla.terms:
        report(f"simulating with another bound of {term}")
        move = BOUND_SHARE * term.bound if term.metric == "error" else max(BOUND_SHARE * term.bound, LEAST_MOVE_S)
        move = min(move, term.bound / 2)
        wide, tight = (loads.under(_moved(asked.sla, term, by)) for by in (move, -move))
        unit = 0.01 if term.metric == "error" else 1e-3
        slope = _log_ratio(wide, tight, found)
        yield Price(str(term), "+1 point" if term.metric == "error" else "+1 ms", slope / (2 * move) * unit)
    for resource in RESOURCES:
        report(f"simulating with more and less {resource}")
        more, less = (
            Loads(loads.trace, relieved(loads.setup, resource, share), asked.sla, lambda line: None)
            for share in (RELIEF, -RELIEF)
        )
        yield Price(resource, "+10 %", _log_ratio(more, less, found) / 2)


def _moved(sla: Sla, term: Term, by: float) -> Sla:
    return Sla(tuple(replace(own, bound=own.bound + by) if own == term else own for own in sla.terms))


def _log_ratio(above: Loads, below: Loads, found: LoadPoint) -> float:
    """Of the capacities; where the lower one is none, from the middle upwards, twice."""
    capacities = []
    for loads in (above, below):
        try:
            point = loads.capacity(FINE, found.load)
        except ConfigError:
            point = None
        capacities.append(0.0 if point is None else point.load)
    high, low = capacities
    if not high:
        return 0.0
    return math.log(high / low) if low else 2 * math.log(max(high / found.load, 1.0))
