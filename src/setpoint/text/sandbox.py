"""Where chat templates render: in processes of their own (`processes.py`), and `template_worker.py` says why."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from setpoint.text.processes import CLOCK_FACTOR, WorkerPool, WorkerProcess

COMPILE_LIMIT_S = 2.0
RENDER_LIMIT_S = 0.5

_WORKER = Path(__file__).with_name("template_worker.py")


class TemplateSandbox:
    """Compiles and renders templates; safe to use from several threads. Raises SandboxStartError, SandboxDiedError."""

    def __init__(self, *, render_limit_s: float = RENDER_LIMIT_S) -> None:
        self._render_limit_s = render_limit_s
        self._pool = WorkerPool(_WORKER)

    def start(self) -> None:
        """Start a process now that the first template will need."""
        self._pool.start()

    def compile(self, source: str) -> dict[str, Any]:
        """{"variables": names it reads, "content": see the worker} or {"error": ..., "message": ...}."""
        with self._pool.process() as process:
            return self._compile(process, source)

    def render(self, source: str, variables: Mapping[str, Any], *, max_chars: int) -> dict[str, Any]:
        """{"text": ...} or {"error": ..., "message": ...}."""
        key = _key(source)
        request = {"render": key, "variables": variables, "max_chars": max_chars, "limit_s": self._render_limit_s}
        with self._pool.process() as process:
            if key not in process.known:
                self._compile(process, source)
            answer = process.ask(request, within_s=self._render_limit_s * CLOCK_FACTOR)
            if answer.get("error") == "unknown":  # compiled long ago, and pushed out by others since
                self._compile(process, source)
                answer = process.ask(request, within_s=self._render_limit_s * CLOCK_FACTOR)
            return answer

    def close(self) -> None:
        self._pool.close()

    def _compile(self, process: WorkerProcess, source: str) -> dict[str, Any]:
        key = _key(source)
        request = {"compile": key, "source": source, "limit_s": COMPILE_LIMIT_S}
        answer = process.ask(request, within_s=COMPILE_LIMIT_S * CLOCK_FACTOR)
        process.known.add(key)
        return answer


def _key(source: str) -> str:
    return sha256(source.encode("utf-8")).hexdigest()
