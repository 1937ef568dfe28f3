"""What other threads ask of the engine thread, and how far its life has come. One condition guards all of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from setpoint.engine.request import Request
from setpoint.errors import EngineDeadError


@dataclass(frozen=True, slots=True)
class Abort:
    request_id: str
    index: int | None  # None: every sequence


class Inbox:
    """`with inbox:` keeps every other thread out. The flags may be read without that."""

    def __init__(self) -> None:
        self._wake = threading.Condition()
        self._items: list[Request | Abort] = []
        self._pending: set[str] = set()  # ids of the requests that the scheduler does not know yet
        self._abort_all = False
        self._nudged = False
        self._idle = True
        self._ended = False
        self.is_draining = False
        self.is_stopping = False
        self.dead_reason: str | None = None

    def __enter__(self) -> Inbox:
        self._wake.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._wake.release()

    # --- for other threads ---------------------------------------------------------------------------------------

    def check_open(self) -> None:
        """Raise EngineDeadError if the engine takes no more work."""
        if self.dead_reason is not None:
            raise EngineDeadError(f"the engine is not running: {self.dead_reason}")
        if self.is_draining or self.is_stopping:
            raise EngineDeadError("draining: the server is shutting down and takes no new requests")

    def put(self, item: Request | Abort) -> None:
        with self._wake:
            if isinstance(item, Request):
                self._pending.add(item.request_id)
                self._idle = False
            elif self._ended:
                return
            self._items.append(item)
            self._wake.notify_all()

    def is_pending(self, request_id: str) -> bool:
        return request_id in self._pending

    @property
    def num_pending(self) -> int:
        return len(self._pending)

    def nudge(self) -> None:
        """There is news elsewhere."""
        with self._wake:
            self._nudged = True
            self._wake.notify_all()

    def ask_to_abort_all(self) -> None:
        with self._wake:
            self._abort_all = True
            self._wake.notify_all()

    def ask_to_stop(self) -> bool:
        """False when that was asked before."""
        with self._wake:
            already, self.is_stopping = self.is_stopping, True
            self._wake.notify_all()
            return not already

    def wait_idle(self, timeout_s: float) -> bool:
        """Until the engine thread has nothing left to do, or is dead."""
        with self._wake:
            return self._wake.wait_for(lambda: self._idle or self.dead_reason is not None, timeout_s)

    # --- for the engine thread -----------------------------------------------------------------------------------

    def take(self) -> tuple[list[Request | Abort], bool]:
        """What has come since the last call, and whether all requests shall be aborted."""
        with self._wake:
            items, self._items = self._items, []
            abort_all, self._abort_all = self._abort_all, False
            return items, abort_all

    def arrived(self, request_id: str) -> None:
        """The scheduler knows this request from now on, or never will."""
        with self._wake:
            self._pending.discard(request_id)

    def rest(self, has_work: Callable[[], bool], idle_s: float, blocked_s: float) -> None:
        """Sleep until something comes: for so long at most when idle, or when there is work that cannot go on."""
        with self._wake:
            nudged, self._nudged = self._nudged, False
            if self._items or self.is_stopping or self._abort_all or nudged:
                return
            self._idle = not has_work()
            if self._idle:
                self._wake.notify_all()
            self._wake.wait(idle_s if self._idle else blocked_s)

    def die(self, reason: str) -> None:
        with self._wake:
            self.dead_reason = reason
            self._wake.notify_all()

    def end(self) -> None:
        """The engine thread is over."""
        with self._wake:
            self._idle = self._ended = True
            self._wake.notify_all()
