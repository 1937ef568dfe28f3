"""uvicorn's HTTP/1.1 protocol with the limits that only the byte stream can decide.

Header bytes and fields (431), body chunks (413), time to send the headers (408), number of connections (503), and an
error body in our shape for what is not HTTP. Ambiguous requests (two lengths, length and chunked) are refused by the
parser. Each scope carries `setpoint.abort`, which cuts the connection of a client that does not read.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

import httptools
from starlette.responses import Response
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from setpoint.server.context import ServerSettings
from setpoint.server.errors import ApiError


class LimitedProtocol(HttpToolsProtocol):
    """One connection. `settings` is filled in by `limited_protocol`."""

    settings: ServerSettings

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._in_headers = False
        self._header_bytes = 0
        self._num_chunks = 0
        self._refusal: ApiError | None = None
        self._deadline: asyncio.TimerHandle | None = None
        if len(self.connections) > self.settings.max_connections:
            self._refuse(ApiError("not_ready", "Too many connections."))
        else:
            self._start_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_deadline()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._unset_keepalive_if_required()
        continued = self._in_headers
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self.cycle.keep_alive = False  # other protocols are not offered: answer, then close
        except httptools.HttpParserError:
            self._refuse(self._refusal or ApiError("malformed", "This is not a valid HTTP request."))
            return
        if continued and self._in_headers:  # one long line, which the parser has not handed over yet
            self._header_bytes += len(data)
            if self._header_bytes > self.settings.max_header_bytes:
                self._refuse(_headers_too_large())

    # Parser callbacks. An exception in one stops the parser and reaches `data_received`.

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_headers = True
        self._header_bytes = self._num_chunks = 0
        scope = cast(dict[str, Any], self.scope)
        scope["setpoint.abort"] = self.transport.abort
        self._start_deadline()

    def on_url(self, url: bytes) -> None:
        self._count_header(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_header(len(name) + len(value) + 4)
        if len(self.headers) >= self.settings.max_header_fields:
            self._stop(_headers_too_large())
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_headers = False
        self._stop_deadline()
        super().on_headers_complete()

    def on_chunk_header(self) -> None:
        self._num_chunks += 1
        if self._num_chunks > self.settings.max_body_chunks:
            self._stop(ApiError("body_too_large", f"The body has more than {self.settings.max_body_chunks} chunks."))

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing() and self.cycle.response_complete and self.cycle.more_body:
            self.transport.close()  # answered early: nobody will read the rest of this body

    def _count_header(self, num_bytes: int) -> None:
        self._header_bytes += num_bytes
        if self._header_bytes > self.settings.max_header_bytes:
            self._stop(_headers_too_large())

    def _stop(self, error: ApiError) -> None:
        self._refusal = error
        raise error

    def _refuse(self, error: ApiError) -> None:
        """Answer on the raw connection and close it; inside an answer that has begun, just close."""
        self._stop_deadline()
        if self.transport.is_closing():
            return
        cycle = self.cycle
        if cycle is None or cycle.response_complete or not (cycle.response_started or self.pipeline):
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
            self.transport.write(_raw(error.response()))
        self.transport.close()

    def _start_deadline(self) -> None:
        self._stop_deadline()
        self._deadline = self.loop.call_later(self.settings.header_timeout_s, self._too_slow)

    def _stop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        self._refuse(ApiError("client_too_slow", "The request headers took too long."))


def _headers_too_large() -> ApiError:
    return ApiError("headers_too_large", "The request headers are too large or too many.")


def _raw(response: Response) -> bytes:
    head = [
        STATUS_LINE[response.status_code],
        *(name + b": " + value + b"\r\n" for name, value in response.raw_headers),
    ]
    return b"".join([*head, b"connection: close\r\n\r\n", bytes(response.body)])


def limited_protocol(settings: ServerSettings) -> type[LimitedProtocol]:
    """The protocol class for one server; uvicorn wants a class, so the settings are bound to a subclass."""
    return type("LimitedProtocol", (LimitedProtocol,), {"settings": settings})
