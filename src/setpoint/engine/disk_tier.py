"""A thread between the engine and the files of its KV blocks: reads first, writes when there is nothing to read."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from setpoint.engine.disk_store import DiskStore
from setpoint.engine.host_tier import BlockName, BlockRecord
from setpoint.engine.lower_tiers import Fetched, Wanted

MAX_QUEUED_BYTES = 64 << 20  # of records that wait to be written
READ_AHEAD = 16  # blocks that the kernel is asked for before they are read
PAUSE_S = 30.0  # after a write that failed

log = logging.getLogger("setpoint.kv")


def _nothing() -> None:
    pass


class DiskTier:
    """Implements `lower_tiers.SlowTier` over a DiskStore. A disk that is full or for reading only is one log line, and
    nothing is written for a while.

    `group_bytes` is the size of a block's payload in every KV group.
    """

    def __init__(
        self, files: DiskStore, group_bytes: Sequence[int], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.on_progress: Callable[[], None] = _nothing
        self.files = files
        self._group_bytes = list(group_bytes)
        self._clock = clock
        self._wake = threading.Condition()  # guards everything below
        self._reads: deque[list[Wanted]] = deque()
        self._unwanted: set[BlockName] = set()  # in `_reads`, or in the list being read
        self._writes: deque[BlockRecord] = deque()
        self._writing: dict[BlockName, BlockRecord] = {}  # in `_writes`, or being written
        self._queued_bytes = 0
        self._fetched: list[Fetched] = []
        self._paused_until = 0.0
        self._has_failed = False
        self._closing_at: float | None = None
        self._is_scanned = False
        self._thread = threading.Thread(target=self._run, name="setpoint-kv-disk", daemon=True)
        self._thread.start()

    # --- for the engine's thread ---------------------------------------------------------------------------------

    def __contains__(self, name: object) -> bool:
        return name in self._writing or (self._is_scanned and name in self.files)

    @property
    def takes_more(self) -> bool:
        return self._queued_bytes < MAX_QUEUED_BYTES and self._clock() >= self._paused_until

    def store(self, record: BlockRecord) -> bool:
        with self._wake:
            if not self.takes_more or self._closing_at is not None:
                return False
            self._writes.append(record)
            self._writing[record.name] = record
            self._queued_bytes += record.num_bytes
            self._wake.notify_all()
        return True

    def fetch(self, wanted: Sequence[Wanted]) -> None:
        with self._wake:
            self._reads.append(list(wanted))
            self._unwanted.difference_update(want.name for want in wanted)
            self._wake.notify_all()

    def forget(self, names: Iterable[BlockName]) -> None:
        with self._wake:
            self._unwanted.update(names)

    def take_fetched(self) -> list[Fetched]:
        if not self._fetched:
            return []
        with self._wake:
            fetched, self._fetched = self._fetched, []
        return fetched

    def wait_until_scanned(self, timeout_s: float) -> bool:
        """Until it is known what earlier processes left."""
        with self._wake:
            return self._wake.wait_for(lambda: self._is_scanned, timeout_s)

    def close(self, timeout_s: float) -> None:
        with self._wake:
            if self._closing_at is None:
                self._closing_at = self._clock() + timeout_s
            self._wake.notify_all()
        self._thread.join(timeout_s + 0.5)

    # --- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self.files.scan()
        except Exception as error:
            log.warning("the saved KV blocks cannot be listed: %s", type(error).__name__)
        with self._wake:
            self._is_scanned = True
            self._wake.notify_all()
        while (job := self._next()) is not None:
            if isinstance(job, BlockRecord):
                self._save(job)
            else:
                self._load(job)
        self.files.close()

    def _next(self) -> list[Wanted] | BlockRecord | None:
        """What to do now; None when the thread shall end."""
        with self._wake:
            while True:
                if self._closing_at is not None and (not self._writes or self._clock() >= self._closing_at):
                    return None
                if self._reads:
                    return self._reads.popleft()
                self._unwanted.clear()
                if self._writes:
                    return self._writes.popleft()
                self._wake.wait()

    def _save(self, record: BlockRecord) -> None:
        try:
            if self._clock() >= self._paused_until:
                self.files.save(record)
        except BlockingIOError:  # another process writes, which was told at the start
            self._paused_until = self._clock() + PAUSE_S
        except OSError as error:
            self._pause(error.strerror or type(error).__name__)
        except Exception as error:
            self._pause(type(error).__name__)
        else:
            self._has_failed = False
        with self._wake:
            self._writing.pop(record.name, None)
            self._queued_bytes -= record.num_bytes
            is_idle = not self._writes
        if is_idle:
            self.on_progress()

    def _pause(self, reason: str) -> None:
        if not self._has_failed:
            log.warning("KV blocks cannot be saved to disk: %s; trying again every %.0f s", reason, PAUSE_S)
        self._has_failed = True
        self._paused_until = self._clock() + PAUSE_S

    def _load(self, wanted: list[Wanted]) -> None:
        for want in wanted[:READ_AHEAD]:
            self.files.expect(want.name)
        for index, want in enumerate(wanted):
            for later in wanted[index + READ_AHEAD : index + READ_AHEAD + 1]:
                self.files.expect(later.name)
            if want.name in self._unwanted:
                continue
            began = self._clock()
            payload = self._loaded(want)
            with self._wake:
                self._fetched.append(Fetched(want.name, payload, self._clock() - began))
        for want in reversed(wanted):  # so that the beginning of a prefix is used last, and goes last
            self.files.touch(want.name)
        self.on_progress()

    def _loaded(self, want: Wanted) -> bytes | None:
        queued = self._writing.get(want.name)
        if queued is not None:
            return queued.payload if (queued.parent, queued.tokens) == (want.parent, want.tokens) else None
        try:
            return self.files.load(want.name, want.parent, want.tokens, self._group_bytes[want.name[1]])
        except Exception as error:
            log.warning("a saved KV block cannot be read: %s", type(error).__name__)
            return None
