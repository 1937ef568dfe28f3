"""What the results of a step mean: tokens taken, blocks published, sequences finished or failed, and events of it."""

from __future__ import annotations

from setpoint.engine.drafting import Drafting
from setpoint.engine.events import Event
from setpoint.engine.kv_cache import KVCache
from setpoint.engine.kv_moves import KVMoves
from setpoint.engine.pacer import Pacer
from setpoint.engine.plan import EntryResult, PlanEntry, StepPlan, StepResult
from setpoint.engine.roster import Roster
from setpoint.engine.rows import take_rows
from setpoint.engine.sequence import Sequence, SequenceStatus
from setpoint.engine.stats import Counters
from setpoint.errors import OutputViolationError


class Committer:
    """`events` receives what happened to each sequence, in the order of the plan."""

    def __init__(
        self,
        kv: KVCache,
        roster: Roster,
        moves: KVMoves,
        drafting: Drafting,
        counters: Counters,
        events: list[Event],
        vocab_size: int,
        pacer: Pacer | None,
    ) -> None:
        self._kv = kv
        self._roster = roster
        self._moves = moves
        self._drafting = drafting
        self._counters = counters
        self._events = events
        self._vocab_size = vocab_size
        self._pacer = pacer

    def commit(self, plan: StepPlan, result: StepResult, now: float, *, planned_at: float, jump: bool) -> None:
        """With `jump`, tokens that a grammar forces are taken at once."""
        num_tokens, seconds = plan.num_tokens, now - planned_at - result.moving_s
        self._roster.timelines.end(now, num_tokens, result.moving_s)
        if plan.entries:
            self._counters.step_tokens.observe(num_tokens)
        self._moves.file(plan, result, num_tokens, seconds)
        sequences = self._roster.sequences
        for position, entry in enumerate(plan.entries):
            seq = sequences.get(entry.seq_id)
            if seq is None or seq.status is not SequenceStatus.RUNNING or seq.num_computed != entry.start:
                continue  # aborted since the plan was made
            try:
                self._commit_entry(seq, entry, result.entries[position], now, jump)
            except Exception as error:
                if isinstance(error, OutputViolationError):
                    self._counters.output_violations += 1
                self._events += self._roster.fail(seq.owner, error, now)
        if self._pacer is not None:
            self._pacer.observe(plan, seconds, now)
        if plan.entries and self._drafting.is_on:
            lengths = [(len(entry.token_ids), entry.num_drafts) for entry in plan.entries]
            num_prefill = sum(length for length, drafts in lengths if length > 1 + drafts)
            self._drafting.learn(num_tokens, num_prefill, seconds)

    def _commit_entry(self, seq: Sequence, entry: PlanEntry, computed: EntryResult, now: float, jump: bool) -> None:
        if computed.error is not None:
            raise computed.error
        if entry.late_masks is not None and entry.late_masks.error is not None:
            raise entry.late_masks.error
        if self._roster.faults is not None:
            self._roster.inject("commit", seq)
        outcome = take_rows(seq, entry, computed.rows, self._vocab_size, jump=jump)
        if seq.drafts:
            seq.drafts = []
        num_drawn = outcome.num_drawn
        self._counters.count_output(len(outcome.token_ids), num_drawn)
        if entry.num_drafts:
            num_accepted = max(0, num_drawn - 1)
            seq.timeline.count_drafts(entry.num_drafts, num_accepted)
            self._counters.speculation.count(entry.num_drafts, num_accepted)
            self._drafting.verified(seq, entry.num_drafts, num_accepted)
        self._kv.settle(seq)
        if outcome.finish_reason is not None:
            self._drafting.finished(seq)
            if self._pacer is not None:
                self._pacer.finished(seq, now)
            self._events.append(self._roster.finish(seq, outcome, now))
        elif num_drawn:
            self._events.append(self._roster.event(seq, outcome, now))
