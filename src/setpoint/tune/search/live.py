"""Trials on a live engine in this process: hot limits change between two runs, nothing is loaded again.

An open loop: requests are submitted when the trace says, latencies count from then to the moment the engine hands
the tokens over (HTTP is not in them; `setpoint bench serve` measures over it). Each run is a tenant of its own: the
prompts of a pair are equal, and nothing of one run is found in the cache of another.
"""

from __future__ import annotations

import gc
import math
import os
import queue
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from setpoint.engine.events import Event
from setpoint.engine.limits import SchedulerLimits
from setpoint.engine.request import Request
from setpoint.engine.sampling import SamplingParams
from setpoint.engine.stats import EngineStats
from setpoint.errors import EngineDeadError, EngineError, QueueFullError
from setpoint.tune.measure import EngineCounters, RequestLog, Run, Status, Window
from setpoint.tune.replay.host import cpu_times, machine_use
from setpoint.tune.replay.prompts import Prompts
from setpoint.tune.replay.tripwires import judged
from setpoint.tune.search.space import DEFAULT, Setting
from setpoint.tune.search.trial import Ask, Observation, observe
from setpoint.tune.simulate.arrivals import Arrivals
from setpoint.tune.sla import Sla
from setpoint.workload.trace import Trace
from setpoint.workload.transform import repeated, scale_rate

LEAD_S = 0.05
WARM_UP_S = 3.0
FROM_ARRIVAL = ("ttft", "e2e")  # the engine stamps the tokens: gaps between them do not contain how late we were
SWITCH_S = 0.0005  # after which a thread gives way: the engine's must not make the one that sends late (default 5 ms)
ABORT_S = 10.0
OTHERS_WORK = ("machine", "client lag")  # tripwires that the work of others trips


class LiveEngine(Protocol):
    """Of `setpoint.engine.engine.Engine`, what a trial uses."""

    def submit(self, request: Request) -> None: ...
    def abort(self, request_id: str, index: int | None = None) -> None: ...
    def set_limits(self, limits: SchedulerLimits) -> None: ...
    def stats(self) -> EngineStats: ...


def window(trace: Trace, load: float, seed: int, seconds: float) -> Trace:
    """`seconds` of the trace at a load, from a place that the seed says; the trace goes on anew where it ends."""
    period = max(trace.seconds * (1 + 1 / max(len(trace.requests) - 1, 1)), 1e-6)
    begin = random.Random(seed).random() * period
    rate = load if not trace.has_sessions else 1.0  # sessions keep their pace, there are more or fewer of them
    span = seconds * rate
    times = min(1000, math.ceil((begin + span) / period) + 1)
    whole = repeated(trace, times)
    if trace.has_sessions:
        whole = scale_rate(whole, load, seed)
    cut = [r for r in whole.requests if begin <= r.arrival_s - trace.requests[0].arrival_s < begin + span]
    first = trace.requests[0].arrival_s + begin
    moved = [replace(request, arrival_s=(request.arrival_s - first) / rate) for request in cut]
    return Trace(trace.header, moved or [replace(whole.requests[0], arrival_s=0.0)])


@dataclass(slots=True)
class _Answer:
    scheduled_s: float
    sent_s: float | None = None
    status: Status = "timeout"
    deliveries: list[tuple[float, int]] = field(default_factory=list)
    finished_s: float | None = None
    cached_tokens: int = 0
    error: str = ""


