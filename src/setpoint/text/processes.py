"""Processes that do for us what could take too long, or too much memory; killed when it does.

What they run is untrusted input to a program of ours (`worker.py` says how the two talk). Each costs about 20 MB and
0.1 s to start; the first starts with the first question, another when two questions come at once.
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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Processor time is what a question may use; the clock only matters where the machine starves the process.
CLOCK_FACTOR = 10.0
START_S = 30.0
MAX_ANSWER_BYTES = 256 << 20


class SandboxDiedError(Exception):
    """The process ended, or was ended, before it answered: in practice a limit was reached."""


class SandboxStartError(Exception):
    """A process could not be started."""


class WorkerProcess:
    """One running worker; it takes a moment to be ready, which the first request waits for. Not for two threads."""

    def __init__(self, script: Path, greeting: bytes = b"") -> None:
        # Its only variable says where the packages are; an environment of ours could hold keys. -P: not among our
        # modules.
        try:
            self._popen = subprocess.Popen(  # noqa: S603 (our own script, no input in the command)
                [sys.executable, "-P", "-s", "-X", "utf8", str(script)],
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
        self.known: set[str] = set()  # what it was told and keeps
        self.end = weakref.finalize(self, _end, self._popen)
        self._is_ready = False
        self._greeting = greeting
        self._start_deadline = time.monotonic() + START_S

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def is_running(self) -> bool:
        return self._popen.poll() is None

    def _wait_until_ready(self) -> None:
        try:
            self._write(self._greeting, self._start_deadline)
            self._answer(self._start_deadline)
        except (OSError, SandboxDiedError):
            raise SandboxStartError("it ends at once") from None
        self._is_ready, self._greeting = True, b""

    def ask(self, request: Mapping[str, Any], *, within_s: float) -> dict[str, Any]:
        """Raises SandboxStartError, SandboxDiedError."""
        if not self._is_ready:
            self._wait_until_ready()
        content = frame(request)
        deadline = time.monotonic() + within_s
        try:
            self._write(content, deadline)
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


def frame(message: Mapping[str, Any]) -> bytes:
    content = json.dumps(message, ensure_ascii=False).encode("utf-8")
    return len(content).to_bytes(4, "big") + content


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


class WorkerPool:
    """At most `max_processes` of one program; safe to use from several threads.

    `greeting` makes what a program wants to be told first, before it says that it is ready.
    """

    def __init__(self, script: Path, max_processes: int = 2, greeting: Callable[[], bytes] = bytes) -> None:
        self._script = script
        self._greeting = greeting
        self._free = threading.BoundedSemaphore(max_processes)
        self.idle: list[WorkerProcess] = []

    def start(self) -> None:
        """Start a process now that the first question will need. Raises SandboxStartError."""
        self.idle.append(WorkerProcess(self._script, self._greeting()))

    @contextmanager
    def process(self) -> Iterator[WorkerProcess]:
        """A process to use alone; one that fails is ended, and the next call starts a new one."""
        with self._free:
            process = self.idle.pop() if self.idle else WorkerProcess(self._script, self._greeting())
            if not process.is_running:  # ended from outside while idle
                process.end()
                process = WorkerProcess(self._script, self._greeting())
            try:
                yield process
            except BaseException:
                process.end()
                raise
            self.idle.append(process)

    def close(self) -> None:
        while self.idle:
            self.idle.pop().end()
