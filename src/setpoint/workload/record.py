"""A recording of live traffic: lengths, times, and prompts as salted hashes; text only where it was asked for.

The salt is random, kept in memory and never written, so the hashes of a recording say which prompts share a beginning
and nothing else. Everything that takes time is done in a thread of its own: hashing, sorting, writing. A full disk, or
more requests at once than it can follow, costs lines of the recording and never a request; a warning says so once.
"""

from __future__ import annotations

import hmac
import os
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from queue import Full, Queue
from typing import Any, Final

from setpoint.workload.record_file import Parts
from setpoint.workload.trace import MAX_LINE_BYTES, MAX_TOKENS, TraceRequest, request_line

BLOCK_TOKENS: Final = 16
BLOCK_BYTES: Final = 64  # of text, where there is no tokenizer: 16 tokens of 4 bytes
MAX_PENDING: Final = 4096
MAX_PENDING_BYTES: Final = 256 << 20
MAX_SESSIONS: Final = 1 << 16
_ID_BITS: Final = 53  # exact in every reader of JSON


@dataclass(frozen=True, slots=True)
class Seen:
    """One request that has ended. Times in seconds of one clock.

    `prompt` is cut into blocks: of token ids, or of the bytes of its text. `session` is the client's own name for it.
    Where there is none, a request whose `turns` begin with all turns of an earlier one goes on with its session.
    """

    arrival_s: float
    end_s: float
    prompt: Sequence[int] | bytes
    input_tokens: int
    output_tokens: int
    class_name: str = ""
    session: str | None = None
    turns: tuple[bytes, ...] = ()
    messages: tuple[dict[str, Any], ...] | None = None
    slo: str | None = None  # that the request brought


@dataclass(slots=True)
class _Session:
    name: str
    turn: int
    end_s: float


class _Sessions:
    """Which requests belong together, and how long each thought since the answer before; the newest are remembered."""

    def __init__(self, salt: bytes, capacity: int) -> None:
        self._salt = salt
        self._capacity = capacity
        self._known: OrderedDict[bytes, _Session] = OrderedDict()

    def place(self, seen: Seen) -> tuple[str | None, int, float | None]:
        """Name, turn and thinking time of a request."""
        if seen.session is not None:
            key = self._key(seen.session.encode())
            return self._continue(key, key, seen)
        if not seen.turns:
            return None, 0, None
        prefixes = list(self._prefixes(seen.turns))
        before = next((key for key in reversed(prefixes[:-1]) if key in self._known), None)
        return self._continue(before, prefixes[-1], seen)

    def _continue(self, before: bytes | None, key: bytes, seen: Seen) -> tuple[str, int, float | None]:
        session = self._known.pop(before, None) if before is not None else None
        think_s = None
        if session is None:
            session = _Session(self._key(os.urandom(16)).hex() if before is None else key.hex(), 0, seen.end_s)
        else:
            session.turn += 1
            think_s = max(0.0, seen.arrival_s - session.end_s)
            session.end_s = max(session.end_s, seen.end_s)
        self._known[key] = session
        while len(self._known) > self._capacity:
            self._known.popitem(last=False)
        return session.name, session.turn, think_s

    def _key(self, text: bytes) -> bytes:
        return hmac.digest(self._salt, b"session" + text, "sha256")[:8]

    def _prefixes(self, turns: tuple[bytes, ...]) -> Iterable[bytes]:
        key = b"turns"
        for turn in turns:
            key = self._key(key + turn)
            yield key


def block_ids(prompt: Sequence[int] | bytes, salt: bytes) -> list[int]:
    """One number for each full block, which depends on all blocks before it."""
    if isinstance(prompt, bytes):
        data, size = prompt, BLOCK_BYTES
    else:
        data, size = array("I", prompt).tobytes(), BLOCK_TOKENS * array("I").itemsize
    found: list[int] = []
    before = b""
    for begin in range(0, len(data) - size + 1, size):
        before = blake2b(before + data[begin : begin + size], key=salt, digest_size=8).digest()
        found.append(int.from_bytes(before, "little") >> (64 - _ID_BITS))
    return found


