"""HTTP/1.1 for a load generator: one protocol object a connection, a clock reading with every piece that arrives.

asyncio and httptools' parser and nothing between them: what a client library adds to a token is of the order of what a
fast engine needs for it (decision 14). Connections are kept and reused, as clients of an API do.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

import httptools

from setpoint.errors import ConfigError

MAX_HEADER_BYTES = 1 << 16
KEPT_S = 3.0  # servers close idle connections after 5 s and more

OnBody = Callable[[int, bytes, float], None]  # status, piece of the body, when it came


class ConnectionLost(Exception):
    """The connection ended before the answer did. `untouched`: no byte of the answer had come."""

    def __init__(self, message: str, *, untouched: bool) -> None:
        super().__init__(message)
        self.untouched = untouched


@dataclass(frozen=True, slots=True)
class Address:
    host: str
    port: int
    is_tls: bool
    prefix: str  # path in front of /v1/...

    @classmethod
    def parse(cls, url: str) -> Address:
        """Raises ConfigError. A trailing /v1 is what clients are told; it is understood."""
        try:
            parts = urlsplit(url if "//" in url else f"http://{url}")
            port = parts.port
        except ValueError:
            raise ConfigError(f"{url[:200]!r} is not a URL; give one such as http://127.0.0.1:8000") from None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
            raise ConfigError(f"{url[:200]!r} is not a server's URL; give one such as http://127.0.0.1:8000")
        is_tls = parts.scheme == "https"
        prefix = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, port or (443 if is_tls else 80), is_tls, prefix)

    @property
    def base(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.is_tls else 'http'}://{host}:{self.port}{self.prefix}"


class Connection(asyncio.Protocol):
    """One exchange at a time; `_done` is the one under way."""

    def __init__(self) -> None:
        self.idle_since = 0.0
        self.is_open = False
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._done: asyncio.Future[None] | None = None
        self._on_body: OnBody = _nobody
        self._now = 0.0
        self._status = 0
        self._touched = False
        self._until_closed = False

    # asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self.is_open = True

    def data_received(self, data: bytes) -> None:
        self._now = time.monotonic()
        self._touched = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"not HTTP: {error}")
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        if self._until_closed and error is None:
            self.on_message_complete()
        self._fail("the server closed the connection" if error is None else f"connection lost: {error}")

    # httptools

    def on_message_begin(self) -> None:
        self._until_closed = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._until_closed = False

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self._on_body(self._status, body, self._now)

    def on_message_complete(self) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(None)
        self._until_closed = False
        if not self._parser.should_keep_alive():
            self.close()

    # Ours

    def send(self, request: bytes, on_body: OnBody) -> asyncio.Future[None]:
        """Write now; the future ends with the answer. Raises ConnectionLost through it."""
        self._done = asyncio.get_running_loop().create_future()
        self._on_body, self._status, self._touched = on_body, 0, False
        if self._transport is None or not self.is_open:
            self._fail("the server closed the connection")
        else:
            self._transport.write(request)
        return self._done

    @property
    def status(self) -> int:
        return self._status

    def close(self) -> None:
        self.is_open = False
        if self._transport is not None:
            self._transport.close()

    def _fail(self, message: str) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(ConnectionLost(message, untouched=not self._touched))


class Connections:
    """As many as there are exchanges under way; idle ones are taken again, the freshest first."""

    def __init__(self, address: Address, headers: dict[str, str]) -> None:
        self._address = address
        self._ssl = ssl.create_default_context() if address.is_tls else None
        fields = {"Host": f"{address.host}:{address.port}", "Content-Type": "application/json", **headers}
        self._head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self._idle: list[Connection] = []

    def request(self, path: str, body: bytes) -> bytes:
        line = f"POST {self._address.prefix}{path} HTTP/1.1\r\n"
        return f"{line}{self._head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    async def take(self) -> Connection:
        """One to send over: kept from before, or new. Raises OSError."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open and time.monotonic() - connection.idle_since < KEPT_S:
                return connection
            connection.close()
        return await self._connect()

    async def exchange(
        self, connection: Connection, request: bytes, on_sent: Callable[[float], None], on_body: OnBody
    ) -> int:
        """The status, when the whole answer has come. Raises ConnectionLost and OSError.

        A kept connection that the server had closed meanwhile is no failure: the request goes out on a new one.
        """
        try:
            return await self._over(connection, request, on_sent, on_body)
        except ConnectionLost as lost:
            if not lost.untouched or not connection.idle_since:
                raise
        return await self._over(await self._connect(), request, on_sent, on_body)

    async def _over(
        self, connection: Connection, request: bytes, on_sent: Callable[[float], None], on_body: OnBody
    ) -> int:
        done = connection.send(request, on_body)
        on_sent(time.monotonic())
        try:
            await done
        except BaseException:
            connection.close()
            raise
        if connection.is_open:
            connection.idle_since = time.monotonic()
            self._idle.append(connection)
        return connection.status

    async def _connect(self) -> Connection:
        address = self._address
        loop = asyncio.get_running_loop()
        _, protocol = await loop.create_connection(Connection, address.host, address.port, ssl=self._ssl)
        return protocol

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()


def _nobody(status: int, body: bytes, now: float) -> None:
    """Bytes that belong to no exchange."""
