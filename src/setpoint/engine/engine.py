"""The engine as other threads see it: requests in, aborts, readings, an orderly end. Its thread is in `loop.py`."""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from setpoint.engine.blast_wall import Faults
from setpoint.engine.delivery import Delivery
from setpoint.engine.events import Event
from setpoint.engine.explanation import Explanation, Limits
from setpoint.engine.inbox import Abort, Inbox
from setpoint.engine.limits import SchedulerLimits
from setpoint.engine.loop import EngineLoop
from setpoint.engine.pacer import Pacer
from setpoint.engine.plan import Runner
from setpoint.engine.request import Request
from setpoint.engine.scheduler import Scheduler
from setpoint.engine.stats import EngineStats
from setpoint.errors import (
    ConfigError,
    EngineDeadError,
    EngineError,
    QueueFullError,
    RequestError,
    SetpointError,
    ShedError,
)

__all__ = ["Engine", "EngineLimits", "Event", "Request"]

log = logging.getLogger(__name__)

ABORT_GRACE_S = 10.0  # for the step under way when everything must end


@dataclass(frozen=True, slots=True)
class EngineLimits:
    vocab_size: int  # width of the logits
    max_model_len: int  # prompt and output together, in tokens


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
        self._built_limits = scheduler.limits
        self._runner = runner
        self._clock = clock
        if faults is not None:
            scheduler.faults = faults
        self._inbox = Inbox()
        self._delivery = Delivery(scheduler, deliver, clock)
        self._loop = EngineLoop(scheduler, runner, self._delivery, self._inbox, clock)
        self._thread: threading.Thread | None = None
        self._rejected = dict.fromkeys(("invalid", "queue_full", "draining"), 0) | (
            {} if scheduler.pacer is None else {"shed": 0}
        )  # guarded by the inbox

    def start(self) -> None:
        if self._thread is not None:
            raise EngineError("the engine was started before")
        self._thread = threading.Thread(target=self._loop.run, name="setpoint-engine", daemon=True)
        self._thread.start()

    # --- requests ------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Queue a request. Raises RequestError, QueueFullError, or EngineDeadError when dead or draining."""
        try:
            self.check_alive()
            self._scheduler.validate(request)
            with self._inbox as inbox:
                self.check_alive()
                if inbox.is_pending(request.request_id) or self._scheduler.has_request(request.request_id):
                    raise RequestError("request_id is already in use", param="request_id", reason="conflict")
                self._scheduler.reserve(request, self._clock())
                inbox.put(request)
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

    def _count_rejection(self, error: SetpointError) -> None:
        kinds = {RequestError: "invalid", ShedError: "shed", QueueFullError: "queue_full", EngineDeadError: "draining"}
        reason = next((name for kind, name in kinds.items() if isinstance(error, kind)), None)
        if reason is not None:
            with self._inbox:
                self._rejected[reason] += 1

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End a request, or one sequence of it, in whatever state it is. Unknown and finished ones are ignored.

        Each sequence that was still alive gets a last event with `finish_reason` "abort".
        """
        self._inbox.put(Abort(request_id, index))

    def set_limits(self, limits: SchedulerLimits) -> None:
        """Other hot limits from the next step on. Raises ConfigError beyond those that the runner was built for."""
        built = self._built_limits
        for name in ("max_num_seqs", "max_num_batched_tokens"):
            if not 1 <= getattr(limits, name) <= getattr(built, name):
                raise ConfigError(f"{name} is {getattr(limits, name)}; it was built for {getattr(built, name)}")
        self._scheduler.limits = limits

    def delete_session(self, tenant: str, session_id: str) -> bool:
        """Forget a session of a tenant; False when there is none. Requests under way go on."""
        return self._scheduler.sessions.delete(tenant, session_id)

    # --- the end -------------------------------------------------------------------------------------------------

    def drain(self, timeout_s: float) -> bool:
        """Refuse new work, let accepted work finish for `timeout_s`, then abort the rest. True if all finished."""
        is_running = self._thread is not None and self._thread.is_alive()
        with self._inbox as inbox:
            inbox.is_draining = True
            finished = inbox.wait_idle(timeout_s if is_running else 0.0)
            if not finished:
                inbox.ask_to_abort_all()
                inbox.wait_idle(ABORT_GRACE_S if is_running else 0.0)
            return finished

    def shutdown(self) -> None:
        """Abort what is left, with events; stop the thread and close the runner. May be called twice."""
        if not self._inbox.ask_to_stop():
            return
        if self._thread is None:
            self._loop.end()
        else:
            self._thread.join(ABORT_GRACE_S)
            if self._thread.is_alive():  # stuck in the runner: closing it now would free memory under its feet
                log.error("the engine thread did not stop within %s s", ABORT_GRACE_S)
                return
        self._scheduler.close()
        self._runner.close()

    # --- readings ------------------------------------------------------------------------------------------------

    @property
    def is_alive(self) -> bool:
        """False once the engine has given up; `dead_reason` says why."""
        return self._inbox.dead_reason is None

    @property
    def dead_reason(self) -> str | None:
        return self._inbox.dead_reason

    @property
    def is_draining(self) -> bool:
        return self._inbox.is_draining

    @property
    def pacer(self) -> Pacer | None:
        """What holds an SLA, if one was given."""
        return self._scheduler.pacer

    def check_alive(self) -> None:
        """Raise EngineDeadError if the engine takes no more work."""
        self._inbox.check_open()
        if self._thread is not None and not self._thread.is_alive():
            raise EngineDeadError("the engine's thread is gone; a forked process must open the model itself")

    def heartbeat_age_s(self) -> float:
        """Seconds since the engine thread last moved, idle or not."""
        return max(0.0, self._clock() - self._loop.heartbeat)

    def explain(self, request_id: str) -> Explanation | None:
        """Where the time of a request went, so far or until its end; None when it is not known, or no more."""
        scheduler, now = self._scheduler, self._clock()
        timelines = scheduler.timelines.read(request_id, now)
        if timelines is None:
            return None
        limits, capacity = scheduler.limits, max(pool.num_blocks for pool in scheduler.kv.pools)
        bounds = Limits(limits.max_num_seqs, limits.max_num_batched_tokens, capacity * scheduler.kv.block_size)
        return Explanation(tuple(timelines), bounds, now)

    def stats(self) -> EngineStats:
        """One reading of the gauges and counters. Not one instant: the engine goes on while they are read."""
        scheduler = self._scheduler
        waiting = list(scheduler.waiting)
        num_deferred = sum(map(scheduler.is_deferred, waiting))
        now = self._clock()
        oldest = min((seq.arrival_time for seq in waiting if seq.first_scheduled_time is None), default=now)
        with self._inbox as inbox:
            num_inbox = inbox.num_pending
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
            is_draining=self.is_draining,
            num_engine_failures=self._loop.num_failures,
            rejected=rejected,
            counters=copy.deepcopy(scheduler.counters),
        )
