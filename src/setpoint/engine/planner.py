"""How the plan of one step is filled: running sequences, then waiting ones, as far as budget, places and blocks go."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from setpoint.engine.drafting import Drafting
from setpoint.engine.events import Event
from setpoint.engine.kv_cache import KVCache
from setpoint.engine.kv_moves import KVMoves
from setpoint.engine.limits import SchedulerLimits
from setpoint.engine.pacer import Paced, Pacer
from setpoint.engine.plan import KVRestore, PlanEntry, StepPlan
from setpoint.engine.roster import Roster
from setpoint.engine.rows import Outcome, build_rows
from setpoint.engine.sequence import Sequence, SequenceStatus
from setpoint.engine.stats import Counters
from setpoint.errors import EngineError


@dataclass(slots=True)
class _Step:
    """A plan while it is made. Budgets are what is left of the step's tokens, and of the bytes to restore."""

    limits: SchedulerLimits
    now: float
    budget: int
    restore_budget: int
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


class Planner:
    """`events` receives the ends of requests that are met while planning."""

    def __init__(
        self,
        kv: KVCache,
        roster: Roster,
        moves: KVMoves,
        drafting: Drafting,
        counters: Counters,
        events: list[Event],
        pacer: Pacer | None,
    ) -> None:
        self._kv = kv
        self._roster = roster
        self._moves = moves
        self._drafting = drafting
        self._counters = counters
        self._events = events
        self.late_masks = False  # those of grammars are computed while the model runs, not here
        self._pacer = pacer
        self.blocked: tuple[int, int, tuple[int, ...]] | None = None  # see _may_retry

    def plan(self, limits: SchedulerLimits, now: float) -> StepPlan:
        budget = limits.max_num_batched_tokens
        step = _Step(limits, now, budget, self._moves.begin(budget))
        decodes: list[Sequence] = []
        prefills: list[Sequence] = []
        for seq in self._roster.running:
            (prefills if len(seq.token_ids) - seq.num_computed > 1 else decodes).append(seq)
        waiting, max_running, paced = self._roster.waiting, limits.max_num_seqs, None
        if self._pacer is not None:
            paced = self._pacer.choose(decodes, prefills, waiting, limits, now)
            step.budget, max_running = paced.budget, paced.max_running
        if decodes and self._drafting.is_on:
            self._draft(decodes, prefills, step, paced)
        for seq in (*decodes, *(prefills if paced is None else paced.prefills)):
            try:
                self._advance(seq, step)
            except Exception as error:
                self._fail(seq, error, step)
        if waiting:
            self._admit_waiting(step, waiting if paced is None else paced.waiting, max_running)
            for seq in [seq for seq in self._roster.timelines.aside.values() if not self._steps_aside(seq, now)]:
                self._roster.timelines.wait_again(seq)
        self._roster.timelines.planned(
            limits,
            max_running,
            step.budget,
            step.entries,
            self._roster,
            is_paced=paced is not None and paced.budget < limits.max_num_batched_tokens,
        )
        restores = tuple(move for moves in step.restores.values() for move in moves)
        return StepPlan(tuple(step.entries.values()), self._moves.end(), restores)

    def _fail(self, seq: Sequence, error: Exception, step: _Step) -> None:
        """A failure over one sequence fails its request and nobody else's."""
        for sibling in seq.owner.unfinished:
            step.drop(sibling.seq_id)
        self._events += self._roster.fail(seq.owner, error, step.now)

    def _draft(self, decodes: list[Sequence], prefills: list[Sequence], step: _Step, paced: Paced | None) -> None:
        """Ask for drafts, leaving a token of budget to every running sequence."""
        roster = self._roster
        num_prefill = sum(len(seq.token_ids) - seq.num_computed for seq in prefills)
        if roster.waiting and len(roster.running) < step.limits.max_num_seqs:
            num_prefill += roster.waiting[0].num_tokens
        num_prefill, room = min(num_prefill, step.budget - len(decodes)), step.budget - len(roster.running)
        if paced is not None and paced.draft_room is not None:
            room = min(room, paced.draft_room)
        self._drafting.draft(decodes, num_prefill, room, step.limits.max_drafts)

    # --- running sequences ---------------------------------------------------------------------------------------

    def _advance(self, seq: Sequence, step: _Step) -> None:
        """Plan the next tokens of a running sequence, preempting from the end of the order if blocks run out."""
        if seq.status is not SequenceStatus.RUNNING:
            return
        if seq.restore is not None and not self._restore(seq, step):
            return
        if step.budget <= 0:
            return
        roster, kv = self._roster, self._kv
        if roster.faults is not None:
            roster.inject("schedule", seq)
        wanted = min(len(seq.token_ids) - seq.num_computed + len(seq.drafts), step.budget)
        if roster.faults is not None:
            roster.inject("allocate", seq)
        covered = kv.grow(seq, seq.num_computed + wanted)
        while covered <= seq.num_computed:
            if len(roster.running) == 1:
                raise EngineError("the KV cache cannot hold this sequence")  # validate() excludes it
            if self._preempt_last(step) is seq:
                return
            covered = kv.grow(seq, seq.num_computed + wanted)
        self._plan_entry(seq, min(wanted, covered - seq.num_computed), step)

    def _restore(self, seq: Sequence, step: _Step) -> bool:
        """Plan to fill blocks of a running sequence from lower tiers; True when none is left."""
        moves = self._kv.restore(seq, step.restore_budget)
        while not moves and seq.restore is not None and step.restore_budget > 0:  # no block is free
            if self._preempt_last(step) is seq:
                return False
            moves = self._kv.restore(seq, step.restore_budget)
        step.restore(seq.seq_id, moves)
        return seq.restore is None

    def _preempt_last(self, step: _Step) -> Sequence:
        """Take its blocks from the running sequence that is last in the order."""
        victim = self._roster.running[-1]
        step.drop(victim.seq_id)
        self._roster.preempt(victim)
        return victim

    def _plan_entry(self, seq: Sequence, num_new: int, step: _Step) -> None:
        if self._roster.faults is not None:
            self._roster.inject("prepare", seq)
        start = seq.num_computed
        drafts = seq.drafts[: max(0, num_new - (len(seq.token_ids) - start))] if seq.drafts else []
        rows, num_drafts, masks = build_rows(seq, num_new, drafts, late=self.late_masks)
        drafts = drafts[:num_drafts]
        tokens = seq.token_ids[start : start + num_new] + drafts
        step.add(PlanEntry(seq.seq_id, tokens, start, seq.block_tables, rows, len(drafts), masks))

    # --- waiting sequences ---------------------------------------------------------------------------------------

    def _admit_waiting(self, step: _Step, waiting: Iterable[Sequence], max_running: int) -> None:
        """Start waiting sequences in order until budget, places or blocks run out."""
        running = self._roster.running
        if len(running) >= max_running:
            return
        for seq in list(waiting):
            if step.budget <= 0 or len(running) >= max_running:
                return
            is_waiting = seq.status is SequenceStatus.WAITING
            if not is_waiting:
                continue
            if self._steps_aside(seq, step.now):
                self._roster.timelines.step_aside(seq)
                continue
            if not self._may_retry(seq):
                return
            try:
                self._admit(seq, step)
            except Exception as error:
                self._fail(seq, error, step)
            if seq.status is SequenceStatus.WAITING:
                if not self._kv.is_fetching(seq, step.now):
                    return  # no room; nobody overtakes
                self._roster.timelines.step_aside(seq)

    def _steps_aside(self, seq: Sequence, now: float) -> bool:
        """Whether a waiting sequence lets those behind it pass: for a sibling, or for what is read from disk."""
        return self.is_deferred(seq) or self._kv.is_fetching(seq, now)

    def is_deferred(self, seq: Sequence) -> bool:
        """Whether a sibling is computing the full prompt blocks that this sequence will then find in the cache."""
        leader = seq.owner.leader
        if leader is None or leader.status is not SequenceStatus.RUNNING or not self._kv.prefix_caching:
            return False
        shareable = (seq.num_prompt - 1) // self._kv.block_size * self._kv.block_size
        return leader.num_computed < shareable

    def _admit(self, seq: Sequence, step: _Step) -> None:
        roster, kv = self._roster, self._kv
        if roster.faults is not None:
            roster.inject("schedule", seq)
        if self._jump_first(seq, step):
            return
        hit = kv.match(seq, step.now)
        if hit is None:
            return
        if roster.running and not kv.can_admit(seq, hit, roster.running):
            self.blocked = (seq.seq_id, len(roster.running), tuple(pool.num_free for pool in kv.pools))
            return
        if roster.faults is not None:
            roster.inject("allocate", seq)
        fetched = () if seq.fetch is None else tuple(seq.fetch.staged.values())
        roster.start(seq)
        kv.take_hit(seq, hit)
        if seq.first_scheduled_time is None:
            roster.count_start(seq, step.now)
        roster.timelines.start(seq, fetched, step.now)
        if self._pacer is not None:
            self._pacer.started(seq)
        if seq.restore is not None and not self._restore(seq, step):
            return
        covered = kv.grow(seq, seq.num_computed + min(seq.num_tokens - seq.num_computed, step.budget))
        if covered <= seq.num_computed:
            raise EngineError("the KV cache cannot hold this sequence")  # can_admit() and validate() exclude it
        self._plan_entry(seq, covered - seq.num_computed, step)

    def _jump_first(self, seq: Sequence, step: _Step) -> bool:
        """Let the tokens that a grammar begins with join the prompt; True where they are the whole output."""
        wanted = step.limits.jump_forward and seq.row_state.constraint is not None and seq.prompt_logprobs is None
        finish = seq.jump() if wanted and seq.first_scheduled_time is None else None
        if finish is None:
            return False
        outcome = Outcome(seq.take_unreported(), finish_reason=finish[0], stop_reason=finish[1])
        self._counters.count_output(len(outcome.token_ids), num_drawn=0)
        self._events.append(self._roster.finish(seq, outcome, step.now))
        return True

    def _may_retry(self, seq: Sequence) -> bool:
        """False while nothing was freed since this sequence last found no room: spares a lookup per step."""
        if self.blocked is None or self.blocked[0] != seq.seq_id:
            return True
        _, num_running, free = self.blocked
        freed = any(pool.num_free > before for pool, before in zip(self._kv.pools, free, strict=True))
        return freed or len(self._roster.running) < num_running
