"""Who may call: API keys, the Host allowlist, and the browser checks. Deny by default.

The decision is made on the route the router itself would pick, never on the text of the URL. A key is compared as
its SHA-256 digest, in constant time, against every configured key. The tenant is derived from the key; what a client
writes about itself is never an identity.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Receive, Scope, Send

from setpoint.errors import ConfigError
from setpoint.server.errors import ApiError, send_error

_RECHECK_S = 1.0
_HOST = re.compile(rb"(\[[0-9a-fA-F:.]{2,45}\]|[A-Za-z0-9._-]{1,253})(:[0-9]{1,5})?")
_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class KeyRing:
    """The accepted keys: those given, and those of a file that is read again when it changes."""

    def __init__(
        self, keys: Iterable[str] = (), file: Path | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._given = tuple(_digest(_checked(key)) for key in keys)
        self._file = file
        self._clock = clock
        self._from_file: tuple[bytes, ...] = ()
        self._stamp: tuple[int, int, int] | None = None
        self._checked_at = clock()
        if file is not None:
            try:
                self._load(file)
            except OSError:
                raise ConfigError(f"the API key file {str(file)!r} cannot be read") from None

    @property
    def required(self) -> bool:
        return bool(self._given) or self._file is not None

    def tenant(self, authorization: Sequence[bytes]) -> str | None:
        """The tenant of the Authorization header's values, None when there is no valid key in them."""
        if len(authorization) != 1:
            return None
        scheme, _, key = authorization[0].partition(b" ")
        key = key.strip()
        if scheme.lower() != b"bearer" or not key:
            return None
        self._refresh()
        presented, known = _digest(key), False
        for digest in self._given + self._from_file:
            known |= hmac.compare_digest(presented, digest)
        return hashlib.sha256(b"setpoint tenant\0" + key).hexdigest()[:32] if known else None

    def _refresh(self) -> None:
        if self._file is None or self._clock() - self._checked_at < _RECHECK_S:
            return
        self._checked_at = self._clock()
        try:
            self._load(self._file)
        except (OSError, ConfigError):
            return  # a file being replaced or broken: the keys we have stay

    def _load(self, file: Path) -> None:
        stat = file.stat()
        stamp = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
        if stamp == self._stamp:
            return
        lines = (line.strip() for line in file.read_text("utf-8").splitlines())
        keys = tuple(_digest(_checked(line)) for line in lines if line and not line.startswith("#"))
        if not keys:
            raise ConfigError("the API key file holds no key")
        self._from_file, self._stamp = keys, stamp


def _checked(key: str) -> bytes:
    if not 8 <= len(key) <= 512 or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError("an API key must be 8 to 512 printable ASCII characters without spaces")
    return key.encode()


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_bind(host: str, keys: KeyRing, *, allow_open: bool = False) -> None:
    """Raise ConfigError for an address that others can reach while no key is set."""
    if not (is_loopback(host) or keys.required or allow_open):
        raise ConfigError(f"--host {host} can be reached by others; set --api-key or --api-key-file, or use 127.0.0.1")


class Auth:
    """ASGI: 401 for everything but the open routes when keys are set, the browser checks when none are.

    `routes` is the app's own table; `open_names` are the names of routes that need no key.
    """

    def __init__(
        self, app: ASGIApp, *, routes: Sequence[BaseRoute], keys: KeyRing, open_names: frozenset[str], host: str
    ) -> None:
        self.app = app
        self.routes = routes
        self.keys = keys
        self.open_names = open_names
        # Another site can point its name at a loopback address, so there the Host header is held to a list.
        self.hosts = _LOOPBACK_NAMES | {host.strip("[]").lower()} if is_loopback(host) else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers: list[tuple[bytes, bytes]] = scope["headers"]
            try:
                host = _host_of(headers)
                if self.keys.required:
                    self._require_key(scope, headers)
                else:
                    self._require_same_origin(headers, host)
                    scope["setpoint.tenant"] = ""
            except ApiError as error:
                await send_error(error, scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _require_key(self, scope: Scope, headers: list[tuple[bytes, bytes]]) -> None:
        tenant = self.keys.tenant([value for name, value in headers if name == b"authorization"])
        if tenant is None and not self._is_open(scope):
            raise ApiError("unauthorized", "A valid API key is required.", headers={"WWW-Authenticate": "Bearer"})
        scope["setpoint.tenant"] = tenant or ""

    def _is_open(self, scope: Scope) -> bool:
        for route in self.routes:
            match, _ = route.matches(scope)
            if match is Match.FULL:
                return getattr(route, "name", "") in self.open_names
        return False

    def _require_same_origin(self, headers: list[tuple[bytes, bytes]], host: str) -> None:
        if self.hosts is not None and host.lower() not in self.hosts:
            raise ApiError("forbidden_origin", "This host name is not served; use the loopback address.")
        for name, value in headers:
            if name == b"origin":
                _, _, authority = value.partition(b"://")
                match = _HOST.fullmatch(authority)
                allowed = {host.lower()} if self.hosts is None else self.hosts
                if match is None or match[1].decode().strip("[]").lower() not in allowed:
                    raise ApiError("forbidden_origin", "Requests from other web sites are refused.")
            elif name == b"sec-fetch-site" and value not in (b"same-origin", b"none"):
                raise ApiError("forbidden_origin", "Requests from other web sites are refused.")


def _host_of(headers: list[tuple[bytes, bytes]]) -> str:
    values = [value for name, value in headers if name == b"host"]
    match = _HOST.fullmatch(values[0]) if len(values) == 1 else None
    if match is None:
        raise ApiError("malformed", "The Host header must be present once and be a host name.", param="Host")
    return match[1].decode().strip("[]")
