"""Which tokens of which sequences to compute next: `plan = schedule(now)`, then `events = commit(plan, result, now)`.

There is no prefill phase and no decode phase. Every sequence has `num_computed` of `num_tokens`, and each step spends
one token budget so that the first catches up with the second: decodes first, then prompts under way, then waiting
sequences by (priority, arrival). Out of blocks, the running sequence that is last in that order is preempted: it
gives its blocks back and is computed again later, so the first one always advances. Pure: ids and counts, no tensors,
no clock, no thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from setpoint.engine.blast_wall import Faults
from setpoint.engine.events import Event
from setpoint.engine.kv_cache import KVCache
from setpoint.engine.lower_tiers import LowerTiers
from setpoint.engine.plan import KVRestore, LogitsRow, PlanEntry, RowSampling, RunnerInfo, StepPlan, StepResult
from setpoint.engine.queue_gate import QueueGate
from setpoint.engine.request import Request
from setpoint.engine.restore_cost import ALONE_S, STALL_S
from setpoint.engine.roster import Roster
from setpoint.engine.rows import Outcome, build_rows, take_rows
from setpoint.engine.sequence import Sequence, SequenceStatus
from setpoint.engine.sessions import SessionLimits, Sessions
from setpoint.engine.stats import Counters, SpeculationCounters
from setpoint.errors import ConfigError, EngineError, OutputViolationError

log = logging.getLogger(__name__)

PROBE_SEQ_ID = -1


class DraftPlanner(Protocol):
    """Guesses the tokens that follow. What it does changes the speed, never the output."""

    counters: SpeculationCounters

    def draft(self, decodes: list[Sequence], num_prefill: int, room: int, max_drafts: int) -> None:
        """Set the `drafts` of running sequences of which one token is missing: `room` tokens at most, all together.

        At most `max_drafts` each, and none that the sequence has no place for. About `num_prefill` more tokens will be
        in the step.
        """
        ...

    def verified(self, seq: Sequence, num_drafts: int, num_accepted: int) -> None:
        """What became of the drafts of a sequence."""
        ...

    def learn(self, num_tokens: int, num_prefill: int, seconds: float) -> None:
        """A step of so many tokens, of which `num_prefill` belong to prompts, took so long."""
        ...

    def finished(self, seq: Sequence) -> None:
        """A sequence came to its own end."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """The first four are hot: assign a new value to `scheduler.limits` between any two steps."""

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_drafts: int = 0  # per sequence and step
    jump_forward: bool = True  # tokens that a grammar forces are taken without a forward pass of their own
    max_num_queued_reqs: int = 1024
    max_num_queued_tokens: int = 1 << 20
    session_ttl_s: float = 600.0  # since the last request
    session_share: float = 0.5  # of the KV cache that the sessions of a tenant may protect


@dataclass(slots=True)
class _Step:
    """A plan while it is made. Budgets are what is left of the step's tokens, and of the bytes to restore."""

    budget: int
    restore_budget: int = 0
    entries: dict[int, PlanEntry] = field(default_factory=dict)  # by seq_id
    restores: dict[int, list[KVRestore]] = field(default_factory=dict)

    def add(self, entry: PlanEntry) -> None:
        self.entries[entry.seq_id] = entry
        self.budget -= len(entry.token_ids)

    def restore(self, seq_id: int, moves: list[KVRestore]) -> None:
        self.restores[seq_id] = moves
        self.restore_budget -= sum(len(move.payload) for move in moves)

    def drop(self, seq_id: int) -> None:
        self.restores.pop(seq_id, None)
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
        speculator: DraftPlanner | None = None,
        lower: LowerTiers | None = None,
    ) -> None:
        if not info.kv_groups or any(group.num_blocks < 1 for group in info.kv_groups) or info.block_size < 1:
            raise ConfigError("the KV cache holds no block; raise --kv-cache-memory-bytes")
        self.limits = limits or SchedulerLimits()
        self.kv = KVCache(info, prefix_caching=enable_prefix_caching, lower=lower)
        self.queue = QueueGate(self.limits.max_num_queued_reqs, self.limits.max_num_queued_tokens)
        self.counters = Counters()
        self.faults: Faults | None = None
        self.vocab_size = info.vocab_size
        capacity = self.kv.capacity_tokens
        self.max_model_len = info.max_model_len if capacity is None else min(info.max_model_len, capacity)
        quota_blocks = int(max(pool.num_blocks for pool in self.kv.pools) * self.limits.session_share)
        session_limits = SessionLimits(self.limits.session_ttl_s, quota_blocks)
        self.sessions = Sessions(session_limits, self.kv.protect, self.kv.unprotect, info.block_size)
        self._roster = Roster(self.kv, self.queue, self.counters, self.sessions, max_len=self.max_model_len, seed=seed)
        self.running, self.waiting = self._roster.running, self._roster.waiting  # read only, in order
        self._speculator = self._opened_speculator = speculator
        if speculator is not None:
            self.counters.speculation = speculator.counters
        self._planned_at = 0.0
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

    def enqueue(self, request: Request, now: float) -> None:
        """Let a validated, reserved request wait for its turn."""
        self._roster.enqueue(request, now)

    def add(self, request: Request, now: float) -> None:
        """Validate, reserve and enqueue: the whole way in where there is one thread."""
        self.validate(request)
        self.reserve(request, now)
        self.enqueue(request, now)

    def abort(self, request_id: str, index: int | None, now: float) -> list[Event]:
        """End one sequence of a request, or all; their blocks are free on return. Unknown ids are ignored."""
        return self._roster.abort(request_id, index, now)

    def abort_all(self, now: float) -> list[Event]:
        return [event for request_id in list(self._roster.requests) for event in self.abort(request_id, None, now)]

    def fail_all(self, error: Exception, now: float, *, running_only: bool = False) -> list[Event]:
        """End every request, or every one that has a running sequence, with an error."""
        requests = [seq.owner for seq in self.running] if running_only else list(self._roster.requests.values())
        return [event for active in requests for event in self._roster.fail(active, error, now)]

    def has_request(self, request_id: str) -> bool:
        return request_id in self._roster.requests

    @property
    def has_work(self) -> bool:
        return bool(self._roster.sequences or self._events)

    @property
    def num_unsaved(self) -> int:
        """Blocks of the pool that may not be on disk yet."""
        return 0 if self.kv.saves is None else self.kv.saves.num_behind

    def inject(self, point: str, request_id: str) -> None:
        """A named place where tests make a request fail."""
        if self.faults is not None:
            self.faults(point, request_id)

    def inject_entry(self, point: str, entry: PlanEntry) -> None:
        self._inject(point, self._roster.sequences[entry.seq_id])

    def _inject(self, point: str, seq: Sequence) -> None:
        if self.faults is not None:
            self.faults(point, seq.owner.request.request_id)

    def close(self) -> None:
        """Free what it holds besides the runner; nothing may be scheduled afterwards."""
        if self._opened_speculator is not None:
            self._opened_speculator.close()

    # --- planning ------------------------------------------------------------------------------------------------

    def schedule(self, now: float) -> StepPlan:
        step = self._begin_step(now)
        decodes: list[Sequence] = []
        prefills: list[Sequence] = []
        for seq in self.running:
            (prefills if len(seq.token_ids) - seq.num_computed > 1 else decodes).append(seq)
        if self._speculator is not None and decodes:
            self._draft(self._speculator, decodes, prefills, step.budget)
            if self._speculator is None:  # it failed
                for seq in decodes:
                    seq.drafts = []
        for seq in (*decodes, *prefills):
            self._guarded(self._advance, seq, step, now)
        if self.waiting:
            self._admit_waiting(step, now)
        saves = self.kv.saves.end() if self.kv.saves is not None else ()
        restores = tuple(move for moves in step.restores.values() for move in moves)
        return StepPlan(tuple(step.entries.values()), saves, restores)

    def _begin_step(self, now: float) -> _Step:
        step = _Step(self.limits.max_num_batched_tokens)
        self._planned_at = now
        self.sessions.expire(now)
        if self.kv.lower is not None and self.kv.saves is not None:
            others = any(seq.restore is None for seq in self.running)
            step.restore_budget = self.kv.lower.cost.restore_bytes_in(STALL_S if others else ALONE_S)
            self.kv.lower.poll()
            self.kv.saves.begin(step.budget, step.restore_budget, is_busy=bool(self._roster.sequences))
        return step

    def _guarded(self, place: Callable[[Sequence, _Step, float], None], seq: Sequence, step: _Step, now: float) -> None:
        """A failure over one sequence fails its request and nobody else's."""
        try:
            place(seq, step, now)
        except Exception as error:
            for sibling in seq.owner.unfinished:
                step.drop(sibling.seq_id)
            self._events += self._roster.fail(seq.owner, error, now)

    def _advance(self, seq: Sequence, step: _Step, now: float) -> None:
        """Plan the next tokens of a running sequence, preempting from the end of the order if blocks run out."""
        if seq.status is not SequenceStatus.RUNNING:
            return
        if seq.restore is not None and not self._restore(seq, step):
            return
        if step.budget <= 0:
            return
        if self.faults is not None:
            self._inject("schedule", seq)
        wanted = min(len(seq.token_ids) - seq.num_computed + len(seq.drafts), step.budget)
        if self.faults is not None:
            self._inject("allocate", seq)
        covered = self.kv.grow(seq, seq.num_computed + wanted)
        while covered <= seq.num_computed:
            victim = self.running[-1]
            if len(self.running) == 1:
                raise EngineError("the KV cache cannot hold this sequence")  # validate() excludes it
            step.drop(victim.seq_id)
            self._roster.preempt(victim)
            if victim is seq:
                return
            covered = self.kv.grow(seq, seq.num_computed + wanted)
        self._plan_entry(seq, min(wanted, covered - seq.num_computed), step)

    def _restore(self, seq: Sequence, step: _Step) -> bool:
        """Plan to fill blocks of a running sequence from lower tiers; True when none is left."""
        moves = self.kv.restore(seq, step.restore_budget)
        while not moves and seq.restore is not None and step.restore_budget > 0:  # no block is free
            victim = self.running[-1]
            step.drop(victim.seq_id)
            self._roster.preempt(victim)
            if victim is seq:
                return False
            moves = self.kv.restore(seq, step.restore_budget)
        step.restore(seq.seq_id, moves)
        return seq.restore is None

    def _draft(self, speculator: DraftPlanner, decodes: list[Sequence], prefills: list[Sequence], budget: int) -> None:
        """Ask for drafts, leaving a token of budget to every running sequence."""
        num_prefill = sum(len(seq.token_ids) - seq.num_computed for seq in prefills)
        if self.waiting and len(self.running) < self.limits.max_num_seqs:
            num_prefill += self.waiting[0].num_tokens
        num_prefill, room = min(num_prefill, budget - len(decodes)), budget - len(self.running)
        self._spared(speculator.draft, decodes, num_prefill, room, self.limits.max_drafts)

    def _spared(self, tell: Callable[..., None], *arguments: object) -> None:
        """Whoever guesses may fail, and fails alone: then nobody guesses any more."""
        try:
            tell(*arguments)
        except Exception as error:
            log.error("speculation failed (%s) and is off from now on", type(error).__name__)
            self._speculator = None

    def _plan_entry(self, seq: Sequence, num_new: int, step: _Step) -> None:
        if self.faults is not None:
            self._inject("prepare", seq)
        start = seq.num_computed
        drafts = seq.drafts[: max(0, num_new - (len(seq.token_ids) - start))] if seq.drafts else []
        rows, num_drafts = build_rows(seq, num_new, drafts)
        drafts = drafts[:num_drafts]
        tokens = seq.token_ids[start : start + num_new] + drafts
        step.add(PlanEntry(seq.seq_id, tokens, start, seq.block_tables, rows, len(drafts)))

    def _admit_waiting(self, step: _Step, now: float) -> None:
        """Start waiting sequences in order until budget, places or blocks run out."""
        max_running = self.limits.max_num_seqs
        if len(self.running) >= max_running:
            return
        for seq in list(self.waiting):
            if step.budget <= 0 or len(self.running) >= max_running:
                return
            if seq.status is not SequenceStatus.WAITING or self.is_deferred(seq) or self.kv.is_fetching(seq, now):
                continue
            if not self._may_retry(seq):
                return
            self._guarded(self._admit, seq, step, now)
            if seq.status is SequenceStatus.WAITING and not self.kv.is_fetching(seq, now):  # no room; nobody overtakes
                return

    def is_deferred(self, seq: Sequence) -> bool:
        """Whether a sibling is computing the full prompt blocks that this sequence will then find in the cache."""
        leader = seq.owner.leader
        if leader is None or leader.status is not SequenceStatus.RUNNING or not self.kv.prefix_caching:
            return False
        shareable = (seq.num_prompt - 1) // self.kv.block_size * self.kv.block_size
        return leader.num_computed < shareable

    def _admit(self, seq: Sequence, step: _Step, now: float) -> None:
        if self.faults is not None:
            self._inject("schedule", seq)
        if self._jump_first(seq, now):
            return
        hit = self.kv.match(seq, now)
        if hit is None:
            return
        if self.running and not self.kv.can_admit(seq, hit, self.running):
            self._blocked = (seq.seq_id, len(self.running), tuple(pool.num_free for pool in self.kv.pools))
            return
        if self.faults is not None:
            self._inject("allocate", seq)
        self._roster.start(seq)
        self.kv.take_hit(seq, hit)
        if seq.first_scheduled_time is None:
            self._roster.count_start(seq, now)
        if seq.restore is not None and not self._restore(seq, step):
            return
        covered = self.kv.grow(seq, seq.num_computed + min(seq.num_tokens - seq.num_computed, step.budget))
        if covered <= seq.num_computed:
            raise EngineError("the KV cache cannot hold this sequence")  # can_admit() and validate() exclude it
        self._plan_entry(seq, covered - seq.num_computed, step)

    def _jump_first(self, seq: Sequence, now: float) -> bool:
        """Let the tokens that a grammar begins with join the prompt; True where they are the whole output."""
        wanted = self.limits.jump_forward and seq.row_state.constraint is not None and seq.prompt_logprobs is None
        finish = seq.jump() if wanted and seq.first_scheduled_time is None else None
        if finish is None:
            return False
        outcome = Outcome(seq.take_unreported(), finish_reason=finish[0], stop_reason=finish[1])
        self._count_tokens(outcome)
        self._events.append(self._roster.finish(seq, outcome, now))
        return True

    def _may_retry(self, seq: Sequence) -> bool:
        """False while nothing was freed since this sequence last found no room: spares a lookup per step."""
        if self._blocked is None or self._blocked[0] != seq.seq_id:
            return True
        _, num_running, free = self._blocked
        freed = any(pool.num_free > before for pool, before in zip(self.kv.pools, free, strict=True))
        return freed or len(self.running) < num_running

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
        if self.kv.lower is not None:
            self._file_moves(self.kv.lower, plan, result, now)
        for position, entry in enumerate(plan.entries):
            seq = self._roster.sequences.get(entry.seq_id)
            if seq is None or seq.status is not SequenceStatus.RUNNING or seq.num_computed != entry.start:
                continue  # aborted since the plan was made
            try:
                event = self._commit_entry(seq, entry, result, position, now)
            except Exception as error:
                if isinstance(error, OutputViolationError):
                    self.counters.output_violations += 1
                self._events += self._roster.fail(seq.owner, error, now)
            else:
                if event is not None:
                    self._events.append(event)
        if self._speculator is not None and plan.entries:
            lengths = [(len(entry.token_ids), entry.num_drafts) for entry in plan.entries]
            num_prefill = sum(length for length, drafts in lengths if length > 1 + drafts)
            seconds = now - self._planned_at - result.moving_s
            self._spared(self._speculator.learn, plan.num_tokens, num_prefill, seconds)
        return self.take_events()

    def _file_moves(self, lower: LowerTiers, plan: StepPlan, result: StepResult, now: float) -> None:
        """Take what was read from the pool, and start over the sequences whose blocks could not be written."""
        assert self.kv.saves is not None
        self.kv.saves.file(plan, result)
        for seq_id in result.unrestored:
            seq = self._roster.sequences.get(seq_id)
            if seq is not None and seq.status is SequenceStatus.RUNNING:
                self._roster.preempt(seq)
        if result.unrestored:
            lower.give_up()
        saved_bytes = sum(len(payload) for payload in result.saved if payload is not None)
        lower.cost.observe_moves(saved_bytes, sum(len(move.payload) for move in plan.restores), result.moving_s)
        lower.cost.observe_step(plan.num_tokens, now - self._planned_at - result.moving_s)

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
        if self.faults is not None:
            self._inject("commit", seq)
        outcome = take_rows(seq, entry, computed.rows, self.vocab_size, jump=self.limits.jump_forward)
        seq.drafts = []
        num_drawn = outcome.num_drawn
        self._count_tokens(outcome)
        if entry.num_drafts:
            self._count_drafts(seq, entry.num_drafts, max(0, num_drawn - 1))
        self.kv.settle(seq)
        if outcome.finish_reason is not None:
            if self._speculator is not None:
                self._spared(self._speculator.finished, seq)
            return self._roster.finish(seq, outcome, now)
        return self._roster.event(seq, outcome, now) if num_drawn else None

    def _count_drafts(self, seq: Sequence, num_drafts: int, num_accepted: int) -> None:
        self.counters.speculation.count(num_drafts, num_accepted)
        if self._speculator is not None:
            self._spared(self._speculator.verified, seq, num_drafts, num_accepted)

    def _count_tokens(self, outcome: Outcome) -> None:
        self.counters.generation_tokens += len(outcome.token_ids)
        self.counters.forced_tokens += len(outcome.token_ids) - outcome.num_drawn

    def check_integrity(self) -> None:
        """Raise AssertionError if an invariant is broken. For tests: walks everything."""
        self._roster.check_integrity()
