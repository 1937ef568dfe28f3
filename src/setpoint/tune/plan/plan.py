"""`setpoint plan`: what a model, a trace and an SLA come to on this machine, by simulation alone.

The trace is run at rising loads on the simulated engine. The capacity is the highest load at which every term of the
SLA holds over all arrivals. Nothing is measured here beyond the stored probe; measurements decide (`setpoint tune`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from setpoint.engine.plan import RunnerInfo
from setpoint.engine.step_cost import PARTS, total
from setpoint.errors import ConfigError
from setpoint.tune.measure import in_flight
from setpoint.tune.simulate.simulator import EngineSetup, Simulation, simulate
from setpoint.tune.sla import Sla, Term
from setpoint.workload.trace import Trace
from setpoint.workload.transform import repeated, scale_rate

STEP = 1.05  # the capacity is found to this ratio
KNOB_STEP = 1.15
LOWEST, HIGHEST = 1 / 64, 256.0  # times the trace's own load
_ALONE_S = 3600.0  # between two requests, so that none meets another
_PATIENCE_S = 120.0  # after the last arrival
_CURVE = (0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.3)  # of the capacity
_MOST_REPLICAS = 100_000


@dataclass(frozen=True)
class LoadPoint:
    """The trace at one load. Times are seconds, inf where misses reach into the statistic."""

    load: float  # times the trace's own
    rate_rps: float
    values: tuple[float, ...]  # by term of the SLA
    ttft_p50_s: float
    ttft_p95_s: float
    tpot_p50_s: float
    tpot_p95_s: float
    attainment: float
    goodput_rps: float
    busy: float  # share of the time that steps take
    mean_batch: float
    preemptions: int
    cached_share: float  # of the prompt tokens
    holds: bool


@dataclass(frozen=True)
class Binding:
    """What fails first above the capacity: terms with their values, and what the engine was short of."""

    terms: tuple[str, ...]
    resource: str
    shares: dict[str, float]  # of the time of all steps, by part


@dataclass(frozen=True)
class KnobEffect:
    knob: str
    value: str
    rate_rps: float
    change: float  # of the capacity, as a share; inf where the default holds at no load


@dataclass(frozen=True)
class Replicas:
    """Simulated is one of `count` at its share of the rate: requests are spread evenly, sessions stay in one place."""

    rate_rps: float
    count: int
    point: LoadPoint


@dataclass(frozen=True)
class Plan:
    sla: Sla
    requests: int
    seconds: float
    base_rate_rps: float
    alone: tuple[float, ...]  # by term: requests that meet nobody. Nothing tighter can be promised
    capacity: LoadPoint | None  # None: the SLA holds at no load
    curve: tuple[LoadPoint, ...]
    binding: Binding
    knobs: tuple[KnobEffect, ...]
    replicas: Replicas | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_feasible(self) -> bool:
        return self.capacity is not None or any(effect.rate_rps > 0 for effect in self.knobs)

    @property
    def impossible(self) -> tuple[str, ...]:
        """Terms that not even a request alone meets, with what it would take."""
        return tuple(
            f"{term} (alone: {shown(term, value)})"
            for term, value in zip(self.sla.terms, self.alone, strict=True)
            if value >= term.bound
        )


def shown(term: Term, value: float) -> str:
    if term.metric == "error":
        return f"{value:.2%}"
    return "never" if math.isinf(value) else f"{value * 1e3:.4g} ms"


class Loads:
    """The trace at any load on one simulated engine; what was simulated is remembered."""

    def __init__(self, trace: Trace, setup: EngineSetup, sla: Sla, report: Callable[[str], None]) -> None:
        self.trace, self.setup, self.sla, self._report = trace, setup, sla, report
        self.base_rate = len(trace.requests) / max(trace.seconds, 1e-9)
        self._points: dict[float, LoadPoint] = {}
        self._simulated: dict[float, tuple[Trace, Simulation]] = {}

    def under(self, sla: Sla) -> Loads:
        """The same traffic on the same engine, judged by another SLA: what is known is not simulated again."""
        other = Loads(self.trace, self.setup, sla, self._report)
        other._simulated = self._simulated
        return other

    @property
    def is_possible(self) -> bool:
        """Whether the SLA holds for requests that meet nobody."""
        return self.sla.holds(alone(self.trace, self.setup).run.timings)

    def at(self, load: float) -> LoadPoint:
        if load not in self._points:
            self._points[load] = self._point(load, *self._run(load))
        return self._points[load]

    def simulation(self, load: float) -> Simulation:
        return self._run(load)[1]

    def _run(self, load: float) -> tuple[Trace, Simulation]:
        if load not in self._simulated:
            self._report(f"simulating {self.base_rate * load:.3g} requests/s")
            scaled = self._scaled(load)
            self._simulated[load] = scaled, simulate(scaled, self.setup, patience_s=_PATIENCE_S)
        return self._simulated[load]

    def _scaled(self, load: float) -> Trace:
        """With as many requests as the trace at the least: sessions that are left out make room for further ones."""
        if load >= 1 or not self.trace.has_sessions:
            return scale_rate(self.trace, load)
        return scale_rate(repeated(self.trace, math.ceil(1 / load)), load)

    def _point(self, load: float, scaled: Trace, done: Simulation) -> LoadPoint:
        timings = done.run.timings
        values = tuple(term.value(timings) for term in self.sla.terms)
        busy = sum(done_s for done_s in total((step.shape for step in done.steps), self.setup.cost).values())
        busy_share = min(busy / max(done.virtual_s, 1e-9), 1.0)
        within = all(value < term.bound for term, value in zip(self.sla.terms, values, strict=True))
        tokens = max(done.prompt_tokens, 1)
        return LoadPoint(
            load=load,
            rate_rps=len(scaled.requests) / max(scaled.seconds, 1e-9),
            values=values,
            ttft_p50_s=Term("ttft", "p50", math.inf).value(timings),
            ttft_p95_s=Term("ttft", "p95", math.inf).value(timings),
            tpot_p50_s=Term("tpot", "p50", math.inf).value(timings),
            tpot_p95_s=Term("tpot", "p95", math.inf).value(timings),
            attainment=self.sla.attainment(timings),
            goodput_rps=sum(map(self.sla.is_good, timings)) / max(scaled.seconds, 1e-9),
            busy=busy_share,
            mean_batch=sum(step.shape.entries for step in done.steps) / max(len(done.steps), 1),
            preemptions=done.preemptions,
            cached_share=done.prompt_tokens_cached / tokens,
            holds=within and not _grows(done),
        )

    def capacity(self, step: float = STEP, start: float = 1.0) -> LoadPoint | None:
        """The highest load that holds, to a ratio of `step`; None when none from LOWEST on does."""
        low = high = start
        if self.at(start).holds:
            while self.at(high).holds:
                low, high = high, high * 2
                if high > HIGHEST:
                    return self.at(low)
        else:
            while not self.at(low).holds:
                low, high = low / 2, low
                if low < LOWEST:
                    return None
        while high / low > step:
            middle = math.sqrt(low * high)
            low, high = (middle, high) if self.at(middle).holds else (low, middle)
        return self.at(low)


def _grows(done: Simulation) -> bool:
    """Whether ever more requests are under way as time passes: the statistics then depend on where the trace ends.

    That steps fill the time says nothing: the more sequences they hold, the more they do.
    """
    seconds = done.run.window.seconds
    half, later, end = in_flight(done.run.logs, [0.5 * seconds, 0.75 * seconds, seconds])
    return half < later < end and end > 1.5 * half + 4


def shortened(trace: Trace, most: int) -> Trace:
    """The first requests of a trace."""
    return trace if len(trace.requests) <= most else Trace(trace.header, trace.requests[:most])


def alone(trace: Trace, setup: EngineSetup) -> Simulation:
    """What the requests of the trace take when none meets another, prefixes found as in the trace."""
    spread = [replace(r, arrival_s=_ALONE_S * number, session=None) for number, r in enumerate(trace.requests)]
    return simulate(Trace(trace.header, spread), setup)


def make_plan(
    trace: Trace,
    setup: EngineSetup,
    sla: Sla,
    *,
    rate: float | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Raises ConfigError when the trace is too short to say anything, or does not fit the context."""
    if len(trace.requests) < 2 or trace.seconds <= 0:
        raise ConfigError("a plan needs a trace of two requests or more that do not come at once")
    loads = Loads(trace, setup, sla, report)
    report("simulating each request alone")
    single = alone(trace, setup)
    floor = tuple(term.value(single.run.timings) for term in sla.terms)
    possible = all(value < term.bound for term, value in zip(sla.terms, floor, strict=True))
    found = loads.capacity() if possible else None
    if found is not None:
        bound = binding(loads, first_failure(loads, loads.at(found.load * STEP**2)))
    else:
        bound = _binding(setup, single, tuple(_failing(sla, floor)) or ("the SLA at any load",), 0.0)
    shares = (share * (1.0 if found is None else found.load) for share in _CURVE)
    plan = Plan(
        sla=sla,
        requests=len(trace.requests),
        seconds=trace.seconds,
        base_rate_rps=loads.base_rate,
        alone=floor,
        capacity=found,
        curve=tuple(loads.at(share) for share in shares),
        binding=bound,
        knobs=tuple(knob_effects(loads, found, report)),
    )
    if rate is not None and found is not None:
        plan = replace(plan, replicas=replicas(loads, found, rate))
    return plan


