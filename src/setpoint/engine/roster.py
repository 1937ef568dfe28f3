"""Who is waiting, who is running, and how each sequence comes in and goes out. No planning here."""

from __future__ import annotations

import itertools
import random
from bisect import insort
from operator import attrgetter

from setpoint.engine.blast_wall import Faults, client_error
from setpoint.engine.events import Event
from setpoint.engine.kv_cache import KVCache
from setpoint.engine.queue_gate import QueueGate
from setpoint.engine.request import Request
from setpoint.engine.row_state import sequence_seed
from setpoint.engine.rows import Outcome
from setpoint.engine.sequence import ActiveRequest, Sequence, SequenceStatus
from setpoint.engine.sessions import Sessions
from setpoint.engine.stats import Counters
from setpoint.engine.timelines import Timelines
from setpoint.errors import EngineError

by_order = attrgetter("order")


class Roster:
    """`running` and `waiting` are sorted by (priority, arrival, index). Only running sequences hold blocks."""

    def __init__(
        self,
        kv: KVCache,
        queue: QueueGate,
        counters: Counters,
        sessions: Sessions,
        timelines: Timelines,
        *,
        max_len: int,
        seed: int | None,
    ) -> None:
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.sequences: dict[int, Sequence] = {}  # both of them, by seq_id
        self.requests: dict[str, ActiveRequest] = {}
        self.faults: Faults | None = None
        self._kv = kv
        self._queue = queue
        self._counters = counters
        self._sessions = sessions
        self.timelines = timelines
        self._max_len = max_len
        self._random = random.Random(seed)  # seeds of requests that bring none
        self._arrivals = itertools.count()
        self._seq_ids = itertools.count()

    def enqueue(self, request: Request, now: float) -> None:
        """Make the sequences of a request that was counted into the queue, and let them wait."""
        try:
            if request.request_id in self.requests:
                raise EngineError("a request with this id is already being served")
            active = ActiveRequest(request, now, self._kv.tree.root_key(request.tenant, request.cache_salt))
            base_seed = self._random.getrandbits(63) if request.params.seed is None else request.params.seed
            arrival = next(self._arrivals)
            for index in range(request.params.n):
                seq = Sequence(
                    next(self._seq_ids),
                    active,
                    index,
                    arrival=arrival,
                    seed=sequence_seed(base_seed, index),
                    num_groups=len(self._kv.pools),
                    max_len=self._max_len,
                )
                active.unfinished.append(seq)
        except Exception:
            self._queue.leave(len(request.prompt_token_ids), now)
            raise
        if request.session_id and self._kv.prefix_caching:
            active.session = self._sessions.open(request.tenant, request.session_id, request.cache_salt, now)
        self.timelines.arrive(active, len(self.waiting), now)
        self.requests[request.request_id] = active
        for seq in active.unfinished:
            self.sequences[seq.seq_id] = seq
            insort(self.waiting, seq, key=by_order)

    def start(self, seq: Sequence) -> None:
        """Waiting → running; the caller gives it blocks."""
        self.waiting.remove(seq)
        insort(self.running, seq, key=by_order)
        seq.status = SequenceStatus.RUNNING
        leader = seq.owner.leader
        if leader is None or leader.status is not SequenceStatus.RUNNING:
            seq.owner.leader = seq

    def count_start(self, seq: Sequence, now: float) -> None:
        """A sequence runs for the first time; its request leaves the bounded queue with the first of them."""
        seq.first_scheduled_time = now
        seq.num_cached_tokens = seq.num_computed if seq.restore is None else seq.restore.num_tokens
        restored = 0 if seq.restore is None else seq.restore.num_restored
        if self._kv.prefix_caching:
            self._counters.prefix_queries += seq.num_prompt
            self._counters.prefix_hits += seq.num_cached_tokens - restored
        if self._kv.lower is not None:
            self._counters.external_queries += seq.num_prompt - seq.num_cached_tokens + restored
            self._counters.external_hits += restored
        if seq.index == 0:
            self._diagnose(seq)
        if seq.owner.queued:
            self._leave_queue(seq, now)
            self._counters.prompt_tokens += seq.num_prompt
            self._counters.prompt_tokens_cached += seq.num_cached_tokens
            self._counters.prompt_tokens_restored += restored

    def _diagnose(self, seq: Sequence) -> None:
        """Whether the prompt found what its session had."""
        active = seq.owner
        if active.session is not None:
            salt, prompt = active.request.cache_salt, active.request.prompt_token_ids
            active.divergence = self._sessions.diagnose(active.session, salt, prompt, seq.num_cached_tokens)
            if active.divergence is not None:
                self._counters.divergences[active.divergence.cause] += 1

    def preempt(self, seq: Sequence) -> None:
        """Running → waiting, without blocks; what it published may still be cached when it comes back."""
        self.timelines.preempt(seq)
        self._kv.release(seq)
        seq.drafts = []
        seq.status = SequenceStatus.WAITING
        seq.num_preemptions += 1
        self._counters.preemptions += 1
        self.running.remove(seq)
        insort(self.waiting, seq, key=by_order)

    def finish(self, seq: Sequence, outcome: Outcome, now: float) -> Event:
        """Take a sequence out, wherever it stands, and give its blocks back."""
        assert outcome.finish_reason is not None
        self.timelines.finish(seq, outcome.finish_reason, now)
        active = seq.owner
        (self.running if seq.status is SequenceStatus.RUNNING else self.waiting).remove(seq)
        seq.status = SequenceStatus.FINISHED
        del self.sequences[seq.seq_id]
        active.unfinished.remove(seq)
        if not active.unfinished:
            del self.requests[active.request.request_id]
            if active.queued:
                self._leave_queue(seq, now)
        if active.session is not None and seq.index == 0:
            keys = seq.block_keys[: seq.num_computed // self._kv.block_size]
            salt = active.request.cache_salt
            self._sessions.close(active.session, salt, seq.token_ids, seq.num_prompt, keys, now)
        self._kv.release(seq)
        self._counters.finished[outcome.finish_reason] += 1
        return self.event(seq, outcome, now)

    def _leave_queue(self, seq: Sequence, now: float) -> None:
        seq.owner.queued = False
        self._queue.leave(seq.num_prompt, now)

    def abort(self, request_id: str, index: int | None, now: float) -> list[Event]:
        """End one sequence of a request, or all. Unknown ids are ignored.

        Only the end of a whole request counts as an abort: one sequence is ended by a front end that found its stop.
        """
        active = self.requests.get(request_id)
        if active is None:
            return []
        if index is None:
            self._counters.aborted_by_state[active.unfinished[0].state] += 1
        chosen = [seq for seq in active.unfinished if index is None or seq.index == index]
        return [self.finish(seq, Outcome(finish_reason="abort"), now) for seq in chosen]

    def fail(self, active: ActiveRequest, error: Exception, now: float) -> list[Event]:
        """End every sequence of a request with an error fit for its client."""
        outcome = Outcome(finish_reason="error", error=client_error(error))
        return [self.finish(seq, outcome, now) for seq in list(active.unfinished)]

    def inject(self, point: str, seq: Sequence) -> None:
        """A named place where tests make a request fail."""
        if self.faults is not None:
            self.faults(point, seq.owner.request.request_id)

    @staticmethod
    def event(seq: Sequence, outcome: Outcome, now: float) -> Event:
        return Event(  # without the fields' names, which take twice as long as all the rest of it
            seq.owner.request.request_id,
            seq.index,
            outcome.token_ids,
            outcome.logprobs,
            outcome.prompt_logprobs,
            outcome.finish_reason,
            outcome.stop_reason,
            outcome.finish_reason == "stop" and seq.token_ids[-1] not in seq.stop_ids,  # is_complete
            outcome.error,
            seq.num_cached_tokens,
            len(seq.token_ids) - seq.num_prompt,  # num_output_tokens
            seq.owner.divergence,
            seq.num_preemptions,
            now,
            seq.arrival_time,
            seq.first_scheduled_time,
        )

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
        if sorted(seq.seq_id for seq in (*self.running, *self.waiting)) != sorted(self.sequences):
            raise AssertionError("a sequence is in no queue, or in two")
        if any(seq.num_computed >= seq.num_tokens for seq in self.running):
            raise AssertionError("a running sequence has nothing left to compute")
        if any(table for seq in self.waiting for table in seq.block_tables):
            raise AssertionError("a waiting sequence holds blocks")
        if any(seq.num_computed or seq.num_published or any(seq.first_live) or seq.drafts for seq in self.waiting):
            raise AssertionError("a waiting sequence has kept what belonged to its blocks")
        unfinished = [seq.seq_id for active in self.requests.values() for seq in active.unfinished]
        if sorted(unfinished) != sorted(self.sequences):
            raise AssertionError("requests and sequences disagree")
        if self._queue.num_requests < sum(active.queued for active in self.requests.values()):
            raise AssertionError("the queue counts too few requests")
        self._sessions.check_integrity()
        self._kv.check_integrity(self.running)
