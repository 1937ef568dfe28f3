"""A proxy in front of one OpenAI-compatible endpoint that records what passes: an ASGI app, for loopback addresses.

Bytes pass as they are and at once, streams too. The client's headers go on to the upstream, its credentials among
them; none is kept or written down. Two things are changed: headers that belong to one connection (RFC 9110, 7.6.1)
are left out, and `Accept-Encoding` names only what can be read here. A client that leaves ends its upstream request.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

import httpx
import orjson

from setpoint.errors import ConfigError
from setpoint.workload.record import Recording, Seen
from setpoint.workload.record_answer import READABLE_ENCODINGS, AnswerMeter, Encode, estimated, read_prompt

MAX_BODY_BYTES: Final = 64 << 20
MAX_BUFFERED_BYTES: Final = 512 << 20  # of all bodies under way
MAX_CONCURRENT: Final = 1024
CONNECT_TIMEOUT_S: Final = 30.0
READ_TIMEOUT_S: Final = 600.0  # until the next byte: a long prompt is silent for long
_GENERATES: Final = {"chat/completions": "chat", "completions": "completion", "responses": "responses"}
_HOP: Final = frozenset(
    {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer"}
    | {"transfer-encoding", "upgrade"}
)
_OURS: Final = frozenset({"host", "content-length", "accept-encoding", "expect"})  # of a request; written anew
_HOSTS: Final = frozenset({"localhost", "127.0.0.1", "[::1]"})

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]


def check_upstream(url: str) -> httpx.URL:
    """Raises ConfigError for what is no http(s) address without credentials."""
    try:
        parts = urlsplit(url)
        port = parts.port
        checked = httpx.URL(url)
    except (ValueError, httpx.InvalidURL):
        raise ConfigError("--upstream is not a URL; give one like https://api.openai.com") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise ConfigError("--upstream must be an http or https URL with a host, like https://api.openai.com")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise ConfigError("--upstream takes no credentials, query or fragment; clients send their own keys")
    return checked.copy_with(path=parts.path.rstrip("/") or "/")


@dataclass(slots=True)
class _Exchange:
    """One request to record."""

    class_name: str
    body: bytes
    arrival_s: float
    meter: AnswerMeter | None = None
    end_s: float = 0.0


class RecordingProxy:
    def __init__(
        self,
        upstream: httpx.URL,
        recording: Recording,
        clock: Callable[[], float],
        *,
        encode: Encode | None = None,
        keeps_text: bool = False,
        client: httpx.AsyncClient | None = None,
    ) -> None:
        self._upstream = upstream
        self._recording = recording
        self._clock = clock
        self._encode = encode
        self._keeps_text = keeps_text
        self._client = client or _client()
        self._num_active = 0
        self._buffered_bytes = 0

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        if scope["type"] != "http":
            return
        if not _is_local(scope["headers"]):
            await _refuse(send, 403, "This host name is not served; use the loopback address.")
            return
        if self._num_active >= MAX_CONCURRENT:
            await _refuse(send, 503, "Too many requests are under way.")
            return
        self._num_active += 1
        try:
            await self._serve(scope, receive, send)
        finally:
            self._num_active -= 1

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._client.aclose()
        await send({"type": "lifespan.shutdown.complete"})

    async def _serve(self, scope: Any, receive: Receive, send: Send) -> None:
        arrival_s = self._clock()
        body = bytearray()
        try:
            async for piece in _pieces(receive):
                body += piece
                self._buffered_bytes += len(piece)
                if len(body) > MAX_BODY_BYTES:
                    await _refuse(send, 413, f"A body may have {MAX_BODY_BYTES >> 20} MiB.")
                    return
                if self._buffered_bytes > MAX_BUFFERED_BYTES:
                    await _refuse(send, 503, "Too much is being sent.")
                    return
            await self._exchange(scope, bytes(body), receive, send, arrival_s)
        except _ClientLeftError:
            return
        finally:
            self._buffered_bytes -= len(body)

    async def _exchange(self, scope: Any, body: bytes, receive: Receive, send: Send, arrival_s: float) -> None:
        exchange = None
        kind = next((kind for end, kind in _GENERATES.items() if scope["path"].endswith("/" + end)), None)
        if kind is not None and scope["method"] == "POST":
            exchange = _Exchange(kind, body, arrival_s)
        passing = asyncio.ensure_future(self._pass(scope, body, send, exchange))
        leaving = asyncio.ensure_future(_disconnect(receive))
        try:
            await asyncio.wait((passing, leaving), return_when=asyncio.FIRST_COMPLETED)
            if passing.done():
                passing.result()
        finally:
            for task in (passing, leaving):
                task.cancel()
            await asyncio.gather(passing, leaving, return_exceptions=True)
            if exchange is not None and exchange.meter is not None:
                exchange.end_s = self._clock()
                self._recording.add(lambda: self._seen(exchange), len(body))

    async def _pass(self, scope: Any, body: bytes, send: Send, exchange: _Exchange | None) -> None:
        request = httpx.Request(scope["method"], self._url(scope), headers=_to_upstream(scope["headers"]), content=body)
        try:
            answer = await self._client.send(request, stream=True)
        except httpx.TimeoutException:
            await _refuse(send, 504, "The upstream did not answer in time.")
            return
        except httpx.HTTPError as error:
            await _refuse(send, 502, f"The upstream cannot be reached ({type(error).__name__}).")
            return
        try:
            if exchange is not None and answer.status_code == 200:
                headers = answer.headers
                exchange.meter = AnswerMeter(
                    headers.get("content-type", ""),
                    headers.get("content-encoding", ""),
                    keeps_text=self._encode is not None,
                )
            start = {"type": "http.response.start", "status": answer.status_code}
            await send(start | {"headers": _to_client(answer.headers.raw)})
            async for piece in answer.aiter_raw():
                if exchange is not None and exchange.meter is not None:
                    exchange.meter.feed(piece)
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except httpx.HTTPError:
            return  # the upstream broke off: without an end, so does our connection
        finally:
            with contextlib.suppress(httpx.HTTPError):
                await answer.aclose()

    def _url(self, scope: Any) -> httpx.URL:
        """The client's path behind the upstream's; a version that both begin with stands once."""
        path: bytes = scope.get("raw_path") or scope["path"].encode()
        base = self._upstream.raw_path.split(b"?")[0].rstrip(b"/")
        if base.endswith(b"/v1") and (path == b"/v1" or path.startswith(b"/v1/")):
            base = base[: -len(b"/v1")]
        query = b"?" + scope["query_string"] if scope["query_string"] else b""
        return self._upstream.copy_with(raw_path=base + path.split(b"?")[0] + query)

    def _seen(self, exchange: _Exchange) -> Iterable[Seen]:
        """In the recording's thread."""
        meter = exchange.meter
        assert meter is not None
        meter.finish()
        prompt = read_prompt(exchange.body)
        if prompt is None:
            return []
        blocks: Any = prompt.token_ids
        num_input = len(blocks or ())
        num_output = estimated(meter.num_text_bytes)
        if self._encode is not None:
            blocks = self._encode(prompt.text) if blocks is None else blocks
            num_input = len(blocks)
            num_output = len(self._encode("".join(meter.text)))
        elif blocks is None:
            blocks = prompt.text.encode("utf-8", "replace")
            num_input = estimated(len(blocks))
        return [
            Seen(
                exchange.arrival_s,
                exchange.end_s,
                blocks,
                meter.input_tokens or num_input,
                meter.output_tokens or num_output,
                exchange.class_name,
                prompt.session,
                prompt.turns,
                prompt.messages or None if self._keeps_text else None,
            )
        ]


