"""The door for generations: how many at once, and how much slow text work waits for a thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from setpoint.server.context import ServerContext
from setpoint.server.errors import ApiError
from setpoint.server.generation import Generation

T = TypeVar("T")


class Admission:
    """Bounds the requests in the house and runs templates and tokenisers in a few threads, off the event loop."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context
        self._pool = ThreadPoolExecutor(context.settings.num_workers, thread_name_prefix="setpoint-text")
        self._slow_pool = ThreadPoolExecutor(context.settings.num_workers, thread_name_prefix="setpoint-grammar")
        self._num_inside = 0
        self._generations: set[Generation] = set()

    @contextmanager
    def enter(self, *, generates: bool) -> Iterator[None]:
        """Count a request in for the time of its preparation; raises 429 or 503 before any work is done."""
        self._check()
        if generates:
            self._context.engine.check_admission()
        self._num_inside += 1
        try:
            yield
        finally:
            self._num_inside -= 1

    def _check(self) -> None:
        self.check_open()
        if not self._context.started:
            raise ApiError("loading", "The model is still loading.", headers={"Retry-After": "5"})
        if self.num_active >= self._context.settings.max_concurrent_requests:
            raise ApiError("queue_full", "Too many requests are being served; retry later.")

    def check_open(self) -> None:
        if self._context.draining or self._context.engine.is_draining:
            raise draining(self._context)

    async def run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def run_slow(self, work: Callable[[], T]) -> T:
        """For work that may wait for seconds: nobody's text work stands behind it."""
        return await asyncio.get_running_loop().run_in_executor(self._slow_pool, work)

    def add(self, generation: Generation) -> None:
        self._generations.add(generation)

    def remove(self, generation: Generation) -> None:
        self._generations.discard(generation)

    @property
    def num_active(self) -> int:
        return self._num_inside + len(self._generations)

    def fail_all(self, error: ApiError) -> None:
        for generation in self._generations:
            generation.fail(error)

    def close(self) -> None:
        for pool in (self._pool, self._slow_pool):
            pool.shutdown(wait=False, cancel_futures=True)


def draining(context: ServerContext) -> ApiError:
    wait = max(1, round(context.settings.shutdown_timeout_s))
    return ApiError("draining", "The server is shutting down.", headers={"Retry-After": str(wait)})
