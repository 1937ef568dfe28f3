"""JSON-lines log: one event a line, stable event names, never prompts, outputs or keys."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
import traceback
from typing import Any, Final, TextIO

from setpoint.server.errors import clean

LEVELS: Final = {"debug": 10, "info": 20, "warning": 30, "error": 40}
_PER_SECOND = 200  # lines; what is above is counted and dropped


class EventLog:
    """Writes `{"ts", "level", "event", ...}` lines. JSON escapes control characters, so no value can forge a line."""

    def __init__(self, stream: TextIO | None = None, level: str = "info") -> None:
        self._stream = sys.stderr if stream is None else stream
        self._threshold = LEVELS[level]
        self._lock = threading.Lock()
        self._second = 0
        self._lines = 0

    def write(self, event: str, level: str = "info", **fields: Any) -> None:
        if LEVELS[level] < self._threshold:
            return
        now = time.time()
        with self._lock:
            second = int(now)
            if second != self._second:
                dropped, self._second, self._lines = max(self._lines - _PER_SECOND, 0), second, 0
                if dropped:
                    self._put({"ts": round(now, 3), "level": "warning", "event": "log_dropped", "lines": dropped})
            self._lines += 1
            if self._lines <= _PER_SECOND:
                self._put({"ts": round(now, 3), "level": level, "event": event, **fields})

    def _put(self, line: dict[str, Any]) -> None:
        line = {key: value[:256] if isinstance(value, str) else value for key, value in line.items()}
        try:
            self._stream.write(json.dumps(line) + "\n")
            self._stream.flush()
        except (OSError, ValueError, TypeError):
            return  # a full disk or closed stream must never hurt a request


def where(error: BaseException) -> str:
    """The innermost frame as `module:line`, without the path."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return ""
    last = frames[-1]
    return f"{last.filename.rsplit('/', 1)[-1].removesuffix('.py')}:{last.lineno}"


class _Forward(logging.Handler):
    def __init__(self, log: EventLog, event: str) -> None:
        super().__init__(logging.WARNING)
        self._log = log
        self._event = event

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        detail = {} if error is None else {"error": type(error).__name__, "where": where(error)}
        level = "error" if record.levelno >= logging.ERROR else "warning"
        lines = record.getMessage().strip().splitlines() or [""]
        text = lines[-1] if lines[0].startswith("Traceback") else lines[0]  # some libraries log a traceback as text
        self._log.write(self._event, level, message=clean(text), **detail)


def forward_logging(log: EventLog) -> None:
    """Send the warnings of the engine and of uvicorn to the event log, without tracebacks."""
    for name, event in (("uvicorn", "http_server"), ("setpoint", "engine"), ("asyncio", "event_loop")):
        logger = logging.getLogger(name)
        logger.handlers = [_Forward(log, event)]
        logger.propagate = False
        logger.setLevel(logging.WARNING)
