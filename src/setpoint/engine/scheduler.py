"""Which tokens of which sequences to compute next: `plan = schedule(now)`, then `events = commit(plan, result, now)`.

There is no prefill phase and no decode phase. Every sequence has `num_computed` of `num_tokens`, and each step spends
one token budget so that the first catches up with the second: decodes first, then prompts under way, then waiting
sequences by (priority, arrival). Out of blocks, the running sequence that is last in that order is preempted: it
gives its blocks back and is computed again later, so the first one always advances. Pure: ids and counts, no tensors,
no clock, no thread.
"""

from __future__ import annotations

import itertools
import random
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Protocol

from setpoint.engine.blast_wall import Faults, client_error
from setpoint.engine.events import Event
from setpoint.engine.kv_cache import KVCache
from setpoint.engine.plan import LogitsRow, PlanEntry, RowSampling, RunnerInfo, StepPlan, StepResult
from setpoint.engine.queue_gate import QueueGate
from setpoint.engine.request import Request
from setpoint.engine.row_state import sequence_seed
from setpoint.engine.rows import Outcome, build_rows, take_rows
from setpoint.engine.sequence import ActiveRequest, Sequence, SequenceStatus
from setpoint.engine.stats import Counters
from setpoint.errors import EngineError

by_order = attrgetter("order")
PROBE_SEQ_ID = -1


class Drafter(Protocol):
    """Guesses the tokens that follow. What it proposes changes the speed, never the output."""

    def propose(self, token_ids: list[int], max_drafts: int) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """The first three are hot: assign a new value to `scheduler.limits` between any two steps."""

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_drafts: int = 0  # per sequence and step
    max_num_queued_reqs: int = 1024
    max_num_queued_tokens: int = 1 << 20


@dataclass(slots=True)
class _Step:
    """A plan while it is made. `budget` is what is left of the step's tokens."""

    budget: int
    entries: dict[int, PlanEntry] = field(default_factory=dict)  # by seq_id
    preempted: bool = False

    def add(self, entry: PlanEntry) -> None:
        self.entries[entry.seq_id] = entry
        self.budget -= len(entry.token_ids)

    def drop(self, seq_id: int) -> None:
        entry = self.entries.pop(seq_id, None)
        if entry is not None:
            self.budget += len(entry.token_ids)