class Replayer:
    """`events` is what the engine delivers to: `Engine(..., deliver=events.put)`."""

    def __init__(
        self, engine: LiveEngine, events: queue.SimpleQueue[list[Event]], pool: Sequence[int], first: int | None
    ) -> None:
        self._engine, self._events, self._pool, self._first = engine, events, pool, first
        self._count = 0

    def run(self, trace: Trace, limits: SchedulerLimits, *, salt: str, patience_s: float, seconds: float) -> Run:
        """Of an idle engine. What is open `patience_s` after the last arrival was not answered."""
        self._count += 1
        prompts = Prompts(self._pool, trace.header.block_size, salt, first=self._first)
        requests = [self._request(trace, prompts, index) for index in range(len(trace.requests))]
        self._engine.set_limits(limits)
        before, times = _counters(self._engine.stats()), cpu_times([os.getpid()], os.getpid())
        answers = self._replay(trace, requests, patience_s)
        times_after = cpu_times([os.getpid()], os.getpid())
        after = _counters(self._engine.stats())
        logs = tuple(_log(trace, index, answers[index]) for index in sorted(answers))
        end = max([seconds, *(log.scheduled_s for log in logs)])
        preemptions = (after.preemptions or 0) - (before.preemptions or 0)
        return Run(
            logs,
            Window(0.0, end),
            len(trace.requests),
            before=before,
            after=after,
            preemptions=preemptions,
            machine=machine_use(times, times_after),
        )

    def _request(self, trace: Trace, prompts: Prompts[int], index: int) -> Request:
        traced = trace.requests[index]
        params = SamplingParams(temperature=0.0, max_tokens=traced.output_tokens, ignore_eos=True, seed=0)
        name = f"tune {self._count}"
        return Request(
            f"{name}/{index}", prompts.items(traced, index), params, tenant=name, session_id=traced.session or ""
        )

    def _replay(self, trace: Trace, requests: Sequence[Request], patience_s: float) -> dict[int, _Answer]:
        arrivals = Arrivals(trace)
        answers: dict[int, _Answer] = {}
        open_answers: set[int] = set()
        start, deadline = time.monotonic() + LEAD_S, math.inf
        while open_answers or arrivals.next_s is not None:
            now = time.monotonic() - start
            for due_s, index in arrivals.take(now):
                answer = answers[index] = _Answer(due_s)
                self._submit(requests[index], answer, start)
                if answer.status == "rejected":
                    arrivals.over(index, answer.finished_s or now)
                else:
                    open_answers.add(index)
            if len(answers) == len(requests) and math.isinf(deadline):
                deadline = now + patience_s
            next_s = arrivals.next_s
            wait_s = min(0.1, max(0.0, (now + 0.1 if next_s is None else next_s) - (time.monotonic() - start)))
            self._take(answers, open_answers, arrivals, start, wait_s)
            if now > max(deadline, 0.0) or now > trace.requests[-1].arrival_s + 4 * patience_s:
                self._abort(requests, open_answers, arrivals, answers, start)
                break
        return answers

    def _submit(self, request: Request, answer: _Answer, start: float) -> None:
        answer.sent_s = time.monotonic() - start
        try:
            self._engine.submit(request)
        except QueueFullError as error:
            answer.status, answer.finished_s, answer.error = "rejected", answer.sent_s, str(error)[:200]

    def _take(
        self, answers: dict[int, _Answer], open_answers: set[int], arrivals: Arrivals, start: float, wait_s: float
    ) -> None:
        try:
            events = self._events.get(timeout=wait_s) if wait_s > 0 else self._events.get_nowait()
        except queue.Empty:
            return
        for event in events:
            index = int(event.request_id.rpartition("/")[2])
            answer = answers[index]
            if event.token_ids:
                answer.deliveries.append((event.time - start, len(event.token_ids)))
            if event.finish_reason is None:
                continue
            if event.finish_reason in ("length", "stop"):
                answer.status = "ok"
            elif event.finish_reason == "error":
                answer.status, answer.error = "error", str(event.error)[:200]
                if isinstance(event.error, EngineDeadError):
                    raise event.error
            answer.finished_s, answer.cached_tokens = event.time - start, event.num_cached_tokens
            open_answers.discard(index)
            arrivals.over(index, answer.finished_s)

    def _abort(
        self, requests: Sequence[Request], open_answers: set[int], arrivals: Arrivals, answers: dict[int, _Answer],
        start: float,
    ) -> None:  # fmt: skip
        """Until the engine is idle again: nothing may run into the next trial."""
        for index in sorted(open_answers):
            self._engine.abort(requests[index].request_id)
        deadline = time.monotonic() + ABORT_S
        while open_answers:
            self._take(answers, open_answers, arrivals, start, 0.1)
            if time.monotonic() > deadline:
                raise EngineError("the engine did not end the requests of a trial")


def _log(trace: Trace, index: int, answer: _Answer) -> RequestLog:
    traced = trace.requests[index]
    return RequestLog(
        index=index,
        scheduled_s=answer.scheduled_s,
        sent_s=answer.sent_s,
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
        error=answer.error,
    )


def _counters(stats: EngineStats) -> EngineCounters:
    counters = stats.counters
    return EngineCounters(
        prompt_tokens=None,
        generation_tokens=counters.generation_tokens,
        preemptions=counters.preemptions,
    )


class LiveMeasure:
    """Answers the questions of a tuner with runs on an engine."""

    def __init__(
        self,
        replayer: Replayer,
        parts: dict[str, Trace],
        sla: Sla,
        limits_of: Callable[[Setting], SchedulerLimits],
        *,
        accept_noise: bool,
    ) -> None:
        self._replayer, self._parts, self._sla, self._limits_of = replayer, parts, sla, limits_of
        self._accept_noise = accept_noise
        bounds = [term.bound for term in sla.terms if term.metric != "error"]
        self._patience_s = min(20.0, max(2.0, 3 * max(bounds, default=1.0)))

    def warm_up(self) -> None:
        """A run that nobody looks at: what happens once (imports, first pages of the cache) happens in it."""
        sys.setswitchinterval(SWITCH_S)
        trace = window(self._parts["tune"], 1.0, 0, WARM_UP_S)
        limits = self._limits_of(DEFAULT)
        self._replayer.run(trace, limits, salt="warm-up", patience_s=self._patience_s, seconds=WARM_UP_S)
        gc.collect()
        gc.freeze()  # what stays need not be looked through in the middle of a run

    def __call__(self, ask: Ask) -> Observation:
        began = time.monotonic()
        trace = window(self._parts[ask.part], ask.load, ask.seed, ask.seconds)
        salt = f"{ask.part} {ask.seed}"
        try:
            run = self._replayer.run(
                trace, self._limits_of(ask.setting), salt=salt, patience_s=self._patience_s, seconds=ask.seconds
            )
        except EngineDeadError:
            raise
        except EngineError as error:
            return Observation("failed", time.monotonic() - began, str(error)[:300])
        run = judged(run, (self._sla,), late_metrics=FROM_ARRIVAL)
        if self._accept_noise:
            run = replace(run, verdicts=tuple(v for v in run.verdicts if v.tripwire not in OTHERS_WORK))
        return observe(run, self._sla, time.monotonic() - began)
