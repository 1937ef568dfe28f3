"""The engine thread: inbox, `schedule → execute → commit`, and one hand-over of events per step.

The blast wall is here: whatever goes wrong while one request is validated, planned, computed or delivered ends that
request with an error event and leaves its neighbours' tokens as they were. Only a runner that cannot compute
anything at all, three times in a minute, ends the engine.
"""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from setpoint.engine.blast_wall import Faults, client_error, execute_isolated
from setpoint.engine.events import Event
from setpoint.engine.lower_tiers import SlowTier
from setpoint.engine.plan import Runner, StepResult
from setpoint.engine.request import Request
from setpoint.engine.scheduler import Scheduler
from setpoint.engine.stats import EngineStats
from setpoint.errors import EngineDeadError, EngineError, QueueFullError, RequestError, SetpointError

__all__ = ["Engine", "EngineLimits", "Event", "Request"]

log = logging.getLogger(__name__)

IDLE_TICK_S = 0.5  # the heartbeat of an idle engine
BLOCKED_TICK_S = 0.01  # work exists, but none could be planned
MAX_FAILURES = 3
FAILURE_WINDOW_S = 60.0
FLUSH_S = 1.5  # for blocks on their way to disk when the engine ends
ABORT_GRACE_S = 10.0  # for the step under way when everything must end


@dataclass(frozen=True, slots=True)
class EngineLimits:
    vocab_size: int  # width of the logits
    max_model_len: int  # prompt and output together, in tokens


@dataclass(frozen=True, slots=True)
class _Abort:
    request_id: str
    index: int | None