class Scheduler:
    """All methods but `validate`, `reserve` and reading the counters belong to one thread."""

    def __init__(
        self,
        info: RunnerInfo,
        limits: SchedulerLimits | None = None,
        *,
        enable_prefix_caching: bool = True,
        seed: int | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        self.limits = limits or SchedulerLimits()
        self.queue = QueueGate(self.limits.max_num_queued_reqs, self.limits.max_num_queued_tokens)
        self.kv = KVCache(info, prefix_caching=enable_prefix_caching)
        self.vocab_size = info.vocab_size
        capacity = self.kv.capacity_tokens
        self.max_model_len = info.max_model_len if capacity is None else min(info.max_model_len, capacity)
        self.counters = Counters()
        self.faults: Faults | None = None
        self.running: list[Sequence] = []  # both sorted by order
        self.waiting: list[Sequence] = []
        self._drafter = drafter
        self._random = random.Random(seed)
        self._requests: dict[str, ActiveRequest] = {}
        self._sequences: dict[int, Sequence] = {}
        self._arrivals = itertools.count()
        self._seq_ids = itertools.count()
        self._events: list[Event] = []  # of the step under way
        self._blocked: tuple[int, int, tuple[int, ...]] | None = None  # see _may_retry

    # --- requests in and out -------------------------------------------------------------------------------------

    def validate(self, request: Request) -> None:
        """Raise RequestError unless this request can be served. Thread-safe."""
        self.inject("validate", request.request_id)
        request.validate(vocab_size=self.vocab_size, max_model_len=self.max_model_len)

    def reserve(self, request: Request, now: float) -> None:
        """Count the request into the bounded queue, or raise QueueFullError. Thread-safe; `enqueue` must follow."""
        self.queue.enter(len(request.prompt_token_ids), now)

    def add(self, request: Request, now: float) -> None:
        """Validate, reserve and enqueue: the whole way in where there is one thread."""
        self.validate(request)
        self.reserve(request, now)
        self.enqueue(request, now)

    def enqueue(self, request: Request, now: float) -> None:
        """Put a validated, reserved request into the waiting list."""
        try:
            if request.request_id in self._requests:
                raise EngineError("a request with this id is already being served")
            active = ActiveRequest(request, now, self.kv.tree.root_key(request.tenant, request.cache_salt))
            params = request.params
            seed = self._random.getrandbits(63) if params.seed is None else params.seed
            arrival = next(self._arrivals)
            for index in range(params.n):
                seq = Sequence(
                    next(self._seq_ids),
                    active,
                    index,
                    arrival=arrival,
                    seed=sequence_seed(seed, index),
                    num_groups=len(self.kv.pools),
                    max_len=self.max_model_len,
                )
                active.unfinished.append(seq)
        except Exception:
            self.queue.leave(len(request.prompt_token_ids), now)
            raise
        self._requests[request.request_id] = active
        for seq in active.unfinished:
            self._sequences[seq.seq_id] = seq
            insort(self.waiting, seq, key=by_order)

    def abort(self, request_id: str, index: int | None, now: float) -> list[Event]:
        """End one sequence of a request, or all; their blocks are free on return. Unknown ids are ignored."""
        active = self._requests.get(request_id)
        if active is None:
            return []
        events = []
        for seq in list(active.unfinished):
            if index is None or seq.index == index:
                self.counters.aborted_by_state[seq.state] += 1
                events.append(self._finish(seq, Outcome(finish_reason="abort"), now))
        return events

    def abort_all(self, now: float) -> list[Event]:
        return [event for request_id in list(self._requests) for event in self.abort(request_id, None, now)]

    def has_request(self, request_id: str) -> bool:
        return request_id in self._requests

    def inject(self, point: str, request_id: str) -> None:
        """A named place where tests make a request fail."""
        if self.faults is not None:
            self.faults(point, request_id)

    @property
    def has_work(self) -> bool:
        return bool(self._sequences or self._events)

    # --- planning ------------------------------------------------------------------------------------------------

    def schedule(self, now: float) -> StepPlan:
        step = _Step(self.limits.max_num_batched_tokens)
        prefills = []
        for seq in list(self.running):
            if len(seq.token_ids) - seq.num_computed > 1:
                prefills.append(seq)
            else:
                self._guarded(self._advance, seq, step, now)
        for seq in prefills:
            self._guarded(self._advance, seq, step, now)
        if self.waiting and not step.preempted:
            self._admit_waiting(step, now)
        return StepPlan(tuple(step.entries.values()))

    def _guarded(self, place: Callable[[Sequence, _Step, float], None], seq: Sequence, step: _Step, now: float) -> None:
        """A failure over one sequence fails its request and nobody else's."""
        try:
            place(seq, step, now)
        except Exception as error:
            for sibling in seq.owner.unfinished:
                step.drop(sibling.seq_id)
            self._events += self.fail(seq, error, now)

    def _advance(self, seq: Sequence, step: _Step, now: float) -> None:
        """Plan the next tokens of a running sequence, preempting from the end of the order if blocks run out."""
        if seq.status is not SequenceStatus.RUNNING or step.budget <= 0:
            return
        self.inject("schedule", seq.owner.request.request_id)
        missing = seq.num_tokens - seq.num_computed
        if missing == 1 and self._drafter is not None:
            self._draft(seq, step)
        wanted = min(missing + len(seq.drafts), step.budget)
        self.inject("allocate", seq.owner.request.request_id)
        covered = self.kv.grow(seq, seq.num_computed + wanted)
        while covered <= seq.num_computed:
            victim = self.running[-1]
            if len(self.running) == 1:
                raise EngineError("the KV cache cannot hold this sequence")  # validate() excludes it
            self._preempt(victim, step)
            if victim is seq:
                return
            covered = self.kv.grow(seq, seq.num_computed + wanted)
        self._plan_entry(seq, min(wanted, covered - seq.num_computed), step)

    def _draft(self, seq: Sequence, step: _Step) -> None:
        """Ask for drafts, leaving a token of budget to every other running sequence."""
        assert self._drafter is not None
        room = min(
            self.limits.max_drafts,
            seq.max_tokens - seq.num_output - 1,
            step.budget - 1 - (len(self.running) - len(step.entries) - 1),
        )
        seq.drafts = self._drafter.propose(seq.token_ids, room)[:room] if room > 0 else []

    def _plan_entry(self, seq: Sequence, num_new: int, step: _Step) -> None:
        self.inject("prepare", seq.owner.request.request_id)
        start = seq.num_computed
        missing = seq.num_tokens - start
        drafts = seq.drafts[: max(0, num_new - missing)]
        tokens = [*seq.token_ids[start : start + num_new], *drafts]
        rows = build_rows(seq, num_new, drafts)
        step.add(PlanEntry(seq.seq_id, tokens, start, seq.block_tables, rows, len(drafts)))

    def _preempt(self, seq: Sequence, step: _Step) -> None:
        """Take a running sequence's blocks; what it published may still be cached when it comes back."""
        step.drop(seq.seq_id)
        step.preempted = True
        self.kv.release(seq)
        seq.drafts = []
        seq.status = SequenceStatus.WAITING
        seq.num_preemptions += 1
        self.counters.preemptions += 1
        self.running.remove(seq)
        insort(self.waiting, seq, key=by_order)

    def _admit_waiting(self, step: _Step, now: float) -> None:
        """Start waiting sequences in order until budget, places or blocks run out."""
        # No more sequences than tokens in a step, so that each running one advances in every step.
        max_running = min(self.limits.max_num_seqs, self.limits.max_num_batched_tokens)
        if len(self.running) >= max_running:
            return
        for seq in list(self.waiting):
            if step.budget <= 0 or len(self.running) >= max_running:
                return
            if seq.status is not SequenceStatus.WAITING or self.is_deferred(seq):
                continue
            if not self._may_retry(seq):
                return
            self._guarded(self._admit, seq, step, now)
            if seq.status is SequenceStatus.WAITING:  # no room for it; nobody overtakes
                return

    def is_deferred(self, seq: Sequence) -> bool:
        """Whether a sibling is computing the full prompt blocks that this sequence will then find in the cache."""
        leader = seq.owner.leader
        return (
            leader is not None
            and leader is not seq
            and leader.status is SequenceStatus.RUNNING
            and leader.num_computed < self._shareable_tokens(seq)
        )

    def _shareable_tokens(self, seq: Sequence) -> int:
        if not self.kv.prefix_caching:
            return 0
        return (seq.num_prompt - 1) // self.kv.block_size * self.kv.block_size

    def _admit(self, seq: Sequence, step: _Step, now: float) -> None:
        self.inject("schedule", seq.owner.request.request_id)
        hit = self.kv.match(seq)
        if self.running and not self.kv.can_admit(seq, hit, self.running):
            self._blocked = (seq.seq_id, len(self.running), tuple(pool.num_free for pool in self.kv.pools))
            return
        self.inject("allocate", seq.owner.request.request_id)
        self.waiting.remove(seq)
        insort(self.running, seq, key=by_order)
        seq.status = SequenceStatus.RUNNING
        self.kv.take_hit(seq, hit)
        if seq.owner.leader is None or seq.owner.leader.status is not SequenceStatus.RUNNING:
            seq.owner.leader = seq
        if seq.first_scheduled_time is None:
            self._count_admission(seq, now)
        wanted = min(seq.num_tokens - seq.num_computed, step.budget)
        covered = self.kv.grow(seq, seq.num_computed + wanted)
        if covered <= seq.num_computed:
            raise EngineError("the KV cache cannot hold this sequence")  # can_admit() and validate() exclude it
        self._plan_entry(seq, covered - seq.num_computed, step)

    def _may_retry(self, seq: Sequence) -> bool:
        """False while nothing was freed since this sequence last found no room: spares a lookup per step."""
        if self._blocked is None or self._blocked[0] != seq.seq_id:
            return True
        _, num_running, free = self._blocked
        freed = any(pool.num_free > before for pool, before in zip(self.kv.pools, free, strict=True))
        return freed or len(self.running) < num_running

    def _count_admission(self, seq: Sequence, now: float) -> None:
        seq.first_scheduled_time = now
        seq.num_cached_tokens = seq.num_computed
        counters = self.counters
        if self.kv.prefix_caching:
            counters.prefix_queries += seq.num_prompt
            counters.prefix_hits += seq.num_cached_tokens
        if seq.owner.queued:
            seq.owner.queued = False
            self.queue.leave(seq.num_prompt, now)
            counters.prompt_tokens += seq.num_prompt
            counters.prompt_tokens_cached += seq.num_cached_tokens

    def probe(self) -> StepPlan | None:
        """A plan of one token of nobody's, to see whether the runner works at all; None when no block is free.

        Its blocks are borrowed for the time of one `execute` only.
        """
        if any(pool.num_free == 0 for pool in self.kv.pools):
            return None
        tables = tuple([pool.acquire()] for pool in self.kv.pools)
        for pool, (block,) in zip(self.kv.pools, tables, strict=True):
            pool.release(block)
        row = LogitsRow(0, RowSampling(temperature=0.0))
        return StepPlan((PlanEntry(PROBE_SEQ_ID, (0,), 0, tables, (row,)),))

    # --- results -------------------------------------------------------------------------------------------------

    def commit(self, plan: StepPlan, result: StepResult, now: float) -> list[Event]:
        """Take what the runner computed; every event of the step, failures met while planning included."""
        if plan.entries:
            self.counters.step_tokens.observe(plan.num_tokens)
        for position, entry in enumerate(plan.entries):
            seq = self._sequences.get(entry.seq_id)
            if seq is None or seq.status is not SequenceStatus.RUNNING or seq.num_computed != entry.start:
                continue  # aborted since the plan was made
            try:
                event = self._commit_entry(seq, entry, result, position, now)
            except Exception as error:
                self._events += self.fail(seq, error, now)
            else:
                if event is not None:
                    self._events.append(event)
        return self.take_events()

    def take_events(self) -> list[Event]:
        """What was not handed over yet: after a `schedule` or `commit` that raised."""
        events, self._events = self._events, []
        return events

    def _commit_entry(
        self, seq: Sequence, entry: PlanEntry, result: StepResult, position: int, now: float
    ) -> Event | None:
        computed = result.entries[position]
        if computed.error is not None:
            raise computed.error
        self.inject("commit", seq.owner.request.request_id)
        outcome = take_rows(seq, entry, computed.rows, self.vocab_size)
        seq.drafts = []
        num_drawn = len(outcome.token_ids)
        self.counters.generation_tokens += num_drawn
        if entry.num_drafts:
            self.counters.draft_tokens += entry.num_drafts
            self.counters.accepted_tokens += max(0, num_drawn - 1)
        self.kv.settle(seq)
        if outcome.finish_reason is not None:
            return self._finish(seq, outcome, now)
        return self._event(seq, outcome, now) if num_drawn else None

    def fail(self, seq: Sequence, error: Exception, now: float) -> list[Event]:
        """Fail the whole request of a sequence. What the client sees of an unexpected error is its being one."""
        outcome = Outcome(finish_reason="error", error=client_error(error))
        return [self._finish(sibling, outcome, now) for sibling in list(seq.owner.unfinished)]

    def fail_running(self, error: Exception, now: float) -> list[Event]:
        """Fail every request that has a running sequence."""
        return [event for seq in list(self.running) if seq.owner.unfinished for event in self.fail(seq, error, now)]

    def fail_all(self, error: Exception, now: float) -> list[Event]:
        """Fail every request."""
        events = []
        for active in list(self._requests.values()):
            events += self.fail(active.unfinished[0], error, now)
        return events

    def request_id_of(self, seq_id: int) -> str:
        return self._sequences[seq_id].owner.request.request_id

    def _finish(self, seq: Sequence, outcome: Outcome, now: float) -> Event:
        """Take a sequence out, wherever it stands, and give its blocks back."""
        assert outcome.finish_reason is not None
        active = seq.owner
        (self.running if seq.status is SequenceStatus.RUNNING else self.waiting).remove(seq)
        seq.status = SequenceStatus.FINISHED
        del self._sequences[seq.seq_id]
        active.unfinished.remove(seq)
        if not active.unfinished:
            del self._requests[active.request.request_id]
            if active.queued:
                active.queued = False
                self.queue.leave(seq.num_prompt, now)
        self.kv.release(seq)
        self.counters.finished[outcome.finish_reason] += 1
        return self._event(seq, outcome, now)

    def _event(self, seq: Sequence, outcome: Outcome, now: float) -> Event:
        return Event(
            request_id=seq.owner.request.request_id,
            index=seq.index,
            token_ids=outcome.token_ids,
            logprobs=outcome.logprobs,
            prompt_logprobs=outcome.prompt_logprobs,
            finish_reason=outcome.finish_reason,
            stop_reason=outcome.stop_reason,
            error=outcome.error,
            num_cached_tokens=seq.num_cached_tokens,
            num_output_tokens=seq.num_output,
            num_preemptions=seq.num_preemptions,
            time=now,
            arrival_time=seq.arrival_time,
            first_scheduled_time=seq.first_scheduled_time,
        )

    # --- checks --------------------------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raise AssertionError if an invariant is broken. For tests: walks everything."""
        for name, queue, status in (
            ("running", self.running, SequenceStatus.RUNNING),
            ("waiting", self.waiting, SequenceStatus.WAITING),
        ):
            if any(seq.status is not status for seq in queue):
                raise AssertionError(f"a sequence in {name} has another status")
            if [seq.order for seq in queue] != sorted({seq.order for seq in queue}):
                raise AssertionError(f"{name} is not in order")
        if {seq.seq_id for seq in (*self.running, *self.waiting)} != set(self._sequences):
            raise AssertionError("a sequence is in no queue, or in two")
        if any(seq.num_computed >= seq.num_tokens for seq in self.running):
            raise AssertionError("a running sequence has nothing left to compute")
        if any(table for seq in self.waiting for table in seq.block_tables):
            raise AssertionError("a waiting sequence holds blocks")
        if self.queue.num_requests < sum(active.queued for active in self._requests.values()):
            raise AssertionError("the queue counts too few requests")
        self.kv.check_integrity(self.running)
