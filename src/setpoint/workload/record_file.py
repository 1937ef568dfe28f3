"""The files of a recording: lines appended one by one, whole or not at all; put in the order of arrival when closed.

A file that is written to says `"order": "end"` in its header, since a request is known when it ends. Closing sorts it
by arrival and replaces it in one step; a program that is killed leaves the other order, which `read_trace` takes too.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Final

from setpoint.workload.trace import TraceHeader, header_line

PART_BYTES: Final = 64 << 20
_write, _sync = os.write, os.fsync  # where tests put a full disk


class PartFile:
    """One file, made anew, readable by its owner only. OSError when it cannot be written; what is in it stays whole."""

    def __init__(self, path: Path, header: TraceHeader) -> None:
        self.path = path
        self._header = header
        self.num_bytes = 0
        self.num_lines = 0
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        self._file = os.open(path, flags, 0o600)
        try:
            self._append(header_line(header, is_open=True).encode() + b"\n")
        except OSError:
            os.close(self._file)
            path.unlink(missing_ok=True)
            raise

    def add(self, line: bytes) -> None:
        self._append(line)
        self.num_lines += 1

    def _append(self, line: bytes) -> None:
        left = memoryview(line)
        try:
            while left:
                left = left[_write(self._file, left) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self.num_bytes)  # half a line is none
            raise
        self.num_bytes += len(line)

    def close(self) -> None:
        """Sort it. OSError when there is no room for that: it stays as it is, and readable. Without lines it goes."""
        os.close(self._file)
        if self.num_lines == 0:
            self.path.unlink(missing_ok=True)
            return
        with self.path.open("rb") as file:
            next(file)
            lines = sorted(file, key=_arrival)
        temporary = self.path.with_name(self.path.name + ".part")
        try:
            with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as sorted_file:
                sorted_file.write(header_line(self._header).encode() + b"\n")
                sorted_file.writelines(lines)
                sorted_file.flush()
                _sync(sorted_file.fileno())
            temporary.replace(self.path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def _arrival(line: bytes) -> float:
    """Of a line of `request_line`, which begins with it."""
    return float(line[len(b'{"t": ') : line.index(b",")])


class Parts:
    """A recording as a row of files of about `part_bytes`; when they have more than `max_bytes`, the oldest goes.

    `name` gives the path of part 1, 2, ...; where it gives None there is no next one, and `add` returns False.
    """

    def __init__(
        self, name: Callable[[int], Path | None], header: TraceHeader, *, max_bytes: int, part_bytes: int = PART_BYTES
    ) -> None:
        self._name = name
        self._header = header
        self._max_bytes = max_bytes
        self._part_bytes = part_bytes
        self._closed: deque[tuple[Path, int]] = deque()
        self._num_parts = 0
        self._part: PartFile | None = None
        self._open_next()

    def add(self, line: bytes) -> bool:
        """Raises OSError. False when no more is taken."""
        part = self._part
        if part is not None and part.num_lines and part.num_bytes + len(line) > self._part_bytes:
            self._close_part()
            part = None
        if part is None and not self._open_next():
            return False
        assert self._part is not None
        self._part.add(line)
        return True

    def close(self) -> None:
        """Raises OSError when the last part could not be sorted."""
        self._close_part()

    def _open_next(self) -> bool:
        path = self._name(self._num_parts + 1)
        if path is None:
            return False
        while self._closed and sum(size for _, size in self._closed) + self._part_bytes > self._max_bytes:
            oldest, _ = self._closed.popleft()
            oldest.unlink(missing_ok=True)
        self._part = PartFile(path, self._header)
        self._num_parts += 1
        return True

    def _close_part(self) -> None:
        part, self._part = self._part, None
        if part is not None:
            try:
                part.close()
            finally:
                self._closed.append((part.path, part.num_bytes))
