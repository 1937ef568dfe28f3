"""ASGI, outermost: a request id, one log line, the reject counter, and the last wall for exceptions.

`X-Request-Id` is data: echoed when it is 1 to 128 of `[A-Za-z0-9._:-]`, replaced otherwise.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable
from typing import Any, Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from setpoint.server.errors import as_api_error, send_error
from setpoint.server.logs import EventLog, where

_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
# routes whose requests are logged at debug level only
_QUIET: Final = frozenset({"startupz", "livez", "readyz", "health", "ping", "metrics"})


class Record:
    """What is known of one HTTP request when it ends."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.status = 0
        self.reason: str | None = None  # of the error, from the closed list
        self.cause: BaseException | None = None
        self.fields: dict[str, Any] = {}  # added by the endpoint: tokens, ttft_ms, ...


class Observe:
    def __init__(self, app: ASGIApp, *, log: EventLog, rejected: Callable[[str], None]) -> None:
        self.app = app
        self.log = log
        self.rejected = rejected

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        record = Record(_request_id(scope["headers"]))
        scope["setpoint.record"] = record
        began = time.perf_counter()

        async def observed(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message.setdefault("headers", []).append((b"x-request-id", record.request_id.encode()))
            await send(message)

        try:
            await self.app(scope, receive, observed)
        except Exception as error:
            if record.status == 0:
                await send_error(as_api_error(error), scope, receive, observed, cause=error)
            else:  # inside a body: the connection is cut by the server
                record.reason, record.cause = "engine_error", error
                abort = scope.get("setpoint.abort")
                if abort is not None:
                    abort()
        finally:
            self._write(record, getattr(scope.get("route"), "name", "unmatched"), time.perf_counter() - began)

    def _write(self, record: Record, route: str, seconds: float) -> None:
        fields: dict[str, Any] = {"request_id": record.request_id, "route": route, "status": record.status}
        fields["duration_ms"] = round(seconds * 1e3, 3)
        if record.reason is not None:
            fields["reason"] = record.reason
            self.rejected(record.reason)
        if record.cause is not None:
            fields |= {"error": type(record.cause).__name__, "where": where(record.cause)}
        level = "error" if record.cause is not None else "debug" if route in _QUIET else "info"
        self.log.write("request", level, **fields, **record.fields)


def _request_id(headers: list[tuple[bytes, bytes]]) -> str:
    values = [value for name, value in headers if name == b"x-request-id"]
    if len(values) == 1 and _ID.fullmatch(values[0]):
        return values[0].decode()
    return uuid.uuid4().hex
