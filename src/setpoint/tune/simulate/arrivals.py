"""When the requests of a trace come: at their time, and a session's next turn not before it has its answer and thought.

An open loop in everything else: nobody waits for a slow server. The clock is the caller's, real or virtual.
"""

from __future__ import annotations

import heapq
from collections import deque

from setpoint.workload.trace import Trace


class Arrivals:
    """Seconds from the start of the trace; requests are known by their number in it."""

    def __init__(self, trace: Trace) -> None:
        self._requests = trace.requests
        self._begin = trace.requests[0].arrival_s if trace.requests else 0.0
        self._due: list[tuple[float, int]] = []
        self._held: dict[str, deque[int]] = {}  # later turns of each session, in order
        for index, request in enumerate(trace.requests):
            if request.session is not None and request.session in self._held:
                self._held[request.session].append(index)
                continue
            if request.session is not None:
                self._held[request.session] = deque()
            self._due.append((request.arrival_s - self._begin, index))
        heapq.heapify(self._due)

    @property
    def next_s(self) -> float | None:
        """When the next one comes; None while all that are left wait for answers, or none is left."""
        return self._due[0][0] if self._due else None

    def take(self, now: float) -> list[tuple[float, int]]:
        """Those that are due by now, with the time at which they were, in that order."""
        due: list[tuple[float, int]] = []
        while self._due and self._due[0][0] <= now:
            due.append(heapq.heappop(self._due))
        return due

    def over(self, index: int, now: float) -> None:
        """A request has its answer, or was refused: its session thinks and goes on."""
        session = self._requests[index].session
        held = None if session is None else self._held[session]
        if held:
            following = held.popleft()
            request = self._requests[following]
            due = max(request.arrival_s - self._begin, now + (request.think_s or 0.0))
            heapq.heappush(self._due, (due, following))