def first_failure(loads: Loads, point: LoadPoint) -> LoadPoint:
    while point.holds and point.load < HIGHEST:
        point = loads.at(point.load * 1.2)
    return point


def _failing(sla: Sla, values: Sequence[float]) -> Iterator[str]:
    for term, value in zip(sla.terms, values, strict=True):
        if value >= term.bound:
            yield f"{term} ({shown(term, value)})"


def binding(loads: Loads, point: LoadPoint) -> Binding:
    """Read off a load that does not hold."""
    failing = tuple(_failing(loads.sla, point.values)) or ("the engine's time",)
    return _binding(loads.setup, loads.simulation(point.load), failing, point.busy)


def _binding(setup: EngineSetup, done: Simulation, failing: tuple[str, ...], busy: float) -> Binding:
    sums = total((step.shape for step in done.steps), setup.cost)
    everything = max(sum(sums.values()), 1e-12)
    shares = {part: sums[part] / everything for part in PARTS}
    waiting = [step for step in done.steps if step.num_waiting]
    full = sum(step.num_running >= setup.limits.max_num_seqs for step in waiting)
    budget = setup.limits.max_num_batched_tokens
    short = sum(step.num_running < setup.limits.max_num_seqs and step.shape.tokens < budget for step in waiting)
    largest = max(shares, key=lambda part: shares[part])
    names = {
        "weights": "reading the weights once a step",
        "arithmetic": "arithmetic of prompts and answers",
        "attention": "attention over long contexts",
        "host": "planning and handling steps on the host",
    }
    if waiting and short > len(waiting) / 2:
        resource = "KV cache: it has no room for those that wait"
    elif waiting and full > len(waiting) / 2:
        resource = f"max_num_seqs: {setup.limits.max_num_seqs} run while others wait"
    elif busy >= 0.9:
        resource = f"{names[largest]} ({shares[largest]:.0%} of the time), which is used up"
    else:
        met = "requests that meet others" if busy else "every single request"
        resource = f"{names[largest]} ({shares[largest]:.0%} of the steps' time), in {met}"
    return Binding(failing, resource, shares)