class Engine:
    """`deliver(events)` is called on the engine thread, once per step with all its events. It must not block, and
    it takes the whole list or raises before it took any: then the events are offered one by one.

    `submit`, `abort`, `stats` and the properties may be used from any thread.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        deliver: Callable[[list[Event]], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        faults: Faults | None = None,
    ) -> None:
        self.limits = EngineLimits(scheduler.vocab_size, scheduler.max_model_len)
        self._scheduler = scheduler
        self._runner = runner
        self._deliver = deliver
        self._clock = clock
        if faults is not None:
            scheduler.faults = faults
        self._disk = None if scheduler.kv.lower is None else scheduler.kv.lower.disk
        if self._disk is not None:
            self._disk.on_progress = self._nudge
        self._thread: threading.Thread | None = None
        self._wake = threading.Condition()  # guards everything below
        self._inbox: list[Request | _Abort] = []
        self._pending: set[str] = set()  # ids in the inbox
        self._idle = True
        self._nudged = False
        self._draining = False
        self._abort_all = False
        self._stopping = False
        self._ended = False
        self._dead_reason: str | None = None
        self._heartbeat = clock()
        self._failures: deque[float] = deque(maxlen=MAX_FAILURES)
        self._num_failures = 0
        self._rejected = dict.fromkeys(("invalid", "queue_full", "draining"), 0)

    # --- for other threads ---------------------------------------------------------------------------------------

    def start(self) -> None:
        if self._thread is not None:
            raise EngineError("the engine was started before")
        self._thread = threading.Thread(target=self._run, name="setpoint-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Queue a request. Raises RequestError, QueueFullError, or EngineDeadError when dead or draining."""
        try:
            self.check_alive()
            self._scheduler.validate(request)
            with self._wake:
                self.check_alive()
                if request.request_id in self._pending or self._scheduler.has_request(request.request_id):
                    raise RequestError("request_id is already in use", param="request_id", reason="conflict")
                self._scheduler.reserve(request, self._clock())
                self._inbox.append(request)
                self._pending.add(request.request_id)
                self._idle = False
                self._wake.notify_all()
        except SetpointError as error:
            self._count_rejection(error)
            raise
        except Exception as error:
            log.error("request %r failed validation: %s", request.request_id, type(error).__name__)
            raise EngineError("the engine failed while checking this request") from error

    def check_admission(self) -> None:
        """Raise what `submit` would raise for any request now; lets a front end refuse before it tokenises."""
        try:
            self.check_alive()
            self._scheduler.queue.check(self._clock())
        except SetpointError as error:
            self._count_rejection(error)
            raise

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End a request, or one sequence of it, in whatever state it is. Unknown and finished ones are ignored.

        Each sequence that was still alive gets a last event with `finish_reason` "abort".
        """
        with self._wake:
            if not self._ended:
                self._inbox.append(_Abort(request_id, index))
                self._wake.notify_all()

    def delete_session(self, tenant: str, session_id: str) -> bool:
        """Forget a session of a tenant; False when there is none. Requests under way go on."""
        return self._scheduler.sessions.delete(tenant, session_id)

    def drain(self, timeout_s: float) -> bool:
        """Refuse new work, let accepted work finish for `timeout_s`, then abort the rest. True if all finished."""
        with self._wake:
            self._draining = True
            finished = self._wait_idle(timeout_s)
            if not finished:
                self._abort_all = True
                self._wake.notify_all()
                self._wait_idle(ABORT_GRACE_S)
            return finished

    def _wait_idle(self, timeout_s: float) -> bool:
        running = self._thread is not None and self._thread.is_alive()
        return self._wake.wait_for(lambda: self._idle or self._dead_reason is not None, timeout_s if running else 0)

    def shutdown(self) -> None:
        """Abort what is left, with events; stop the thread and close the runner. May be called twice."""
        with self._wake:
            already, self._stopping = self._stopping, True
            self._wake.notify_all()
        if already:
            return
        if self._thread is None:
            self._end()
        else:
            self._thread.join(ABORT_GRACE_S)
            if self._thread.is_alive():  # stuck in the runner: closing it now would free memory under its feet
                log.error("the engine thread did not stop within %s s", ABORT_GRACE_S)
                return
        self._scheduler.close()
        self._runner.close()

    @property
    def is_alive(self) -> bool:
        """False once the engine has given up; `dead_reason` says why."""
        return self._dead_reason is None

    @property
    def dead_reason(self) -> str | None:
        return self._dead_reason

    @property
    def is_draining(self) -> bool:
        return self._draining

    def check_alive(self) -> None:
        """Raise EngineDeadError if the engine takes no more work."""
        if self._dead_reason is not None:
            raise EngineDeadError(f"the engine is not running: {self._dead_reason}")
        if self._draining or self._stopping:
            raise EngineDeadError("draining: the server is shutting down and takes no new requests")
        if self._thread is not None and not self._thread.is_alive():
            raise EngineDeadError("the engine's thread is gone; a forked process must open the model itself")

    def heartbeat_age_s(self) -> float:
        """Seconds since the engine thread last moved, idle or not."""
        return max(0.0, self._clock() - self._heartbeat)

    def stats(self) -> EngineStats:
        """One reading of the gauges and counters. Not one instant: the engine goes on while they are read."""
        scheduler = self._scheduler
        waiting = list(scheduler.waiting)
        num_deferred = sum(map(scheduler.is_deferred, waiting))
        now = self._clock()
        oldest = min((seq.arrival_time for seq in waiting if seq.first_scheduled_time is None), default=now)
        with self._wake:
            num_inbox = len(self._pending)
            rejected = dict(self._rejected)
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(waiting) - num_deferred + num_inbox,
            num_deferred=num_deferred,
            num_queued_requests=scheduler.queue.num_requests,
            num_queued_tokens=scheduler.queue.num_tokens,
            oldest_queue_age_s=max(0.0, now - oldest),
            kv_usage=scheduler.kv.usage,
            kv_blocks_leaked=0 if scheduler.has_work else sum(pool.num_used for pool in scheduler.kv.pools),
            num_sessions=len(scheduler.sessions),
            num_sessions_expired=scheduler.sessions.num_expired,
            num_sessions_over_budget=scheduler.sessions.num_over_budget,
            host_tier_bytes=0 if scheduler.kv.lower is None else scheduler.kv.lower.host.num_bytes,
            heartbeat_age_s=self.heartbeat_age_s(),
            is_alive=self.is_alive,
            is_draining=self._draining,
            num_engine_failures=self._num_failures,
            rejected=rejected,
            counters=copy.deepcopy(scheduler.counters),
        )

    def _count_rejection(self, error: SetpointError) -> None:
        kinds = {RequestError: "invalid", QueueFullError: "queue_full", EngineDeadError: "draining"}
        reason = next((name for kind, name in kinds.items() if isinstance(error, kind)), None)
        if reason is not None:
            with self._wake:
                self._rejected[reason] += 1

    # --- the engine thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping and self._dead_reason is None:
                self._heartbeat = self._clock()
                self._read_inbox()
                if not self._step():
                    self._rest()
        except BaseException as error:  # whatever it is, health must not say that this thread lives
            log.exception("the engine loop failed")
            self._die(f"internal error ({type(error).__name__})")
        finally:
            self._end()

    def _rest(self) -> None:
        """Sleep until there is something to do, or until the next heartbeat."""
        with self._wake:
            nudged, self._nudged = self._nudged, False
            if self._inbox or self._stopping or self._abort_all or nudged:
                return
            self._idle = not self._scheduler.has_work
            if self._idle:
                self._wake.notify_all()
            self._wake.wait(IDLE_TICK_S if self._idle else BLOCKED_TICK_S)

    def _nudge(self) -> None:
        """The disk tier has news."""
        with self._wake:
            self._nudged = True
            self._wake.notify_all()

    def _read_inbox(self) -> None:
        with self._wake:
            inbox, self._inbox = self._inbox, []
            abort_all, self._abort_all = self._abort_all, False
        events: list[Event] = []
        for item in inbox:
            if isinstance(item, _Abort):
                events += self._scheduler.abort(item.request_id, item.index, self._clock())
            else:
                events += self._enqueue(item)
        if abort_all:
            events += self._scheduler.abort_all(self._clock())
        self._hand_over(events)

    def _enqueue(self, request: Request) -> list[Event]:
        now = self._clock()
        try:
            self._scheduler.enqueue(request, now)
        except Exception as error:
            failure = client_error(error)
            return [
                Event(request.request_id, index, finish_reason="error", error=failure, time=now, arrival_time=now)
                for index in range(request.params.n)
            ]
        finally:
            with self._wake:
                self._pending.discard(request.request_id)
        return []

    def _step(self) -> bool:
        """One turn of the contract; False when there was nothing to do."""
        scheduler = self._scheduler
        suspicion = None
        try:
            plan = scheduler.schedule(self._clock())
            result = StepResult()
            if plan.entries or plan.saves or plan.restores:
                inject = scheduler.inject_entry if scheduler.faults is not None else None
                result, suspicion = execute_isolated(self._runner, plan, inject)
                self._heartbeat = self._clock()
            events = scheduler.commit(plan, result, self._clock())
        except Exception as error:
            self._record_failure(error)
            failure = client_error(error)
            events = scheduler.take_events() + scheduler.fail_all(failure, self._clock(), running_only=True)
            self._hand_over(events)
            return True
        if suspicion is not None and not self._runner_works():
            self._record_failure(suspicion)
        self._log_errors(events)
        self._hand_over(events)
        return bool(plan.entries or plan.saves or plan.restores or events)

    def _runner_works(self) -> bool:
        """Whether the runner can compute one token of nobody's, after every entry of a step failed."""
        plan = self._scheduler.probe()
        if plan is None:  # no block to spare: the next step will tell
            return True
        try:
            return self._runner.execute(plan).entries[0].error is None
        except Exception:
            return False

    def _record_failure(self, error: Exception) -> None:
        """A step failed and no request is to blame. Too many in a short time, and the engine gives up."""
        now = self._clock()
        log.error("engine step failed: %s", type(error).__name__)
        self._num_failures += 1
        self._failures.append(now)
        if len(self._failures) == MAX_FAILURES and now - self._failures[0] <= FAILURE_WINDOW_S:
            self._die(f"{MAX_FAILURES} failed steps within {FAILURE_WINDOW_S:.0f} s ({type(error).__name__})")

    def _die(self, reason: str) -> None:
        with self._wake:
            self._dead_reason = reason
            self._wake.notify_all()

    def _hand_over(self, events: list[Event]) -> None:
        if not events:
            return
        try:
            self._inject_and_deliver(events)
        except Exception as error:
            log.error("delivering %d events failed (%s); trying each alone", len(events), type(error).__name__)
            failed: dict[str, Exception] = {}
            for event in events:
                try:
                    if event.request_id not in failed:
                        self._inject_and_deliver([event])
                except Exception as alone:
                    failed[event.request_id] = alone
                    self._give_up(event, alone)

    def _inject_and_deliver(self, events: list[Event]) -> None:
        if self._scheduler.faults is not None:
            for event in events:
                self._scheduler.inject("deliver", event.request_id)
        self._deliver(events)

    def _give_up(self, event: Event, error: Exception) -> None:
        """An event of this request cannot be delivered: end the request, and try to say so once."""
        ended = self._scheduler.abort(event.request_id, None, self._clock())
        failure = client_error(error)
        if event.finish_reason is not None:
            ended.append(event)
        try:
            self._deliver([replace(last, token_ids=(), finish_reason="error", error=failure) for last in ended])
        except Exception:
            log.error("request %r cannot be told of its end", event.request_id)

    def _log_errors(self, events: list[Event]) -> None:
        for request_id, error in {event.request_id: event.error for event in events if event.error}.items():
            log.error("request %r failed: %s", request_id, type(error.__cause__ or error).__name__)

    def _end(self) -> None:
        """The loop is over: every request still known gets its last event."""
        try:
            self._read_inbox()
            if self._dead_reason is None:
                events = self._scheduler.abort_all(self._clock())
            else:
                error = EngineDeadError(f"the engine is not running: {self._dead_reason}")
                events = self._scheduler.fail_all(error, self._clock())
            self._hand_over(self._scheduler.take_events() + events)
        except Exception:
            log.exception("the engine could not end every request")
        with self._wake:
            self._idle = self._ended = True
            self._wake.notify_all()
        if self._disk is not None:
            self._flush(self._disk)

    def _flush(self, disk: SlowTier) -> None:
        """What is in the pool and not on disk yet would be lost with the process."""
        deadline = self._clock() + FLUSH_S
        try:
            while self._dead_reason is None and self._scheduler.num_unsaved and self._clock() < deadline:
                plan = self._scheduler.schedule(self._clock())
                if not plan.saves:  # the disk is behind
                    time.sleep(BLOCKED_TICK_S)
                    continue
                result, _ = execute_isolated(self._runner, plan)
                self._scheduler.commit(plan, result, self._clock())
        except Exception as error:
            log.error("the KV cache was not saved to disk whole: %s", type(error).__name__)
        disk.close(max(0.0, deadline - self._clock()))
