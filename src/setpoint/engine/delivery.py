"""Handing events over to the front end: all of a step at once, and each alone where that fails."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from setpoint.engine.blast_wall import client_error
from setpoint.engine.events import Event
from setpoint.engine.scheduler import Scheduler

log = logging.getLogger(__name__)


class Delivery:
    """`deliver(events)` takes the whole list, or raises before it took any."""

    def __init__(
        self, scheduler: Scheduler, deliver: Callable[[list[Event]], None], clock: Callable[[], float]
    ) -> None:
        self._scheduler = scheduler
        self.deliver = deliver
        self._clock = clock

    def hand_over(self, events: list[Event]) -> None:
        """A request whose events cannot be delivered is ended; the others get theirs."""
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
        self.deliver(events)

    def _give_up(self, event: Event, error: Exception) -> None:
        """An event of this request cannot be delivered: end the request, and try to say so once."""
        ended = self._scheduler.abort(event.request_id, None, self._clock())
        failure = client_error(error)
        if event.finish_reason is not None:
            ended.append(event)
        try:
            self.deliver([replace(last, token_ids=(), finish_reason="error", error=failure) for last in ended])
        except Exception:
            log.error("request %r cannot be told of its end", event.request_id)
