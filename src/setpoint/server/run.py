"""`serve(context)`: bind, run uvicorn, drain on the first signal, leave fast on the second."""

from __future__ import annotations

import asyncio
import errno
import shlex
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Final

import orjson
import uvicorn

from setpoint.errors import ConfigError
from setpoint.server.admission import Admission, draining
from setpoint.server.app import create_app
from setpoint.server.auth import check_bind
from setpoint.server.context import ServerContext
from setpoint.server.errors import PortError
from setpoint.server.logs import forward_logging
from setpoint.server.protocol import limited_protocol

Ready = Callable[[str, str], None]  # (base URL, a curl command to paste)
DRAINED: Final = 0
FORCED: Final = 1
_GRACE_S: Final = 1.0  # for error events to be written after the drain's deadline
_ENGINE_STOP_S: Final = 2.0


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet: a taken port is known before the model is loaded. Raises PortError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise ConfigError(f"--host {host!r} is not an address of this machine") from None
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise _port_in_use(port) from None
        raise PortError(f"cannot listen on {host} port {port}: {error.strerror}") from None
    return sock


def _port_in_use(port: int) -> PortError:
    return PortError(f"port {port} is in use; stop the other server or choose another --port")


def serve(
    context: ServerContext,
    *,
    sock: socket.socket | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    on_ready: Ready = lambda url, command: None,
) -> int:
    """Serve until a signal; returns the exit code: 0 when drained, 1 when a second signal cut it short.

    The engine must have been started; it is shut down on the way out. `sock` comes from `bind`. Raises ConfigError
    for a public address without a key, PortError (exit code 4) for a taken port.
    """
    check_bind(host, context.keys)
    server = DrainingServer(context, on_ready)
    forward_logging(context.log)
    listener = bind(host, port) if sock is None else sock
    try:
        server.run(sockets=[listener])
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise _port_in_use(listener.getsockname()[1]) from None
    finally:
        listener.close()
        stop = threading.Thread(target=context.engine.shutdown, name="setpoint-stop", daemon=True)
        stop.start()
        stop.join(0 if server.force_exit else _ENGINE_STOP_S)
    context.log.write("stopped", forced=server.force_exit)
    return FORCED if server.force_exit else DRAINED


class DrainingServer(uvicorn.Server):
    """uvicorn that keeps its listeners open while it drains, so that probes and late clients hear the truth."""

    def __init__(self, context: ServerContext, on_ready: Ready = lambda url, command: None) -> None:
        app = create_app(context)
        super().__init__(
            uvicorn.Config(
                app,
                http=limited_protocol(context.settings),
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=int(context.settings.keep_alive_s),
                timeout_graceful_shutdown=int(_GRACE_S),
                backlog=2048,
            )
        )
        self.context = context
        self.admission: Admission = app.state.admission
        self._on_ready = on_ready
        self._deadline: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and sockets:
            url, command = paste_command(self.context, sockets[0])
            self.context.log.write("ready", url=url, model=self.context.model_name)
            self._on_ready(url, command)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.context.draining:
            self.force_exit = self.should_exit = True
        else:
            self.drain()

    def drain(self) -> None:
        """Take no new work from now on; leave when what is under way has ended or the timeout is over."""
        self.context.draining = True
        self._deadline = time.monotonic() + self.context.settings.shutdown_timeout_s

    async def on_tick(self, counter: int) -> bool:
        if self._deadline is not None and not self.should_exit:
            if self.admission.num_active == 0:
                self.should_exit = True
            elif time.monotonic() >= self._deadline:
                await self._cut()
        elif self.force_exit:
            await self._cut()
        return await super().on_tick(counter)

    async def _cut(self) -> None:
        """End every generation with an error event, and give the events a moment to be written."""
        self.admission.fail_all(draining(self.context))
        end = time.monotonic() + _GRACE_S
        while self.admission.num_active and time.monotonic() < end:
            await asyncio.sleep(0.02)
        self.should_exit = True


def paste_command(context: ServerContext, sock: socket.socket) -> tuple[str, str]:
    """The base URL and a curl command that works as pasted."""
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    body: dict[str, object] = {"model": context.model_name}
    path = "/v1/completions"
    if context.chat_template is None:
        body |= {"prompt": "Once upon a time", "max_tokens": 32}
    else:
        path = "/v1/chat/completions"
        body["messages"] = [{"role": "user", "content": "Say hello in one sentence."}]
    command = ["curl", url + path, "-H", "Content-Type: application/json"]
    quoted = " ".join(map(shlex.quote, [*command, "-d", orjson.dumps(body).decode()]))
    if context.keys.required:
        quoted += ' -H "Authorization: Bearer $SETPOINT_API_KEY"'
    return url, quoted