class Recording:
    """`add` from any thread, never waiting; `close` writes what is left. `warn` is called once, when lines are lost."""

    def __init__(
        self, parts: Parts, clock: Callable[[], float], warn: Callable[[str], None], *, max_sessions: int = MAX_SESSIONS
    ) -> None:
        self._parts = parts
        self._began = clock()
        self._warn = warn
        self._salt = os.urandom(32)
        self._sessions = _Sessions(self._salt, max_sessions)
        self._work: Queue[tuple[Callable[[], Iterable[Seen]], int] | None] = Queue(MAX_PENDING)
        self._is_over = False  # no more is taken
        self._has_dropped = False
        self._lock = threading.Lock()
        self._pending_bytes = 0  # that waiting requests hold on to
        self.num_written = 0
        self.num_left_out = 0  # without a prompt or an answer, or too many at once
        self._thread = threading.Thread(target=self._run, name="setpoint-record", daemon=True)
        self._thread.start()

    def add(self, describe: Callable[[], Iterable[Seen]], num_bytes: int = 0) -> None:
        """`describe` is called in the recording's thread; until then it holds `num_bytes`."""
        if self._is_over:
            return
        with self._lock:
            has_room = self._pending_bytes + num_bytes <= MAX_PENDING_BYTES
            if has_room:
                try:
                    self._work.put_nowait((describe, num_bytes))
                    self._pending_bytes += num_bytes
                    return
                except Full:
                    pass
            self.num_left_out += 1
            is_first, self._has_dropped = not self._has_dropped, True
        if is_first:
            self._warn("requests end faster than they can be recorded; some are left out")

    def close(self) -> None:
        """Write what has ended, and put the file in the order of arrival."""
        if self._thread.is_alive():
            self._work.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            describe, num_bytes = work
            if not self._is_over:
                self._write(describe)
            with self._lock:
                self._pending_bytes -= num_bytes
        self._is_over = True
        try:
            self._parts.close()
        except OSError as error:
            self._stop(f"the recording could not be put in order ({error.strerror}); it can be read as it is")

    def _write(self, describe: Callable[[], Iterable[Seen]]) -> None:
        try:
            for seen in describe():
                line = self._line(seen)
                if line is None:
                    with self._lock:
                        self.num_left_out += 1
                elif not self._parts.add(line):
                    self._stop("the recording has reached its limit; it stops here")
                    return
                else:
                    self.num_written += 1
        except OSError as error:
            self._stop(f"the recording cannot be written ({error.strerror}); it stops here")
        except Exception:  # whatever a body of somebody's own making provokes
            with self._lock:
                self.num_left_out += 1

    def _stop(self, message: str) -> None:
        self._is_over = True
        self._warn(message)

    def _line(self, seen: Seen) -> bytes | None:
        """None for a request without prompt or answer."""
        if not 1 <= seen.input_tokens <= MAX_TOKENS or not 1 <= seen.output_tokens <= MAX_TOKENS:
            return None
        session, turn, think_s = self._sessions.place(seen)
        request = TraceRequest(
            arrival_s=max(0.0, seen.arrival_s - self._began),
            input_tokens=seen.input_tokens,
            output_tokens=seen.output_tokens,
            hash_ids=tuple(block_ids(seen.prompt, self._salt)[: seen.input_tokens // BLOCK_TOKENS]),
            messages=seen.messages,
            session=session,
            turn=turn,
            think_s=think_s,
            class_name=seen.class_name,
            slo=seen.slo,
        )
        line = request_line(request).encode() + b"\n"
        if len(line) > MAX_LINE_BYTES and request.messages is not None:
            line = request_line(replace(request, messages=None)).encode() + b"\n"
        return line if len(line) <= MAX_LINE_BYTES else None
