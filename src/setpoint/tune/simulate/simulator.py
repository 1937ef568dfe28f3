"""The engine's own scheduler on a virtual clock: what a trace would see, without a model, in a hundredth of the time.

Everything that decides is the production object: queue, scheduler, block pools, prefix tree, sessions, speculator. Here
are only the parts that the world plays: requests come when the trace says, steps take what the step-cost model says
(the host's share included), answers have the lengths of the trace, and of what is guessed as much is right as was
measured. Lower tiers of the KV cache are not simulated.
"""

from __future__ import annotations

import gc
import random
import time
from collections import abc
from collections.abc import Callable
from dataclasses import dataclass, field

from setpoint.engine.decisions import Decision
from setpoint.engine.events import Event
from setpoint.engine.plan import Runner, RunnerInfo, StepPlan, StepResult
from setpoint.engine.request import Request
from setpoint.engine.sampling import SamplingParams
from setpoint.engine.scheduler import Scheduler, SchedulerLimits
from setpoint.engine.sequence import Sequence
from setpoint.engine.slo import HeldSla
from setpoint.engine.speculation.drafter import Draft
from setpoint.engine.speculation.speculator import Speculator
from setpoint.engine.step_cost import ShapeOf, StepCost, StepShape
from setpoint.errors import ConfigError, QueueFullError
from setpoint.runtime.fake import CostModelRunner, VirtualClock
from setpoint.tune.measure import EngineCounters, RequestLog, Run, Status, Window
from setpoint.tune.simulate.arrivals import Arrivals
from setpoint.workload.prompts import PromptTokens
from setpoint.workload.trace import Trace

BLOCKED_TICK_S = 0.01  # as the engine's: work exists, but none could be planned
_STRENGTH = 8  # of a simulated guess: the speculator learns what such a one is worth


@dataclass(frozen=True)
class EngineSetup:
    """A simulated engine. `survival[k]` is the measured share of guesses whose first k + 1 tokens are right; empty =
    nobody guesses."""

    info: RunnerInfo
    limits: SchedulerLimits
    cost: StepCost
    prefix_caching: bool = True
    survival: tuple[float, ...] = ()
    held: HeldSla | None = None  # what a pacer holds
    probed: bool = True  # whether that pacer was given the cost, or has to learn it

    def __post_init__(self) -> None:
        falls = all(after <= before for before, after in zip(self.survival, self.survival[1:], strict=False))
        if not all(0.0 <= share <= 1.0 for share in self.survival) or not falls:
            raise ConfigError("a survival curve holds shares that never rise")


@dataclass(frozen=True, slots=True)
class SimulatedStep:
    """One step as it was planned; `num_waiting` includes what could not be started."""

    at_s: float
    shape: StepShape
    num_running: int
    num_waiting: int
    kv_usage: float


@dataclass(frozen=True)
class Simulation:
    """What came out: the same record as of a measured run, and what the engine was doing."""

    run: Run
    steps: tuple[SimulatedStep, ...]
    wall_s: float
    virtual_s: float
    prompt_tokens: int = 0
    prompt_tokens_cached: int = 0
    preemptions: int = 0
    decisions: tuple[Decision, ...] = ()  # the latest of a pacer

    @property
    def speed(self) -> float:
        """Virtual seconds in one second."""
        return self.virtual_s / max(self.wall_s, 1e-9)


class ModelCost:
    """Prices plans and remembers their shapes."""

    def __init__(self, cost: StepCost, info: RunnerInfo) -> None:
        self._cost, self._shape_of = cost, ShapeOf(info.kv_groups)
        self.shape = StepShape(0, 0, 0, 0, 0)

    def seconds(self, plan: StepPlan) -> float:
        self.shape = self._shape_of(plan.entries)
        return self._cost.seconds(self.shape)


