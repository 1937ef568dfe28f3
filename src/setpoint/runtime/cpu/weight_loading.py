"""Brings a program's weights into memory while other parts start up, and keeps them on disk for the next start."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial

from setpoint import _native
from setpoint.loaders.checkpoint import Checkpoint
from setpoint.runtime.cpu.weight_cache import WeightCache, WeightSource

SAVE_DELAY_S = 2.0  # the first requests come first
MOVE_DELAY_S, MOVE_PAUSE_S = 0.5, 0.01  # 10 ms of work, 10 ms of rest
SAVE_LIMIT_S = 30.0  # how long an end waits for the file


class WeightLoading:
    """Fills `store` in threads of its own, from `sources`: arrays of the checkpoint.

    `finish` is called once the matrices are there, with whether what derives from them came with them, out of the
    cache. It returns the bytes of that.
    """

    def __init__(
        self,
        store: _native.WeightStore,
        sources: list[object],
        checkpoint: Checkpoint,
        cache: WeightCache | None,
        num_threads: int,
        finish: Callable[[bool], int],
    ) -> None:
        self._store, self._sources, self._checkpoint, self._num_threads = store, sources, checkpoint, num_threads
        self._finish = finish
        self._cache = cache if cache is not None and cache.wants(store.image.nbytes) else None
        self._error: Exception | None = None
        self._closing, self._abandon = threading.Event(), threading.Event()
        self._later: threading.Thread | None = None
        self.derived_bytes = 0
        self.seconds = 0.0
        self.cached = False  # the weights came from the cache
        self._loader = threading.Thread(target=self._load, name="setpoint-weights", daemon=True)
        self._loader.start()

    def wait(self) -> None:
        """Until the weights are there. Raises what went wrong."""
        self._loader.join()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End what goes on beside the steps; a file that is to be written is finished, within reason."""
        self._loader.join()
        self._closing.set()
        if self._later is not None:
            self._later.join(SAVE_LIMIT_S)
            self._abandon.set()
            self._later.join()

    def _load(self) -> None:
        began = time.monotonic()
        try:
            source = WeightSource(self._checkpoint.name, self._checkpoint.digest()) if self._cache is not None else None
            if self._cache is not None and source is not None:
                self.cached = self._cache.load(source, self._store, self._num_threads)
            if not self.cached:
                threading.Thread(target=self._checkpoint.read_ahead, name="setpoint-read-ahead", daemon=True).start()
                self._store.pack(self._num_threads)
            self.derived_bytes = self._finish(self.cached)
            if self.cached:
                self._start(self._move)
            elif self._cache is not None and source is not None:
                self._start(partial(self._save, self._cache, source))
        except Exception as error:  # given to whoever waits
            self._error = error
        self._sources.clear()
        self.seconds = time.monotonic() - began

    def _start(self, work: Callable[[], None]) -> None:
        self._later = threading.Thread(target=work, name="setpoint-later", daemon=True)
        self._later.start()

    def _save(self, cache: WeightCache, source: WeightSource) -> None:
        self._closing.wait(SAVE_DELAY_S)
        cache.save(source, self._store, self._abandon)

    def _move(self) -> None:
        """The first token comes from the mapped file, the later ones from huge pages."""
        pause = MOVE_DELAY_S
        for index in range(self._store.num_slices):
            if self._closing.wait(pause):
                return
            try:
                self._store.move_to_huge_pages(index)
            except MemoryError:
                return
            pause = MOVE_PAUSE_S
