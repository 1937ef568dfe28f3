"""The engine thread: inbox, `schedule → execute → commit`, and one hand-over of events per step.

The blast wall is here: whatever goes wrong while one request is planned, computed or delivered ends that request with
an error event and leaves its neighbours' tokens as they were. Only a runner that cannot compute anything at all, three
times in a minute, ends the engine.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable

from setpoint.engine.blast_wall import client_error, execute_isolated
from setpoint.engine.delivery import Delivery
from setpoint.engine.events import Event
from setpoint.engine.inbox import Abort, Inbox
from setpoint.engine.lower_tiers import SlowTier
from setpoint.engine.plan import Runner, StepResult
from setpoint.engine.request import Request
from setpoint.engine.scheduler import Scheduler
from setpoint.errors import EngineDeadError

log = logging.getLogger(__name__)

IDLE_TICK_S = 0.5  # the heartbeat of an idle engine
BLOCKED_TICK_S = 0.01  # work exists, but none could be planned
MAX_FAILURES = 3
FAILURE_WINDOW_S = 60.0
FLUSH_S = 1.5  # for blocks on their way to disk when the engine ends


class EngineLoop:
    """Runs until the inbox says stop, or until it gives up. `heartbeat` is when it last moved."""

    def __init__(
        self, scheduler: Scheduler, runner: Runner, delivery: Delivery, inbox: Inbox, clock: Callable[[], float]
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._delivery = delivery
        self._inbox = inbox
        self._clock = clock
        self._disk = None if scheduler.kv.lower is None else scheduler.kv.lower.disk
        if self._disk is not None:
            self._disk.on_progress = inbox.nudge
        self._failures: deque[float] = deque(maxlen=MAX_FAILURES)
        self.num_failures = 0  # steps that failed with no request to blame
        self.heartbeat = clock()

    def run(self) -> None:
        try:
            while not self._inbox.is_stopping and self._inbox.dead_reason is None:
                self.heartbeat = self._clock()
                self._read_inbox()
                if not self._step():
                    self._inbox.rest(lambda: self._scheduler.has_work, IDLE_TICK_S, BLOCKED_TICK_S)
        except BaseException as error:  # whatever it is, health must not say that this thread lives
            log.exception("the engine loop failed")
            self._inbox.die(f"internal error ({type(error).__name__})")
        finally:
            self.end()

    def _read_inbox(self) -> None:
        items, abort_all = self._inbox.take()
        events: list[Event] = []
        for item in items:
            if isinstance(item, Abort):
                events += self._scheduler.abort(item.request_id, item.index, self._clock())
            else:
                events += self._enqueue(item)
        if abort_all:
            events += self._scheduler.abort_all(self._clock())
        self._delivery.hand_over(events)

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
            self._inbox.arrived(request.request_id)
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
                self.heartbeat = self._clock()
            events = scheduler.commit(plan, result, self._clock())
        except Exception as error:
            self._record_failure(error)
            failure = client_error(error)
            events = scheduler.take_events() + scheduler.fail_all(failure, self._clock(), running_only=True)
            self._delivery.hand_over(events)
            return True
        if suspicion is not None and not self._runner_works():
            self._record_failure(suspicion)
        _log_errors(events)
        self._delivery.hand_over(events)
        return bool(plan.entries or plan.saves or plan.restores or events)

    # --- failures ------------------------------------------------------------------------------------------------

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
        self.num_failures += 1
        self._failures.append(now)
        if len(self._failures) == MAX_FAILURES and now - self._failures[0] <= FAILURE_WINDOW_S:
            reason = f"{MAX_FAILURES} failed steps within {FAILURE_WINDOW_S:.0f} s ({type(error).__name__})"
            self._inbox.die(reason)

    # --- the end -------------------------------------------------------------------------------------------------

    def end(self) -> None:
        """The loop is over, or never began: every request still known gets its last event."""
        try:
            self._read_inbox()
            if self._inbox.dead_reason is None:
                events = self._scheduler.abort_all(self._clock())
            else:
                error = EngineDeadError(f"the engine is not running: {self._inbox.dead_reason}")
                events = self._scheduler.fail_all(error, self._clock())
            self._delivery.hand_over(self._scheduler.take_events() + events)
        except Exception:
            log.exception("the engine could not end every request")
        self._inbox.end()
        if self._disk is not None:
            self._flush(self._disk)

    def _flush(self, disk: SlowTier) -> None:
        """What is in the pool and not on disk yet would be lost with the process."""
        deadline = self._clock() + FLUSH_S
        try:
            while self._inbox.dead_reason is None and self._scheduler.num_unsaved and self._clock() < deadline:
                plan = self._scheduler.schedule(self._clock())
                if not plan.saves:  # the disk is behind
                    time.sleep(BLOCKED_TICK_S)
                    continue
                result, _ = execute_isolated(self._runner, plan)
                self._scheduler.commit(plan, result, self._clock())
        except Exception as error:
            log.error("the KV cache was not saved to disk whole: %s", type(error).__name__)
        disk.close(max(0.0, deadline - self._clock()))


def _log_errors(events: list[Event]) -> None:
    for request_id, error in {event.request_id: event.error for event in events if event.error}.items():
        log.error("request %r failed: %s", request_id, type(error.__cause__ or error).__name__)
