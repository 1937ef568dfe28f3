"""Which tokens of which sequences to compute next: `plan = schedule(now)`, then `events = commit(plan, result, now)`.

There is no prefill phase and no decode phase. Every sequence has `num_computed` of `num_tokens`, and each step spends
one token budget so that the first catches up with the second: decodes first, then prompts under way, then waiting
sequences by (priority, arrival). Out of blocks, the running sequence that is last in that order is preempted: it
gives its blocks back and is computed again later, so the first one always advances. Pure: ids and counts, no tensors,
no clock, no thread. Here requests come in and go out; `planner.py` fills a step, `committer.py` takes its results.
"""

from __future__ import annotations

from setpoint.engine.blast_wall import Faults
from setpoint.engine.committer import Committer
from setpoint.engine.drafting import Drafting, DraftPlanner
from setpoint.engine.events import Event
from setpoint.engine.kv_cache import KVCache
from setpoint.engine.kv_moves import KVMoves
from setpoint.engine.limits import SchedulerLimits
from setpoint.engine.lower_tiers import LowerTiers
from setpoint.engine.pacer import Pacer
from setpoint.engine.plan import LogitsRow, PlanEntry, RowSampling, RunnerInfo, StepPlan, StepResult
from setpoint.engine.planner import Planner
from setpoint.engine.queue_gate import QueueGate
from setpoint.engine.request import Request
from setpoint.engine.roster import Roster
from setpoint.engine.sequence import Sequence
from setpoint.engine.sessions import SessionLimits, Sessions
from setpoint.engine.slo import HeldSla
from setpoint.engine.stats import Counters
from setpoint.engine.step_cost import StepCost
from setpoint.engine.timelines import Timelines
from setpoint.errors import ConfigError, QueueFullError

__all__ = ["DraftPlanner", "Scheduler", "SchedulerLimits"]

PROBE_SEQ_ID = -1


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
        held: HeldSla | None = None,
        step_cost: StepCost | None = None,
    ) -> None:
        """`held` is what a pacer holds, by the measured `step_cost` or what it learns of steps itself."""
        if not info.kv_groups or any(group.num_blocks < 1 for group in info.kv_groups) or info.block_size < 1:
            raise ConfigError("the KV cache holds no block; raise --kv-cache-memory-bytes")
        self.limits = limits or SchedulerLimits()
        self.kv = KVCache(info, prefix_caching=enable_prefix_caching, lower=lower)
        self.queue = QueueGate(self.limits.max_num_queued_reqs, self.limits.max_num_queued_tokens)
        self.counters = Counters()
        self.vocab_size = info.vocab_size
        capacity = self.kv.capacity_tokens
        self.max_model_len = info.max_model_len if capacity is None else min(info.max_model_len, capacity)
        quota_blocks = int(max(pool.num_blocks for pool in self.kv.pools) * self.limits.session_share)
        session_limits = SessionLimits(self.limits.session_ttl_s, quota_blocks)
        self.sessions = Sessions(session_limits, self.kv.protect, self.kv.unprotect, info.block_size)
        self.timelines = Timelines()
        parts = self.kv, self.queue, self.counters, self.sessions, self.timelines
        self._roster = roster = Roster(*parts, max_len=self.max_model_len, seed=seed)
        self.running, self.waiting = roster.running, roster.waiting  # read only, in order
        if speculator is not None:
            self.counters.speculation = speculator.counters
        self._drafting = Drafting(speculator)
        self._moves = KVMoves(self.kv, roster)
        self._events: list[Event] = []  # of the step under way
        step_parts = self.kv, roster, self._moves, self._drafting, self.counters, self._events
        self.pacer = pacer = None if held is None else Pacer(held, step_cost, info.kv_groups)
        self._planner = Planner(*step_parts, pacer)
        self._planner.late_masks = info.late_masks
        self._committer = Committer(*step_parts, info.vocab_size, pacer)
        self._planned_at = 0.0

    # --- requests in and out -------------------------------------------------------------------------------------

    def validate(self, request: Request) -> None:
        """Raise RequestError unless this request can be served. Thread-safe."""
        self.inject("validate", request.request_id)
        request.validate(vocab_size=self.vocab_size, max_model_len=self.max_model_len)

    def reserve(self, request: Request, now: float) -> None:
        """Count the request into the bounded queue, or raise QueueFullError. Thread-safe; `enqueue` must follow."""
        request.submitted_time = now
        if self.pacer is not None:
            self.pacer.admit(request, len(self.running), len(self.waiting), now)
        try:
            self.queue.enter(len(request.prompt_token_ids), now)
        except QueueFullError:
            self._arrived(request)
            raise

    def _arrived(self, request: Request) -> None:
        if self.pacer is not None:
            self.pacer.forget(request)

    def enqueue(self, request: Request, now: float) -> None:
        """Let a validated, reserved request wait for its turn."""
        self._arrived(request)
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

    def is_deferred(self, seq: Sequence) -> bool:
        """Whether a waiting sequence lets a sibling compute their prompt first."""
        return self._planner.is_deferred(seq)

    @property
    def has_work(self) -> bool:
        return bool(self._roster.sequences or self._events)

    @property
    def num_unsaved(self) -> int:
        """Blocks of the pool that may not be on disk yet."""
        return self._moves.num_unsaved

    def close(self) -> None:
        """Free what it holds besides the runner; nothing may be scheduled afterwards."""
        self._drafting.close()

    # --- steps ---------------------------------------------------------------------------------------------------

    def schedule(self, now: float) -> StepPlan:
        """What to compute in the next step, under the limits of this moment."""
        self._planned_at = now
        self.timelines.begin(now)
        self.sessions.expire(now)
        if self.pacer is not None:
            self.limits = self.pacer.limits(now, self.limits)
        return self._planner.plan(self.limits, now)

    def commit(self, plan: StepPlan, result: StepResult, now: float) -> list[Event]:
        """Take what the runner computed; every event of the step, failures met while planning included."""
        self._committer.commit(plan, result, now, planned_at=self._planned_at, jump=self.limits.jump_forward)
        return self.take_events()

    def take_events(self) -> list[Event]:
        """What was not handed over yet: after a `schedule` or `commit` that raised."""
        events = self._events.copy()
        self._events.clear()
        return events

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

    # --- tests ---------------------------------------------------------------------------------------------------

    @property
    def faults(self) -> Faults | None:
        """Named places where tests make a request fail."""
        return self._roster.faults

    @faults.setter
    def faults(self, faults: Faults | None) -> None:
        self._roster.faults = faults

    def inject(self, point: str, request_id: str) -> None:
        if self._roster.faults is not None:
            self._roster.faults(point, request_id)

    def inject_entry(self, point: str, entry: PlanEntry) -> None:
        self._roster.inject(point, self._roster.sequences[entry.seq_id])

    def check_integrity(self) -> None:
        """Raise AssertionError if an invariant is broken. For tests: walks everything."""
        self._roster.check_integrity()