def variants(setup: EngineSetup) -> Iterator[tuple[str, str, EngineSetup]]:
    """Each knob away from where it is, alone."""
    limits = setup.limits
    for seqs in (limits.max_num_seqs // 4, limits.max_num_seqs * 2):
        if seqs >= 1:
            yield "max_num_seqs", str(seqs), replace(setup, limits=replace(limits, max_num_seqs=seqs))
    for budget in (limits.max_num_batched_tokens // 4, limits.max_num_batched_tokens // 2):
        if budget >= 16:
            smaller = replace(limits, max_num_batched_tokens=budget)
            yield "max_num_batched_tokens", str(budget), replace(setup, limits=smaller)
    if setup.prefix_caching:
        yield "enable_prefix_caching", "false", replace(setup, prefix_caching=False)
    for share, name in ((0.5, "half"), (2.0, "twice")):
        groups = tuple(replace(g, num_blocks=max(1, int(g.num_blocks * share))) for g in setup.info.kv_groups)
        yield "kv_cache_memory_bytes", name, replace(setup, info=replace(setup.info, kv_groups=groups))
    if setup.survival and limits.max_drafts:
        yield "speculative_config", "off", replace(setup, survival=())


def knob_effects(loads: Loads, found: LoadPoint | None, report: Callable[[str], None]) -> Iterator[KnobEffect]:
    for knob, value, setup in variants(loads.setup):
        report(f"{knob} {value}")
        other = Loads(loads.trace, setup, loads.sla, lambda line: None)
        try:
            point = other.capacity(KNOB_STEP, 1.0 if found is None else found.load) if other.is_possible else None
        except ConfigError:  # the trace does not fit what this leaves
            point = None
        rate = 0.0 if point is None else point.rate_rps
        if found is None:
            change = math.inf if rate else 0.0
        else:
            change = (0.0 if point is None else point.load) / found.load - 1.0
            change = 0.0 if abs(change) < KNOB_STEP - 1.0 else change  # as fine as the search was
        yield KnobEffect(knob, value, rate, change)


def replicas(loads: Loads, found: LoadPoint, rate: float) -> Replicas:
    """The smallest number of engines whose share of the rate holds."""
    count = max(1, math.ceil(rate / (found.rate_rps * STEP)))
    while count <= _MOST_REPLICAS:
        point = loads.at(rate / count / loads.base_rate)
        if point.holds:
            return Replicas(rate, count, point)
        count = max(count + 1, math.ceil(count * 1.02))
    raise ConfigError(f"{rate:g} requests/s would take more than {_MOST_REPLICAS} engines of this kind")


@dataclass(frozen=True)
class MemoryMap:
    """Bytes, and what the KV cache holds."""

    available: int
    weights: int
    step: int
    kv: int
    host_tier: int
    kv_tokens: int
    max_model_len: int
    contexts: dict[int, int] = field(default_factory=dict)  # sequences at once -> tokens each may have

    @property
    def left(self) -> int:
        return self.available - self.weights - self.step - self.kv - self.host_tier


def contexts(kv_tokens: int, max_model_len: int, max_num_seqs: int) -> dict[int, int]:
    """The largest context for each number of sequences that have it at once."""
    counts = [count for count in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if count < max_num_seqs] + [max_num_seqs]
    return {count: min(max_model_len, kv_tokens // count) for count in counts}


def tokens_held(info: RunnerInfo, max_num_seqs: int) -> int:
    """By the KV groups that keep everything; where all layers have windows, as many as may run."""
    whole = [group.num_blocks * info.block_size for group in info.kv_groups if group.window is None]
    return min(whole, default=info.max_model_len * max_num_seqs)
