"""What the scheduler tells of every sequence, and what is kept of those that are over.

One line at each place where something changes for a sequence, and three in a step: `begin`, `planned`, `end`. Time
comes from their callers. Only sequences whose prompt is being computed cost something in each step.
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Collection
from typing import TYPE_CHECKING

from setpoint.engine.limits import SchedulerLimits
from setpoint.engine.plan import PlanEntry
from setpoint.engine.timeline import (
    KV_BLOCKS,
    MIXED,
    MIXED_STEPS,
    MOVING,
    NO_QUEUE,
    OUTSIDE,
    PACER,
    PLACES,
    PREFILL_TOKENS,
    PURE,
    PURE_STEPS,
    STEP_TOKENS,
    TOKEN_BUDGET,
    Kind,
    Timeline,
    new_clocks,
)

if TYPE_CHECKING:
    from setpoint.engine.roster import Roster
    from setpoint.engine.sequence import ActiveRequest, Sequence

MAX_FINISHED = 1024  # requests that can still be explained
MAX_BYTES = 4 << 20  # that they may take together
_TIMELINE_BYTES, _SPAN_BYTES = 700, 450  # about what one takes


class Timelines:
    """Belongs to the thread that schedules; `read` to any."""

    def __init__(self, *, max_finished: int = MAX_FINISHED, max_bytes: int = MAX_BYTES) -> None:
        self.clocks = new_clocks()
        self._max_finished, self._max_bytes = max_finished, max_bytes
        self._now = 0.0  # what the clocks know of
        self._planned_at = 0.0
        self._queue_cause = NO_QUEUE
        self._is_paced = False  # the step under way
        self._fresh: list[Timeline] = []  # arrived since the last step began
        self._computing: dict[int, tuple[Sequence, Timeline]] = {}  # by seq_id: a prompt is computed
        self.aside: dict[int, Sequence] = {}  # by seq_id: waits for a sibling or the disk
        self._arrived: dict[int, int] = {}  # by priority: sequences, ever
        self._live: dict[str, list[Timeline]] = {}
        self._finished: OrderedDict[str, list[Timeline]] = OrderedDict()
        self._num_bytes = 0
        self._lock = threading.Lock()  # around the two dictionaries, at the ends of requests only

    # --- what happens to a sequence ------------------------------------------------------------------------------

    def arrive(self, active: ActiveRequest, num_waiting: int, now: float) -> None:
        """A request waits from now on; it was submitted earlier where an inbox lies between."""
        request = active.request
        submitted = now if request.submitted_time is None else min(request.submitted_time, now)
        priority, smaller = request.priority, 0
        if len(self._arrived) > 1 or priority not in self._arrived:
            smaller = self._num_arrived_before(priority)
        for seq in active.unfinished:
            timeline = seq.timeline
            timeline.index, timeline.tenant, timeline.num_prompt = seq.index, request.tenant, seq.num_prompt
            timeline.submitted, timeline.num_ahead, timeline.seen_priority = submitted, num_waiting, smaller
            timeline.begin(Kind.INBOX, submitted, self.clocks)
            self._fresh.append(timeline)
        self._arrived[priority] = self._arrived.get(priority, 0) + len(active.unfinished)
        with self._lock:
            self._live[request.request_id] = [seq.timeline for seq in active.unfinished]

    def _num_arrived_before(self, priority: int) -> int:
        return sum(count for other, count in self._arrived.items() if other < priority)

    def step_aside(self, seq: Sequence) -> None:
        """A waiting sequence is passed over: for a sibling, or for what is read from disk."""
        if seq.seq_id not in self.aside:
            self.aside[seq.seq_id] = seq
            self._enter(seq.timeline, Kind.SIBLING if seq.fetch is None else Kind.FETCH, self._now)

    def wait_again(self, seq: Sequence) -> None:
        """It need not step aside any more, and waits like the others."""
        del self.aside[seq.seq_id]
        self._enter(seq.timeline, Kind.PREEMPTED if seq.timeline.num_preemptions else Kind.QUEUE, self._now)

    def start(self, seq: Sequence, fetched: Collection[bytes], now: float) -> None:
        """A waiting sequence has blocks, and its cached prefix in them; `fetched` was read from disk for it."""
        timeline, restore = seq.timeline, seq.restore
        self.aside.pop(seq.seq_id, None)
        if not timeline.is_started:
            timeline.is_started = True
            restored = 0 if restore is None else restore.num_restored
            if restore is not None and fetched:
                staged = set(map(id, fetched))
                blocks = {index for index, _, payload in restore.pending if id(payload) in staged}
                num_blocks = len({index for index, _, _ in restore.pending})
                timeline.disk_tokens = restored * len(blocks) // max(num_blocks, 1)
            timeline.memory_tokens = restored - timeline.disk_tokens
            timeline.cached_tokens = seq.num_cached_tokens - restored
            timeline.divergence = seq.owner.divergence if seq.index == 0 else None
            if len(self._arrived) > 1:
                smaller = self._num_arrived_before(seq.owner.request.priority)
                timeline.overtaken_by = smaller - timeline.seen_priority
        timeline.start_length = len(seq.token_ids)
        kind = Kind.RESTORE if restore is not None else self._computing_kind(seq)
        self._enter(timeline, kind, now)
        self._computing[seq.seq_id] = (seq, timeline)

    @staticmethod
    def _computing_kind(seq: Sequence) -> Kind:
        return Kind.RECOMPUTE if seq.num_computed < seq.timeline.high_water else Kind.PREFILL

    def preempt(self, seq: Sequence) -> None:
        """A running sequence is about to lose its blocks."""
        timeline = seq.timeline
        timeline.num_preemptions += 1
        timeline.high_water = max(timeline.high_water, seq.num_computed)
        timeline.chunk = 0
        self._settle(seq, timeline)
        self._computing.pop(seq.seq_id, None)
        self._enter(timeline, Kind.PREEMPTED, self._now)

    def finish(self, seq: Sequence, reason: str, now: float) -> None:
        """A sequence is about to be taken out, wherever it stands."""
        timeline, request_id = seq.timeline, seq.owner.request.request_id
        self._computing.pop(seq.seq_id, None)
        self.aside.pop(seq.seq_id, None)
        timeline.num_output = len(seq.token_ids) - seq.num_prompt
        if timeline.num_output and timeline.first_token is None:
            timeline.first_token = self._now  # the end of the last step, even where it ends later
        now = max(now, timeline.submitted if timeline.phase is None else timeline.phase.since)
        timeline.close(now, self.clocks, self._queue_cause)
        timeline.finished, timeline.finish_reason, timeline.phase = now, reason, None
        if len(seq.owner.unfinished) <= 1:
            self._keep(request_id)

    def _enter(self, timeline: Timeline, kind: Kind, now: float) -> None:
        timeline.close(now, self.clocks, self._queue_cause)
        timeline.begin(kind, now, self.clocks)

    # --- a step --------------------------------------------------------------------------------------------------

    def begin(self, now: float) -> None:
        """A step is about to be planned."""
        if self._computing:
            for seq, timeline in list(self._computing.values()):
                self._settle(seq, timeline)
        clocks = self.clocks
        clocks[OUTSIDE] += now - self._now
        clocks[self._queue_cause] += now - self._planned_at
        self._now = self._planned_at = now
        if self._fresh:
            for timeline in self._fresh:
                if timeline.finished is None:
                    self._enter(timeline, Kind.QUEUE, now)
            self._fresh.clear()

    def planned(
        self,
        limits: SchedulerLimits,
        max_running: int,
        budget: int,
        entries: dict[int, PlanEntry],
        roster: Roster,
        *,
        is_paced: bool = False,
    ) -> None:
        """What the step computes; `max_running` is the pacer's bound, `budget` what is left of the step's tokens.

        `is_paced`: these were fewer than the limits allow.
        """
        self._is_paced = is_paced
        if not roster.waiting:
            self._queue_cause = NO_QUEUE
        elif len(roster.running) >= limits.max_num_seqs:
            self._queue_cause = PLACES
        elif len(roster.running) >= max_running:
            self._queue_cause = PACER
        else:
            self._queue_cause = KV_BLOCKS if budget > 0 else PACER if is_paced else TOKEN_BUDGET
        for seq_id, (seq, timeline) in self._computing.items():
            entry = entries.get(seq_id)
            timeline.chunk = 0 if entry is None else len(entry.token_ids)
            if entry is not None and timeline.phase is not None and timeline.phase.kind is Kind.RESTORE:
                self._enter(timeline, self._computing_kind(seq), self._now)  # the last blocks come in this step

    def end(self, now: float, num_tokens: int, moving_s: float) -> None:
        """The step is over, and nothing of it was taken yet; `moving_s` of it went to blocks that were copied."""
        clocks, seconds = self.clocks, now - self._now
        self._now = now
        if moving_s > 0.0:
            moving_s = min(moving_s, seconds)
            clocks[MOVING] += moving_s
            seconds -= moving_s
        if not num_tokens:
            clocks[OUTSIDE] += seconds
            return
        num_prefill = self._count_chunks(seconds, num_tokens) if self._computing else 0
        clocks[STEP_TOKENS] += num_tokens
        if num_prefill:
            clocks[MIXED] += seconds
            clocks[MIXED_STEPS] += 1
            clocks[PREFILL_TOKENS] += num_prefill
        else:
            clocks[PURE] += seconds
            clocks[PURE_STEPS] += 1

    def _count_chunks(self, seconds: float, num_tokens: int) -> int:
        """Share a step out among the prompts that are computed; returns their tokens in it."""
        num_prefill = 0
        for _, timeline in self._computing.values():
            phase, chunk = timeline.phase, timeline.chunk
            assert phase is not None
            if chunk:
                num_prefill += chunk
                others = num_tokens - chunk
                phase.num_steps += 1
                phase.paced_steps += self._is_paced
                phase.num_tokens += chunk
                phase.others_tokens += others
                phase.others_s += seconds * others / num_tokens
            elif phase.kind is not Kind.RESTORE:
                phase.starved_steps += 1
                if self._is_paced:
                    phase.starved_by_pacer_s += seconds
                else:
                    phase.starved_s += seconds
        return num_prefill

    def _settle(self, seq: Sequence, timeline: Timeline) -> None:
        """Whether the last step brought a computing sequence to its next phase, at its end."""
        if seq.seq_id not in self._computing:
            return
        phase = timeline.phase
        if len(seq.token_ids) > timeline.start_length:  # it drew a token
            del self._computing[seq.seq_id]
            if timeline.first_token is None:
                timeline.first_token = self._now
            self._enter(timeline, Kind.DECODE, self._now)
        elif phase is not None and phase.kind is Kind.RECOMPUTE and seq.num_computed >= timeline.high_water:
            self._enter(timeline, self._computing_kind(seq), self._now)

    # --- what is kept --------------------------------------------------------------------------------------------

    def _keep(self, request_id: str) -> None:
        """A request is over: it can be explained until others have taken its room."""
        with self._lock:
            timelines = self._live.pop(request_id, None)
            if timelines is None:
                return
            self._num_bytes -= _bytes_of(self._finished.pop(request_id, []))
            self._finished[request_id] = timelines
            self._num_bytes += _bytes_of(timelines)
            while self._finished and (len(self._finished) > self._max_finished or self._num_bytes > self._max_bytes):
                self._num_bytes -= _bytes_of(self._finished.popitem(last=False)[1])

    def read(self, request_id: str, now: float) -> list[Timeline] | None:
        """Copies of a request's timelines, one a sequence; None if it is not known, or no more. Thread-safe.

        A sequence that runs is told as far as `now`.
        """
        with self._lock:
            timelines = self._live.get(request_id) or self._finished.get(request_id)
        return None if timelines is None else [self._read(timeline, now) for timeline in timelines]

    def _read(self, timeline: Timeline, now: float) -> Timeline:
        while True:  # until nothing has moved meanwhile; a phase changes some ten times in a request's life
            phase = timeline.phase
            reading = copy.copy(timeline)
            reading.spans = list(timeline.spans)
            is_over = phase is not None and reading.spans and reading.spans[-1].end > phase.since
            if timeline.phase is phase and not is_over:
                break
        if phase is not None:
            reading.close(max(now, phase.since), list(self.clocks), self._queue_cause)
        return reading

    @property
    def num_live(self) -> int:
        return len(self._live)

    @property
    def num_finished(self) -> int:
        return len(self._finished)

    @property
    def num_bytes(self) -> int:
        return self._num_bytes


def _bytes_of(timelines: list[Timeline]) -> int:
    return sum(_TIMELINE_BYTES + _SPAN_BYTES * len(timeline.spans) for timeline in timelines)
