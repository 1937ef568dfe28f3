"""One process of the load generator: `python -m setpoint.tune.replay.worker`, spoken to by `client.py` in JSON lines.

Reads its job, answers `clock` with its clock, starts at the moment it is told and sends every request when it is due,
whatever became of those before (open loop); within a session a turn also waits for the answer before it and for the
user's pause. Prints progress, and the logs when all is over. Ends early on `stop`, or when its parent is gone.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from functools import lru_cache
from heapq import heappop, heappush
from typing import Any

import orjson

from setpoint.engine.slo import HeldSla
from setpoint.errors import ConfigError
from setpoint.tune.measure import RequestLog, Status
from setpoint.tune.replay.answer import Answer
from setpoint.tune.replay.http import Address, ConnectionLost, Connections
from setpoint.tune.replay.prompts import Prompts, words
from setpoint.tune.replay.run_file import log_document
from setpoint.tune.replay.urgency import become_urgent
from setpoint.workload.trace import TraceRequest

PREPARED_S = 0.02  # a request's body is made so long before it is due
COARSE_S = 0.01  # timers of the event loop count milliseconds: the last part is left to `Alarm`
PROGRESS_S = 0.25


class Alarm:
    """Wakes coroutines within some 0.1 ms, from a thread that sleeps: event loops round to milliseconds."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._heap: list[tuple[float, int, asyncio.Future[None]]] = []
        self._changed = threading.Condition()
        threading.Thread(target=self._run, daemon=True).start()

    async def sleep_until(self, when: float) -> None:
        """By `time.monotonic`; a moment that has passed is now."""
        coarse = when - time.monotonic() - COARSE_S
        if coarse > 0:
            await asyncio.sleep(coarse)
        if when > time.monotonic():
            future = self._loop.create_future()
            with self._changed:
                heappush(self._heap, (when, id(future), future))
                self._changed.notify()
            await future

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._heap:
                    self._changed.wait()
                rest = self._heap[0][0] - time.monotonic()
                if rest > 0:
                    self._changed.wait(rest)
                    continue  # another one may be earlier by now
                _, _, future = heappop(self._heap)
            self._loop.call_soon_threadsafe(_wake, future)


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


Send = Callable[[int, TraceRequest, float], Coroutine[Any, Any, RequestLog]]  # index, request, due since the start


@dataclass
class Progress:
    sent: int = 0
    done: int = 0
    missed: int = 0


class Player:
    """Sends what is due, when it is due. `send` returns the log of one request; times are since the start."""

    def __init__(
        self, requests: Iterable[tuple[int, TraceRequest]], send: Send, sleep_until: Callable[[float], Any]
    ) -> None:
        self.logs: list[RequestLog] = []
        self.progress = Progress()
        self._send = send
        self._sleep_until = sleep_until
        self._is_stopping = False
        self._lines: list[list[tuple[int, TraceRequest]]] = []  # a session, or one request
        sessions: dict[str, list[tuple[int, TraceRequest]]] = {}
        for index, request in requests:
            line = [] if request.session is None else sessions.get(request.session, [])
            if not line:
                self._lines.append(line)
            if request.session is not None:
                sessions[request.session] = line
            line.append((index, request))

    async def run(self) -> None:
        """Until every request has ended. Cancelled: until those under way have been logged."""
        tasks: list[asyncio.Task[None]] = []
        try:
            for line in self._lines:  # in the order of their first arrivals
                await self._sleep_until(line[0][1].arrival_s - PREPARED_S)
                tasks.append(asyncio.ensure_future(self._play(line)))
            if tasks:
                await asyncio.wait(tasks)
            for task in tasks:
                task.result()
        finally:
            self._is_stopping = True
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _play(self, line: list[tuple[int, TraceRequest]]) -> None:
        finished = float("-inf")
        for index, request in line:
            if self._is_stopping:
                return
            due = max(request.arrival_s, finished + (request.think_s or 0.0))
            await self._sleep_until(due - PREPARED_S)
            self.progress.sent += 1
            log = await self._send(index, request, due)
            self.logs.append(log)
            self.progress.done += 1
            self.progress.missed += log.status != "ok"
            finished = due if log.finished_s is None else log.finished_s


