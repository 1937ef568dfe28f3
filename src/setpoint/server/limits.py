"""ASGI: what a request may send, decided before its body is read and while it is.

Header sizes, body size (on Content-Length first, then on what arrives), time to send it, and encoding: bodies are not
compressed. That they are JSON is checked where one is read.
"""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from setpoint.server.context import ServerSettings
from setpoint.server.errors import ApiError, send_error


class Limits:
    def __init__(self, app: ASGIApp, *, settings: ServerSettings) -> None:
        self.app = app
        self.settings = settings
        self.buffered_bytes = 0  # of the bodies of all requests under way

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._check_headers(scope)
        except ApiError as error:
            error.headers["Connection"] = "close"  # the body is not going to be read
            await send_error(error, scope, receive, send)
            return
        body = _Body(receive, self)
        try:
            await self.app(scope, body, send)
        finally:
            self.buffered_bytes -= body.num_bytes

    def _check_headers(self, scope: Scope) -> None:
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        if len(headers) > self.settings.max_header_fields:
            raise ApiError("headers_too_large", "The request headers are too many.")
        if sum(len(name) + len(value) for name, value in headers) > self.settings.max_header_bytes:
            raise ApiError("headers_too_large", "The request headers are too large.")
        for name, value in headers:
            if name == b"content-length":
                if not value.isdigit():
                    raise ApiError("malformed", "Content-Length is not a number.", param="Content-Length")
                if len(value) > 19 or int(value) > self.settings.max_body_bytes:
                    raise _too_large(self.settings)
            elif name == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
                raise ApiError(
                    "unsupported_media_type", "Compressed bodies are not accepted.", param="Content-Encoding"
                )
            elif name == b"upgrade" and scope["method"] == "POST":  # the parser gives no body after it
                raise ApiError("malformed", "Other protocols are not offered; send plain HTTP/1.1.", param="Upgrade")


class _Body:
    """`receive` that counts bytes and time until the body is complete, then passes messages through."""

    def __init__(self, receive: Receive, limits: Limits) -> None:
        self.num_bytes = 0
        self._receive = receive
        self._limits = limits
        self._settings = limits.settings
        self._complete = False
        self._deadline: float | None = None

    async def __call__(self) -> Message:
        if self._complete:
            return await self._receive()
        loop = asyncio.get_running_loop()
        if self._deadline is None:
            self._deadline = loop.time() + self._settings.body_timeout_s
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise ApiError(
                "client_too_slow", "The request body took too long.", headers={"Connection": "close"}
            ) from None
        num_new = len(message.get("body", b""))
        self.num_bytes += num_new
        self._limits.buffered_bytes += num_new
        self._complete = not message.get("more_body", False)
        if self.num_bytes > self._settings.max_body_bytes:
            raise _too_large(self._settings)
        if self._limits.buffered_bytes > self._settings.max_buffered_bytes:
            raise ApiError("rate_limited", "Too many large requests at once.", headers={"Connection": "close"})
        return message


def _too_large(settings: ServerSettings) -> ApiError:
    message = f"The body is larger than {settings.max_body_bytes} bytes."
    return ApiError("body_too_large", message, headers={"Connection": "close"})