class SurvivalDrafter:
    """Guesses of which as many are right as was measured; whether to verify them is the speculator's choice."""

    name = "measured"

    def __init__(self, survival: abc.Sequence[float], token_at: Callable[[int], int], seed: int) -> None:
        self._survival, self._token_at = survival, token_at
        self._random = random.Random(seed)

    def propose(self, seqs: abc.Sequence[Sequence], max_drafts: int) -> list[Draft | None]:
        length = min(len(self._survival), max_drafts)
        return [self._guess(len(seq.token_ids), length) for seq in seqs]

    def _guess(self, position: int, length: int) -> Draft:
        luck = self._random.random()
        tokens = [self._token_at(position + offset) for offset in range(length)]
        for offset in range(length):
            if luck >= self._survival[offset]:
                tokens[offset] = self._token_at(position + offset + 1)  # any other one
                break
        return Draft(tokens, _STRENGTH)

    def finished(self, seq: Sequence) -> None:
        pass


def turn(scheduler: Scheduler, runner: Runner, clock: VirtualClock) -> tuple[StepPlan, list[Event]]:
    """What the engine's thread does between two looks at its inbox."""
    plan = scheduler.schedule(clock.seconds)
    result = runner.execute(plan) if plan.entries or plan.saves or plan.restores else StepResult()
    return plan, scheduler.commit(plan, result, clock.seconds)


def check_lengths(trace: Trace, max_model_len: int) -> None:
    """Raises ConfigError when a request of the trace does not fit the context."""
    too_long = [r for r in trace.requests if r.input_tokens + r.output_tokens > max_model_len]
    if too_long:
        longest = max(request.input_tokens + request.output_tokens for request in too_long)
        raise ConfigError(
            f"{len(too_long)} of {len(trace.requests)} requests of the trace are longer than the context of "
            f"{max_model_len} tokens (the longest has {longest}); divide their lengths by "
            f"{longest / max_model_len + 0.05:.1f} with `setpoint trace scale --lengths`"
        )


@dataclass(slots=True)
class _Answer:
    """A request on its way."""

    scheduled_s: float
    status: Status = "timeout"
    deliveries: list[tuple[float, int]] = field(default_factory=list)
    finished_s: float | None = None
    cached_tokens: int = 0


def simulate(
    trace: Trace,
    setup: EngineSetup,
    *,
    seed: int = 0,
    patience_s: float | None = None,
    prompts: PromptTokens | None = None,
) -> Simulation:
    """Run a trace to its end, or until `patience_s` after its last arrival: what is open then was not answered.

    Raises ConfigError when a request is longer than the context.
    """
    world = _World(trace, setup, seed, prompts)
    check_lengths(trace, world.scheduler.max_model_len)
    began = time.perf_counter()
    collecting = gc.isenabled()
    gc.disable()  # a step makes hundreds of objects that no cycle holds
    try:
        world.go(None if patience_s is None else trace.seconds + patience_s)
    finally:
        if collecting:
            gc.enable()
    return world.result(time.perf_counter() - began)


