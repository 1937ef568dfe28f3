"""A thread that computes the late masks of a step while the step runs, and opens a gate when they are written."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from setpoint import _native
from setpoint.engine.late_masks import LateMasks
from setpoint.engine.plan import RowSampling
from setpoint.errors import EngineError

PATIENCE_S: Final = 10.0  # limits of a grammar end after a tenth of a second at most


@dataclass(slots=True)
class MaskJob:
    """`buffer[begin : begin + len(mask)]` receives the mask of each row; until then it allows everything."""

    masks: Sequence[LateMasks]
    places: Sequence[tuple[int, RowSampling]]  # byte in the buffer
    buffer: memoryview
    size: int  # of a mask, in bytes
    gate: _native.Gate
    is_cancelled: bool = False

    def run(self) -> None:
        """Raises nothing: what goes wrong is kept in `masks`."""
        try:
            places = {id(row): begin for begin, row in self.places}
            for masks in self.masks:
                if self.is_cancelled:
                    return
                masks.compute()
                for row in masks.rows:
                    if row.mask is not None and len(row.mask) != self.size:
                        row.mask = None
                        masks.give_up(EngineError("a mask of another vocabulary"))
                    elif row.mask is not None:
                        begin = places[id(row)]
                        self.buffer[begin : begin + self.size] = row.mask
        finally:
            self.gate.open()


class MaskThread:
    """Starts with its first job; one job at a time."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[MaskJob, threading.Event] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._job: MaskJob | None = None
        self._done = threading.Event()

    def begin(self, job: MaskJob) -> None:
        if self._thread is None:
            self._jobs = queue.SimpleQueue()
            self._thread = threading.Thread(target=_work, args=(self._jobs,), name="setpoint-masks", daemon=True)
            self._thread.start()
        self._job, self._done = job, threading.Event()
        self._jobs.put((job, self._done))

    def end(self) -> None:
        """Wait until nobody touches a constraint any more. Raises EngineError when that takes too long."""
        assert self._job is not None
        if self._done.wait(PATIENCE_S):
            return
        self._job.is_cancelled = True
        self.close()  # whenever it comes back, nobody listens: the next job gets a thread of its own
        error = EngineError("the mask of a structured output takes too long")
        for masks in self._job.masks:
            if not masks.is_done:  # the first of them is the one that hangs; the others may be asked for again
                masks.give_up(error)
                break
        raise error

    def close(self) -> None:
        self._jobs.put(None)
        self._thread = None


def _work(jobs: queue.SimpleQueue[tuple[MaskJob, threading.Event] | None]) -> None:
    while (item := jobs.get()) is not None:
        job, done = item
        try:
            job.run()
        finally:
            done.set()
