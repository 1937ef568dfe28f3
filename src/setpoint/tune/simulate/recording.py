"""What a run of the engine did, step by step, and the same run once more on a virtual clock.

The scheduler is deterministic: what it plans follows from what it was told and when. So a recording is that: requests
and aborts between two steps, the times at which a step was planned and committed, what the runner drew. Told the same,
a simulated engine must plan the same steps. A difference is a bug of the simulator, never an error of a cost model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

from setpoint.engine.events import Event
from setpoint.engine.plan import EntryResult, RowResult, RunnerInfo, StepPlan, StepResult
from setpoint.engine.request import Request
from setpoint.engine.scheduler import Scheduler
from setpoint.errors import EngineError
from setpoint.runtime.fake import VirtualClock


@dataclass(frozen=True, slots=True)
class Told:
    """A request that came, or with `index_or_all` the end of one that should end."""

    at_s: float
    request: Request | None = None
    abort: tuple[str, int | None] | None = None


@dataclass(frozen=True, slots=True)
class RecordedStep:
    planned_s: float  # clock of `schedule`
    committed_s: float  # and of `commit`
    told: tuple[Told, ...]  # since the step before
    digest: bytes  # of the plan
    tokens: tuple[tuple[int, ...], ...]  # by entry and row

    @property
    def seconds(self) -> float:
        return self.committed_s - self.planned_s


@dataclass(slots=True)
class Recording:
    """Fills while the engine runs; `steps` are those that computed something or were planned with work waiting."""

    steps: list[RecordedStep] = field(default_factory=list)


def plan_digest(plan: StepPlan) -> bytes:
    """16 bytes that depend on every entry of a plan: who, from where, how many tokens and drafts, rows and blocks."""
    digest = hashlib.blake2b(digest_size=16)
    for entry in plan.entries:
        head = (entry.seq_id, entry.start, len(entry.token_ids), entry.num_drafts, [row.offset for row in entry.rows])
        digest.update(repr(head).encode())
        for table in entry.block_tables:
            digest.update(repr(list(table)).encode())
    moves = [(s.group, s.block) for s in plan.saves], [(r.seq_id, r.group, r.block) for r in plan.restores]
    digest.update(repr(moves).encode())
    return digest.digest()


class RecordedScheduler(Scheduler):
    """A scheduler that notes what it is told and what it plans."""

    recording: Recording | None = None
    _told: list[Told]
    _planned: tuple[float, bytes] | None = None

    def record(self) -> Recording:
        """Begin; before the first request."""
        self.recording, self._told = Recording(), []
        return self.recording

    def enqueue(self, request: Request, now: float) -> None:
        if self.recording is not None:
            self._told.append(Told(now, request=request))
        super().enqueue(request, now)

    def abort(self, request_id: str, index: int | None, now: float) -> list[Event]:
        if self.recording is not None:
            self._told.append(Told(now, abort=(request_id, index)))
        return super().abort(request_id, index, now)

    def schedule(self, now: float) -> StepPlan:
        worked = self.recording is not None and self.has_work
        plan = super().schedule(now)
        self._planned = (now, plan_digest(plan)) if worked else None
        return plan

    def commit(self, plan: StepPlan, result: StepResult, now: float) -> list[Event]:
        if self.recording is not None and self._planned is not None:
            planned_s, digest = self._planned
            tokens = tuple(tuple(row.token_id for row in entry.rows) for entry in result.entries)
            self.recording.steps.append(RecordedStep(planned_s, now, tuple(self._told), digest, tokens))
            self._told = []
        return super().commit(plan, result, now)


@dataclass(slots=True)
class RecordedRunner:
    """Takes the time that was recorded and draws what was drawn."""

    info: RunnerInfo
    clock: VirtualClock
    recording: Recording
    num_steps: int = 0

    def execute(self, plan: StepPlan) -> StepResult:
        step = self.recording.steps[self.num_steps]
        self.num_steps += 1
        self.clock.advance_to(step.committed_s)
        if [len(entry.rows) for entry in plan.entries] != [len(tokens) for tokens in step.tokens]:
            raise EngineError(f"step {self.num_steps} wants other rows than were recorded")
        drawn = [EntryResult([RowResult(token) for token in tokens]) for tokens in step.tokens]
        return StepResult(drawn, [None] * len(plan.saves))

    def close(self) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Replayed:
    """`diverged_at`: the first step that was planned otherwise, counted from 0; None = all plans are identical."""

    steps: int
    diverged_at: int | None
    events: list[Event]


def replay(recording: Recording, make: Callable[[], Scheduler], info: RunnerInfo) -> Replayed:
    """`make` gives a scheduler that is set up as the recorded one was."""
    clock, scheduler = VirtualClock(), make()
    runner = RecordedRunner(info, clock, recording)
    events: list[Event] = []
    for number, step in enumerate(recording.steps):
        for told in step.told:
            if told.request is not None:
                scheduler.reserve(told.request, told.at_s)
                scheduler.enqueue(told.request, told.at_s)
            elif told.abort is not None:
                events += scheduler.abort(*told.abort, told.at_s)
        clock.advance_to(step.planned_s)
        plan = scheduler.schedule(clock())
        if plan_digest(plan) != step.digest:
            return Replayed(number, number, events)
        result = runner.execute(plan)
        events += scheduler.commit(plan, result, clock())
    return Replayed(len(recording.steps), None, events)
