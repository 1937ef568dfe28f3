"""From the engine thread to the event loop: one wake-up a step, one inbox a request."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque

from setpoint.engine.events import Event


class Inbox:
    """The events of one HTTP request, in order. Read by one task of the loop."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._ready = asyncio.Event()

    def put(self, event: Event) -> None:
        self._events.append(event)
        self._ready.set()

    def wake(self) -> None:
        """Let the reader look at something else than events."""
        self._ready.set()

    async def get(self) -> list[Event]:
        """All events that have arrived; waits for one or for `wake` when there are none."""
        await self._ready.wait()
        self._ready.clear()
        events = list(self._events)
        self._events.clear()
        return events


class EventRouter:
    """`deliver` is called by the engine once a step, on its own thread; everything else on the event loop."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._inboxes: dict[str, Inbox] = {}

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def open(self, engine_id: str, inbox: Inbox) -> None:
        self._inboxes[engine_id] = inbox

    def close(self, engine_id: str) -> None:
        self._inboxes.pop(engine_id, None)

    def deliver(self, events: list[Event]) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to read
                self._loop.call_soon_threadsafe(self._dispatch, events)

    def _dispatch(self, events: list[Event]) -> None:
        for event in events:
            inbox = self._inboxes.get(event.request_id)
            if inbox is not None:
                inbox.put(event)

    def __len__(self) -> int:
        return len(self._inboxes)
