"""Processes that render chat templates, killed when one takes too long.

`template_worker.py` says why rendering has a process of its own. One costs about 20 MB and 0.1 s to start; the first
starts with the first template, another when two requests render at once.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

COMPILE_LIMIT_S = 2.0
RENDER_LIMIT_S = 0.5
# Processor time is what a template may use; the clock only matters where the machine starves the process.
CLOCK_FACTOR = 10.0
START_S = 30.0
MAX_ANSWER_BYTES = 256 << 20

_WORKER = Path(__file__).with_name("template_worker.py")


class SandboxDiedError(Exception):
    """The process ended, or was ended, before it answered: in practice a limit was reached."""


class SandboxStartError(Exception):
    """A process could not be started."""


class _Process:
    """One running worker; it takes a moment to be ready, which the first request waits for. Not for two threads."""

    def __init__(self) -> None:
        # Its only variable says where jinja2 is; an environment of ours could hold keys. -P: not among our modules.
        try:
            self._popen = subprocess.Popen(  # noqa: S603 (our own script, no input in the command)
                [sys.executable, "-P", "-s", "-X", "utf8", str(_WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                start_new_session=True,
            )
        except OSError as error:
            raise SandboxStartError(error.strerror) from error
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self._to, self._from = self._popen.stdin.fileno(), self._popen.stdout.fileno()
        os.set_blocking(self._to, False)
        os.set_blocking(self._from, False)
        self.templates: set[str] = set()  # keys of what it has compiled
        self.end = weakref.finalize(self, _end, self._popen)
        self._is_ready = False
        self._start_deadline = time.monotonic() + START_S

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def is_running(self) -> bool:
        return self._popen.poll() is None

    def _wait_until_ready(self) -> None:
        try:
            self._answer(self._start_deadline)
        except (OSError, SandboxDiedError):
            raise SandboxStartError("it ends at once") from None
        self._is_ready = True

    def ask(self, request: Mapping[str, Any], *, within_s: float) -> dict[str, Any]:
        if not self._is_ready:
            self._wait_until_ready()
        content = json.dumps(request, ensure_ascii=False).encode("utf-8")
        deadline = time.monotonic() + within_s
        try:
            self._write(len(content).to_bytes(4, "big") + content, deadline)
            return self._answer(deadline)
        except OSError as error:
            raise SandboxDiedError from error

    def _answer(self, deadline: float) -> dict[str, Any]:
        size = int.from_bytes(self._read(4, deadline), "big")
        if size > MAX_ANSWER_BYTES:
            raise SandboxDiedError
        answer: dict[str, Any] = json.loads(self._read(size, deadline))
        return answer

    def _write(self, content: bytes, deadline: float) -> None:
        left = memoryview(content)
        while left:
            _wait(self._to, select.POLLOUT, deadline)
            left = left[os.write(self._to, left) :]

    def _read(self, size: int, deadline: float) -> bytes:
        chunks = []
        while size:
            _wait(self._from, select.POLLIN, deadline)
            chunk = os.read(self._from, min(size, 1 << 20))
            if not chunk:
                raise SandboxDiedError
            chunks.append(chunk)
            size -= len(chunk)
        return b"".join(chunks)


def _wait(descriptor: int, event: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(descriptor, event)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise SandboxDiedError


def _end(popen: subprocess.Popen[bytes]) -> None:
    popen.kill()
    for pipe in (popen.stdin, popen.stdout):
        if pipe is not None:
            pipe.close()
    popen.wait()


class TemplateSandbox:
    """Compiles and renders templates in at most `max_processes` processes; safe to use from several threads."""

    def __init__(self, *, render_limit_s: float = RENDER_LIMIT_S, max_processes: int = 2) -> None:
        self._render_limit_s = render_limit_s
        self._free = threading.BoundedSemaphore(max_processes)
        self._idle: list[_Process] = []

    def start(self) -> None:
        """Start a process now that the first template will need. Raises SandboxStartError."""
        self._idle.append(_Process())

    def compile(self, source: str) -> dict[str, Any]:
        """{"variables": names it reads, "content": see the worker} or {"error": ..., "message": ...}."""
        with self._process() as process:
            return self._compile(process, source)

    def render(self, source: str, variables: Mapping[str, Any], *, max_chars: int) -> dict[str, Any]:
        """{"text": ...} or {"error": ..., "message": ...}."""
        key = _key(source)
        request = {"render": key, "variables": variables, "max_chars": max_chars, "limit_s": self._render_limit_s}
        with self._process() as process:
            if key not in process.templates:
                self._compile(process, source)
            answer = process.ask(request, within_s=self._render_limit_s * CLOCK_FACTOR)
            if answer.get("error") == "unknown":  # compiled long ago, and pushed out by others since
                self._compile(process, source)
                answer = process.ask(request, within_s=self._render_limit_s * CLOCK_FACTOR)
            return answer

    def close(self) -> None:
        while self._idle:
            self._idle.pop().end()

    def _compile(self, process: _Process, source: str) -> dict[str, Any]:
        key = _key(source)
        request = {"compile": key, "source": source, "limit_s": COMPILE_LIMIT_S}
        answer = process.ask(request, within_s=COMPILE_LIMIT_S * CLOCK_FACTOR)
        process.templates.add(key)
        return answer

    @contextmanager
    def _process(self) -> Iterator[_Process]:
        """A process to use alone; one that fails is ended, and the next call starts a new one."""
        with self._free:
            process = self._idle.pop() if self._idle else _Process()
            if not process.is_running:  # ended from outside while idle
                process.end()
                process = _Process()
            try:
                yield process
            except BaseException:
                process.end()
                raise
            self._idle.append(process)


def _key(source: str) -> str:
    return sha256(source.encode("utf-8")).hexdigest()