class Sender:
    """Makes requests of the target's API and logs of its answers."""

    def __init__(self, job: dict[str, Any], start: float, sleep_until: Callable[[float], Any]) -> None:
        self._job = job
        self._start = start
        self._sleep_until = sleep_until
        self._connections = Connections(Address(**job["address"]), job["headers"])
        pool = words() if job["pool"] is None else job["pool"]
        self._prompts: Prompts[Any] = Prompts(
            pool,
            job["block_size"],
            job["salt"],
            items_per_token=job["items_per_token"],
            first=job["first"],
            overhead_tokens=job["overhead_tokens"],
        )

    def close(self) -> None:
        self._connections.close()

    async def send(self, index: int, request: TraceRequest, due: float) -> RequestLog:
        wire = self._connections.request(*self._body(index, request))
        answer = Answer(self._start)
        sent: list[float] = []
        status: Status
        try:
            connection = await self._connections.take()
            await self._sleep_until(due)
            async with asyncio.timeout(max(0.0, self._start + due + self._job["timeout_s"] - time.monotonic())):
                code = await self._connections.exchange(connection, wire, sent.append, answer.feed)
            status, error = answer.outcome(code, request.output_tokens, self._job["is_forced"])
        except TimeoutError:
            status, error = "timeout", f"no answer in {self._job['timeout_s']:g} s"
        except (ConnectionLost, OSError) as lost:
            status, error = "error", str(lost)[:300] or type(lost).__name__
        except asyncio.CancelledError:
            status, error = "error", "the run was cut short"  # `Player` sends nothing after this
        return RequestLog(
            index=index,
            scheduled_s=due,
            sent_s=sent[-1] - self._start if sent else None,
            status=status,
            deliveries=tuple(answer.deliveries),
            finished_s=time.monotonic() - self._start,
            prompt_tokens=answer.prompt_tokens,
            cached_tokens=answer.cached_tokens,
            output_tokens=answer.output_tokens,
            wanted_tokens=request.output_tokens,
            class_name=request.class_name,
            session=request.session,
            turn=request.turn,
            slo=request.slo,
            error=error,
        )

    def _body(self, index: int, request: TraceRequest) -> tuple[str, bytes]:
        job = self._job
        body = {"model": job["model"], **job["fields"], "max_tokens": request.output_tokens}
        if job["seeds"]:
            body["seed"] = index
        if job["sessions"] and request.session is not None:
            name = f"{job['salt']}/{request.session}".encode()
            body["session_id"] = hashlib.blake2b(name, digest_size=16).hexdigest()
        if job["sessions"] and request.slo is not None and _can_be_held(request.slo):
            body["slo"] = request.slo
        if request.messages is not None:
            return "/v1/chat/completions", orjson.dumps({**body, "messages": list(request.messages)})
        items = self._prompts.items(request, index)
        if job["pool"] is not None:
            return job["path"], orjson.dumps({**body, "prompt": items})
        text = " ".join(items)
        if job["path"].endswith("chat/completions"):
            return job["path"], orjson.dumps({**body, "messages": [{"role": "user", "content": text}]})
        return job["path"], orjson.dumps({**body, "prompt": text})


@lru_cache
def _can_be_held(slo: str) -> bool:
    """Other terms (e2e, means) are judged here, and would be refused there."""
    try:
        HeldSla.parse(slo)
    except ConfigError:
        return False
    return True


async def _replay(job: dict[str, Any], start: float) -> list[RequestLog]:
    alarm = Alarm()

    async def sleep_until(at_s: float) -> None:
        await alarm.sleep_until(start + at_s)

    sender = Sender(job, start, sleep_until)
    requests = [(row[0], _request(row)) for row in job["requests"]]
    player = Player(requests, sender.send, sleep_until)
    playing = asyncio.ensure_future(player.run())
    loop = asyncio.get_running_loop()
    threading.Thread(target=_stop_when_told, args=(loop, playing.cancel), daemon=True).start()
    gc.collect()
    gc.freeze()
    gc.disable()  # a collection is a pause that would be read as the server's
    while not playing.done():
        await asyncio.wait([playing], timeout=PROGRESS_S)
        _print({"progress": [player.progress.sent, player.progress.done, player.progress.missed]})
    gc.enable()
    sender.close()
    if not playing.cancelled():
        playing.result()
    return player.logs


def _stop_when_told(loop: asyncio.AbstractEventLoop, stop: Callable[[], bool]) -> None:
    sys.stdin.buffer.readline()  # `stop`, or the end of a parent that is gone
    loop.call_soon_threadsafe(stop)


def request_row(index: int, request: TraceRequest) -> list[Any]:
    """A request as the job has it."""
    messages = None if request.messages is None else list(request.messages)
    return [
        *(index, request.arrival_s, request.input_tokens, request.output_tokens, list(request.hash_ids), messages),
        *(request.session, request.turn, request.think_s, request.class_name, request.slo),
    ]


def _request(row: list[Any]) -> TraceRequest:
    _, arrival, inputs, outputs, ids, messages, *rest = row
    return TraceRequest(arrival, inputs, outputs, tuple(ids), None if messages is None else tuple(messages), *rest)


def _print(document: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()


def main() -> int:
    job = json.loads(sys.stdin.buffer.readline())
    if job["cpus"]:
        os.sched_setaffinity(0, job["cpus"])
    words()
    _print({"ready": become_urgent()})
    for line in sys.stdin.buffer:
        command = json.loads(line)
        if "start" in command:
            break
        _print({"clock": time.monotonic()})
    else:
        return 1
    began = time.process_time()
    with asyncio.Runner(loop_factory=_loop) as runner:
        logs = runner.run(_replay(job, command["start"]))
    for log in logs:
        _print({"log": log_document(log)})
    _print({"end": len(logs), "cpu_s": time.process_time() - began})
    return 0


def _loop() -> asyncio.AbstractEventLoop:
    if sys.platform == "linux":
        import uvloop

        return uvloop.new_event_loop()
    return asyncio.new_event_loop()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # the parent is gone
        os._exit(1)