class _World:
    def __init__(self, trace: Trace, setup: EngineSetup, seed: int, prompts: PromptTokens | None) -> None:
        self.trace, self.setup = trace, setup
        self.clock = VirtualClock()
        self.cost = ModelCost(setup.cost, setup.info)
        self.runner = CostModelRunner(setup.info, self.clock, self.cost)
        speculator = None
        if setup.survival and setup.limits.max_drafts:
            drafter = SurvivalDrafter(setup.survival, self.runner.token_at, seed)
            speculator = Speculator([drafter], clock=self.clock)
        self.scheduler = Scheduler(
            setup.info,
            setup.limits,
            enable_prefix_caching=setup.prefix_caching,
            seed=seed,
            speculator=speculator,
            held=setup.held,
            step_cost=setup.cost if setup.probed else None,
        )
        self.arrivals = Arrivals(trace)
        self.prompts = prompts or PromptTokens(trace, setup.info.vocab_size)
        self.answers: dict[int, _Answer] = {}
        self.steps: list[SimulatedStep] = []

    def go(self, until_s: float | None) -> None:
        scheduler, clock, arrivals = self.scheduler, self.clock, self.arrivals
        while until_s is None or clock.seconds <= until_s:
            next_s = arrivals.next_s
            if next_s is not None and next_s <= clock.seconds:
                for due_s, index in arrivals.take(clock.seconds):
                    self._arrive(due_s, index)
            if not scheduler.has_work:
                next_s = arrivals.next_s
                if next_s is None:
                    return
                clock.advance_to(next_s)
                continue
            planned_s = clock.seconds
            plan, events = turn(scheduler, self.runner, clock)
            for event in events:
                self._deliver(event)
            if plan.entries:
                running, waiting = len(scheduler.running), len(scheduler.waiting)
                self.steps.append(SimulatedStep(planned_s, self.cost.shape, running, waiting, scheduler.kv.usage))
            elif not events:
                next_s = arrivals.next_s
                tick_s = clock.seconds + BLOCKED_TICK_S
                clock.advance_to(tick_s if next_s is None else min(max(next_s, clock.seconds), tick_s))

    def _arrive(self, due_s: float, index: int) -> None:
        traced = self.trace.requests[index]
        answer = self.answers[index] = _Answer(due_s)
        request = Request(
            str(index),
            self.prompts[index],
            SamplingParams(temperature=0.0, max_tokens=traced.output_tokens, ignore_eos=True, seed=0),
            session_id=traced.session or "",
        )
        try:
            self.scheduler.reserve(request, due_s)
        except QueueFullError:
            answer.status, answer.finished_s = "rejected", self.clock.seconds
            self.arrivals.over(index, self.clock.seconds)
            return
        self.scheduler.enqueue(request, self.clock.seconds)

    def _deliver(self, event: Event) -> None:
        index = int(event.request_id)
        answer = self.answers[index]
        if event.token_ids:
            answer.deliveries.append((event.time, len(event.token_ids)))
        if event.finish_reason is not None:
            answer.status = "ok" if event.finish_reason == "length" else "error"
            answer.finished_s, answer.cached_tokens = event.time, event.num_cached_tokens
            self.arrivals.over(index, event.time)

    def result(self, wall_s: float) -> Simulation:
        logs = tuple(self._log(index, self.answers[index]) for index in sorted(self.answers))
        last_s = max((log.scheduled_s for log in logs), default=0.0)
        counters, finished = self.scheduler.counters, sum(log.status == "ok" for log in logs)
        after = EngineCounters(
            prompt_tokens=counters.prompt_tokens,
            generation_tokens=counters.generation_tokens,
            finished=finished,
            rejected=sum(log.status == "rejected" for log in logs),
            preemptions=counters.preemptions,
        )
        run = Run(
            logs,
            Window(0.0, max(last_s, self.trace.seconds)),
            len(self.trace.requests),
            before=EngineCounters(0, 0, 0, 0, 0),
            after=after,
            preemptions=counters.preemptions,
            notes=("simulated",),
        )
        return Simulation(
            run,
            tuple(self.steps),
            wall_s,
            self.clock.seconds,
            counters.prompt_tokens,
            counters.prompt_tokens_cached,
            counters.preemptions,
            () if self.scheduler.pacer is None else tuple(self.scheduler.pacer.decisions.latest()),
        )

    def _log(self, index: int, answer: _Answer) -> RequestLog:
        traced = self.trace.requests[index]
        return RequestLog(
            index=index,
            scheduled_s=answer.scheduled_s,
            sent_s=answer.scheduled_s,
            status=answer.status,
            deliveries=tuple(answer.deliveries),
            finished_s=answer.finished_s,
            prompt_tokens=traced.input_tokens,
            cached_tokens=answer.cached_tokens,
            output_tokens=sum(count for _, count in answer.deliveries),
            wanted_tokens=traced.output_tokens,
            class_name=traced.class_name,
            session=traced.session,
            turn=traced.turn,
            slo=traced.slo,
        )
