"""The open-loop client: replays a trace against a server and gives a `Run`.

Requests leave when the trace says, whatever became of those before; latencies count from that moment, so a client or a
server that falls behind cannot hide it (coordinated omission). The work is done by processes of its own
(`worker.py`), beside the engine's CPUs where there are any; this module starts them, listens, and puts together.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from setpoint.errors import SetpointError
from setpoint.tune.measure import RequestLog, Run, Window
from setpoint.tune.replay.host import cpu_times, cpus_beside, listener, machine_use
from setpoint.tune.replay.run_file import log_from
from setpoint.tune.replay.server import Surveyor, Target
from setpoint.tune.replay.tripwires import judged
from setpoint.tune.replay.worker import request_row
from setpoint.tune.sla import Sla
from setpoint.workload.trace import Trace

START_S = 30.0  # for a process to come up
LEAD_S = 0.3  # from the last preparation to the first moment of the run
CLOCK_TRIES = 5
SETTLE_S = 2.0  # for the server's counters to be complete
STREAMS_PER_PROCESS = 500

OnProgress = Callable[[int, int, int], None]  # sent, done, missed


class ClientError(SetpointError):
    """The load generator itself failed."""


@dataclass(frozen=True, slots=True)
class ReplayOptions:
    """`salt` keeps the prompts of this run from being found in the cache of another."""

    salt: str
    processes: int = 1
    timeout_s: float = 300.0  # from the scheduled arrival
    cpus: tuple[int, ...] = ()  # for the client; none given: those that the engine leaves free
    warm_up: bool = True


class Worker:
    """One process and what it says."""

    def __init__(self, job: dict[str, Any]) -> None:
        command = [sys.executable, "-m", "setpoint.tune.replay.worker"]
        self._process = subprocess.Popen(  # noqa: S603  # a session of its own: Ctrl-C is for the parent
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        self._lines: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()
        self.sent = self.done = self.missed = 0
        self.logs: list[RequestLog] = []
        self.tell(job)

    @property
    def pid(self) -> int:
        return self._process.pid

    def tell(self, document: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(document).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise ClientError("a process of the load generator ended before its time") from None

    def hear(self, timeout_s: float) -> dict[str, Any] | None:
        """The next line; None when there was none in time."""
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if line is None:
            raise ClientError("a process of the load generator ended before its time")
        return line

    def clock_skew(self) -> float:
        """Its clock against ours, by the quickest of a few exchanges."""
        best = (float("inf"), 0.0)
        for _ in range(CLOCK_TRIES):
            began = time.monotonic()
            self.tell({"clock": True})
            answer = self.hear(START_S)
            ended = time.monotonic()
            if answer is None:
                raise ClientError("a process of the load generator does not answer")
            best = min(best, (ended - began, answer["clock"] - (began + ended) / 2))
        return best[1]

    def collect(self) -> bool:
        """Take in what has come; whether it is all."""
        while (line := self.hear(0.0)) is not None:
            if "progress" in line:
                self.sent, self.done, self.missed = line["progress"]
            elif "log" in line:
                self.logs.append(log_from(line["log"], "a log of the load generator"))
            elif "end" in line:
                return True
        return False

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        try:
            for line in self._process.stdout:
                self._lines.put(json.loads(line))
        except ValueError:  # closed under our eyes
            pass
        self._lines.put(None)


def replay(
    surveyor: Surveyor,
    target: Target,
    trace: Trace,
    options: ReplayOptions,
    *,
    slas: Sequence[Sla] = (),
    provenance: dict[str, Any] | None = None,
    on_progress: OnProgress = lambda sent, done, missed: None,
) -> Run:
    """Raises ServerError when the trace does not fit the server, ClientError when a process of ours fails.

    A KeyboardInterrupt ends the run: what there is comes back, marked as cut short.
    """
    target.check(trace)
    warmed = surveyor.warm_up(target, options.salt) if options.warm_up else 0
    engine = listener(target.address.port) if target.address.host in ("127.0.0.1", "::1", "localhost") else None
    cpus = list(options.cpus) or cpus_beside(engine)
    job = target.job(trace, options.salt) | {"timeout_s": options.timeout_s, "cpus": cpus}
    workers = [Worker(job | {"requests": share}) for share in _shares(trace, options.processes)]
    try:
        urgency = sorted({_ready(worker) for worker in workers})
        skew = max((worker.clock_skew() for worker in workers), key=abs)
        pids = [worker.pid for worker in workers]
        before, times_before = surveyor.counters(), cpu_times(pids, engine)
        start = time.monotonic() + LEAD_S
        began_unix = time.time() + LEAD_S
        for worker in workers:
            worker.tell({"start": start})
        is_cut_short, seconds = _listen(workers, start, on_progress)
        times_after = cpu_times(pids, engine)
    finally:
        for worker in workers:
            worker.close()
    logs = sorted((log for worker in workers for log in worker.logs), key=lambda log: log.index)
    after = surveyor.counters()
    finished = sum(log.status in ("ok", "short") for log in logs)
    deadline = time.monotonic() + SETTLE_S
    while (
        after.finished is not None
        and after.finished - (before.finished or 0) < finished
        and time.monotonic() < deadline
    ):
        time.sleep(0.05)  # the answer is here before the server has written it down
        after = surveyor.counters()
    known = before.preemptions is not None and after.preemptions is not None
    run = Run(
        logs=tuple(logs),
        window=_window(trace, logs, seconds if is_cut_short else None),
        num_requests=len(trace.requests),
        before=before,
        after=after,
        preemptions=(after.preemptions or 0) - (before.preemptions or 0) if known else None,
        machine=machine_use(times_before, times_after),
        clock_skew_s=skew,
        is_cut_short=is_cut_short,
        notes=target.notes,
        provenance={
            "server": {"url": target.address.base, "kind": target.kind, "version": target.version},
            "model": target.model,
            "began_unix_s": began_unix,
            "trace": {"source": trace.header.source, "scaling": list(trace.header.scaling)},
            "salt": options.salt,
            "client": {
                "processes": len(workers),
                "cpus": cpus,
                "urgency": ", ".join(urgency),
                "warm_up_requests": warmed,
            },
            "fields": target.fields,
            "prompts": "token ids" if target.pool is not None else "text",
            **(provenance or {}),
        },
    )
    return judged(run, slas)


def _shares(trace: Trace, processes: int) -> list[list[list[Any]]]:
    """The requests of each process; a session stays in one."""
    shares: list[list[list[Any]]] = [[] for _ in range(max(1, min(processes, len(trace.requests))))]
    homes: dict[str, int] = {}
    for index, request in enumerate(trace.requests):
        home = index % len(shares)
        if request.session is not None:
            home = homes.setdefault(request.session, home)
        shares[home].append(request_row(index, request))
    return [share for share in shares if share]


def _ready(worker: Worker) -> str:
    """Waits for the process; how urgently the system runs it."""
    answer = worker.hear(START_S)
    if answer is None:
        raise ClientError("a process of the load generator does not start")
    return str(answer["ready"])


def _listen(workers: Sequence[Worker], start: float, on_progress: OnProgress) -> tuple[bool, float]:
    """Until all have ended: whether they were stopped, and after how many seconds."""
    open_workers, is_cut_short, seconds = list(workers), False, 0.0
    while open_workers:
        try:
            open_workers = [worker for worker in open_workers if not worker.collect()]
            if not is_cut_short:
                seconds = time.monotonic() - start
                on_progress(*(sum(column) for column in zip(*_progress(workers), strict=True)))
            time.sleep(0.05)
        except KeyboardInterrupt:
            if is_cut_short:
                raise
            is_cut_short = True
            for worker in open_workers:
                worker.tell({"stop": True})
    return is_cut_short, max(seconds, 0.0)


def _progress(workers: Sequence[Worker]) -> Iterator[tuple[int, int, int]]:
    return ((worker.sent, worker.done, worker.missed) for worker in workers)


def _window(trace: Trace, logs: Sequence[RequestLog], cut_s: float | None) -> Window:
    """From the start to the last arrival that the trace has, or that sessions have moved behind it."""
    end = max([trace.requests[-1].arrival_s, *(log.scheduled_s for log in logs)])
    if end == 0:  # all at once: then until the last answer
        end = max((log.finished_s or 0.0 for log in logs), default=0.0)
    return Window(0.0, end if cut_s is None else min(end, cut_s))
