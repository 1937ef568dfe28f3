"""What the server is built over, and its limits.

`create_app(ServerContext)` needs nothing else: tests build a context over a fake runner, `setpoint serve` over a real
one. Limits are server settings: an operator may change one, a client may not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from setpoint.engine.engine import Engine
from setpoint.grammar.compiler import GrammarCompiler
from setpoint.server.auth import KeyRing
from setpoint.server.events import EventRouter
from setpoint.server.logs import EventLog
from setpoint.text.chat_template import ChatTemplate
from setpoint.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from setpoint.server.generation import Generation

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Limits and timeouts. Sizes in bytes, times in seconds."""

    host: str = "127.0.0.1"
    max_body_bytes: int = 16 * MIB
    max_body_chunks: int = 65_536
    max_buffered_bytes: int = 512 * MIB  # of all bodies under way together
    max_header_bytes: int = 64 << 10
    max_header_fields: int = 100
    max_connections: int = 4096
    max_concurrent_requests: int = 2048
    header_timeout_s: float = 10.0
    body_timeout_s: float = 60.0
    write_timeout_s: float = 30.0
    keep_alive_s: float = 75.0
    ping_interval_s: float = 15.0
    shutdown_timeout_s: float = 30.0
    max_heartbeat_age_s: float = 10.0
    num_workers: int = 2  # threads that render templates and tokenise
    open_metrics: bool = False
    response_metrics: bool = False  # add "metrics" to every answer
    keeps_messages: bool = False  # of a chat, for whoever is told of its end


@dataclass(slots=True)
class ServerContext:
    """An engine with its text side. `router.deliver` must be the engine's `deliver`."""

    engine: Engine
    router: EventRouter
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    model_names: tuple[str, ...]  # the first is the name in answers, all are accepted
    max_model_len: int
    settings: ServerSettings = field(default_factory=ServerSettings)
    keys: KeyRing = field(default_factory=KeyRing)
    log: EventLog = field(default_factory=EventLog)
    clock: Callable[[], float] = time.monotonic
    version: str = "0.1.0"
    created: int = field(default_factory=lambda: int(time.time()))
    grammars: GrammarCompiler | None = None  # None: no structured output
    cache_info: Mapping[str, str] = field(default_factory=dict)  # labels of vllm:cache_config_info
    server_info: Mapping[str, object] = field(default_factory=dict)  # more fields for /server_info
    on_end: Callable[[Generation, float], None] | None = None  # told of every generation, with its arrival by `clock`
    started: bool = False  # set when the app has started up
    draining: bool = False  # set by the first signal; new work gets 503

    @property
    def model_name(self) -> str:
        return self.model_names[0]
