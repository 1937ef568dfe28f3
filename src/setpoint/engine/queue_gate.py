"""The bounded waiting queue: who may still enter, and when a refused client should come back."""

from __future__ import annotations

import math
import threading
from collections import deque

from setpoint.errors import QueueFullError

MAX_RETRY_AFTER_S = 600
RATE_SAMPLES = 64  # departures that the drain rate is measured over
RATE_WINDOW_S = 60.0  # and how old they may be


class QueueGate:
    """Counts waiting requests and their prompt tokens. Thread-safe: clients enter, the engine thread lets leave."""

    def __init__(self, max_requests: int, max_tokens: int) -> None:
        self.max_requests = max_requests
        self.max_tokens = max_tokens
        self.num_requests = 0
        self.num_tokens = 0
        self.num_refused = 0
        self._departures: deque[float] = deque(maxlen=RATE_SAMPLES)
        self._lock = threading.Lock()

    def check(self, now: float) -> None:
        """Raise QueueFullError if not even a one-token request could enter: known before its text is tokenised."""
        with self._lock:
            self._refuse_if_full(1, now)

    def enter(self, num_tokens: int, now: float) -> None:
        """Count a request in, or raise QueueFullError. An empty queue takes any request."""
        with self._lock:
            self._refuse_if_full(num_tokens, now)
            self.num_requests += 1
            self.num_tokens += num_tokens

    def _refuse_if_full(self, num_tokens: int, now: float) -> None:
        full = self.num_requests + 1 > self.max_requests or self.num_tokens + num_tokens > self.max_tokens
        if full and self.num_requests > 0:
            self.num_refused += 1
            retry_after_s = self._retry_after_s(now)
            raise QueueFullError(
                f"the server is overloaded: {self.num_requests} requests with {self.num_tokens} prompt tokens "
                f"are waiting; retry in {retry_after_s} s",
                retry_after_s=retry_after_s,
            )

    def leave(self, num_tokens: int, now: float) -> None:
        """A request started to run, or gave up waiting."""
        with self._lock:
            self.num_requests -= 1
            self.num_tokens -= num_tokens
            self._departures.append(now)

    def retry_after_s(self, now: float) -> int:
        with self._lock:
            return self._retry_after_s(now)

    def _retry_after_s(self, now: float) -> int:
        """Whole seconds until the queue of now has drained, at the rate of the recent departures.

        All of it, not one place: every refused client gets the same answer and comes back at the same time.
        """
        recent = [time for time in self._departures if now - time <= RATE_WINDOW_S]
        if not recent:
            return 1 if not self._departures else min(math.ceil(RATE_WINDOW_S), MAX_RETRY_AFTER_S)
        seconds = self.num_requests * max(now - recent[0], 1e-3) / len(recent)
        return min(max(math.ceil(seconds), 1), MAX_RETRY_AFTER_S)