def _client() -> httpx.AsyncClient:
    timeout = httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    limits = httpx.Limits(max_connections=MAX_CONCURRENT, max_keepalive_connections=64)
    return httpx.AsyncClient(timeout=timeout, limits=limits, follow_redirects=False)


def _is_local(headers: Headers) -> bool:
    """Asked for by a loopback name: another site can point its own name at us."""
    hosts = [value.decode("latin-1").lower() for name, value in headers if name == b"host"]
    name = hosts[0] if len(hosts) == 1 else ""
    return (name if name.endswith("]") else name.rpartition(":")[0] or name) in _HOSTS


def _per_connection(headers: Iterable[tuple[bytes, bytes]]) -> set[str]:
    named = {
        part.strip().lower()
        for name, value in headers
        if name.lower() == b"connection"
        for part in value.decode("latin-1").split(",")
    }
    return named | _HOP


def _to_upstream(headers: Headers) -> Headers:
    dropped = _per_connection(headers) | _OURS
    accepted = b",".join(value for name, value in headers if name == b"accept-encoding").decode("latin-1").lower()
    readable = [name for name in READABLE_ENCODINGS if name in accepted]
    kept = [(name, value) for name, value in headers if name.decode("latin-1").lower() not in dropped]
    return [*kept, (b"accept-encoding", ", ".join(readable or ["identity"]).encode())]


def _to_client(headers: Headers) -> Headers:
    dropped = _per_connection(headers)
    return [(name, value) for name, value in headers if name.decode("latin-1").lower() not in dropped]


class _ClientLeftError(Exception):
    pass


async def _pieces(receive: Receive) -> AsyncIterator[bytes]:
    """Of a request's body."""
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise _ClientLeftError
        yield message.get("body", b"")
        if not message.get("more_body"):
            return


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _refuse(send: Send, status: int, message: str) -> None:
    body = orjson.dumps({"error": {"message": message, "type": "proxy_error", "param": None, "code": status}})
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*headers, (b"connection", b"close")]})
    await send({"type": "http.response.body", "body": body})
