"""The answer of a generation: server-sent events, or one JSON body. Either ends with its client.

Headers wait for the first token, the first error or the first keep-alive, whichever is earliest, so a failure before
the first token has its real HTTP status. After that a failure is an error event; `[DONE]` comes last, once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from setpoint.server.context import ServerSettings
from setpoint.server.errors import ApiError, as_api_error, send_error
from setpoint.server.forms import Form
from setpoint.server.generation import Generation, Piece, join

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
Finish = Callable[[str], None]  # called once with how the request ended: "ok", "error", "disconnected", "stalled"


def event(value: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"


class Answer(Response):
    """Base of both answers: runs `_work` beside a watch on the connection, and always closes the generation."""

    background = None

    def __init__(
        self, generation: Generation, form: Form, settings: ServerSettings, headers: dict[str, str], finish: Finish
    ) -> None:
        self._generation = generation
        self._form = form
        self._settings = settings
        self._extra_headers = headers
        self._finish = finish
        self._error: ApiError | None = None
        self._clock = asyncio.get_running_loop().time
        self._moved = self._clock()  # when something last came from the engine
        self._writing: float | None = None  # since when a write is under way
        self._is_silent = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ending = "disconnected"
        try:
            ended = await _first(self._work(scope, receive, send), _disconnect(receive), self._watch())
            if ended == 0:
                ending = "ok" if self._error is None else "error"
            elif ended == 2:
                ending = "stalled"
                abort = scope.get("setpoint.abort")
                if abort is not None:
                    abort()
        finally:
            self._generation.close()
            self._finish(ending)

    async def _work(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise NotImplementedError

    async def _watch(self) -> None:
        """Ends when the client has not taken what we wrote in time; wakes `_next` in a silence.

        One sleeper an answer: a timer for every token and every write is a tenth of what a token costs here.
        """
        patience, interval = self._settings.write_timeout_s, self._settings.ping_interval_s
        while True:
            now = self._clock()
            stalls = (now if self._writing is None else self._writing) + patience
            if stalls <= now:
                return
            if self._moved + interval <= now:
                self._is_silent = True
                self._moved = now
                self._generation.wake()
            await asyncio.sleep(min(stalls, self._moved + interval) - now)

    async def _next(self) -> list[Piece] | None:
        """The next pieces; None after `ping_interval_s` of silence, in which case the engine still lives."""
        pieces = await self._generation.next()
        if self._is_silent:
            self._is_silent = False
            if not pieces:
                self._generation.check_engine()
                return None
        self._moved = self._clock()
        return pieces

    async def _write(self, send: Send, body: bytes, *, more: bool = True) -> None:
        self._writing = self._clock()
        await send({"type": "http.response.body", "body": body, "more_body": more})
        self._writing = None


class JsonAnswer(Answer):
    async def _work(self, scope: Scope, receive: Receive, send: Send) -> None:
        held: list[list[Piece]] = [[] for _ in self._generation.choices]
        try:
            while not self._generation.is_finished:
                for piece in await self._next() or ():
                    held[piece.index].append(piece)
            body = orjson.dumps(self._form.body([join(pieces) for pieces in held]))
        except Exception as error:
            self._error = as_api_error(error)
            await send_error(self._error, scope, receive, send, cause=error)
            return
        response = Response(body, 200, self._extra_headers, media_type="application/json")
        await response(scope, receive, send)


class EventStream(Answer):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._opened: set[int] = set()

    async def _work(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        try:
            while not self._generation.is_finished:
                pieces = await self._next()
                out = PING if pieces is None else self._events(pieces)
                if out:
                    if not started:
                        started = True
                        await self._start(send)
                    await self._write(send, out)
            last = event(self._form.usage_chunk()) if self._generation.job.include_usage else b""
            await self._write(send, last + DONE, more=False)
        except Exception as error:
            self._error = as_api_error(error)
            if not started:
                await send_error(self._error, scope, receive, send, cause=error)
                return
            self._error.note(scope, error)
            await self._write(send, event(self._error.body()) + DONE, more=False)

    async def _start(self, send: Send) -> None:
        headers = {
            "Content-Type": "text/event-stream",
            "Cache-Control": "no-cache",
            "X-Accel-Buffering": "no",
            **self._extra_headers,
        }
        raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw})

    def _events(self, pieces: list[Piece]) -> bytes:
        """All events of a wake-up as one write. A choice's opening goes out before its first piece."""
        out = bytearray()
        for piece in pieces:
            if piece.index not in self._opened:
                self._opened.add(piece.index)
                opening = self._form.opening(piece.index)
                if opening is not None:
                    out += event(opening)
            chunk = self._form.chunk(piece)
            if chunk is not None:
                out += event(chunk)
        return bytes(out)


async def _first(*works: Coroutine[Any, Any, None]) -> int:
    """Which of these ends first (raising what it raised); the others are cancelled."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        ended = next(index for index, task in enumerate(tasks) if task.done())
        tasks[ended].result()
        return ended
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _disconnect(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
