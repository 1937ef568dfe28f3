"""What one run of a trace gave: a log of each request, and what must be known to trust and to recompute it.

Pure data. The open-loop client fills it from HTTP (`replay/`), the simulator from the engine under a virtual clock.
Times are seconds on one monotonic clock whose zero is the start of the run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, get_args

from setpoint.tune.sla import Timing

Status = Literal["ok", "rejected", "timeout", "error", "short"]
STATUSES: tuple[str, ...] = get_args(Status)
Outcome = Literal["ok", "unknown", "saturated", "invalid"]
OUTCOMES: tuple[str, ...] = get_args(Outcome)


@dataclass(frozen=True, slots=True)
class RequestLog:
    """One request as its client saw it.

    `short` is an answer that ended before the tokens that the trace asks for, where the server was told not to end it;
    it is a miss, as are refusals, time-outs and errors. A delivery is what came at one moment: (time, tokens).
    """

    index: int  # in the trace
    scheduled_s: float  # when it had to be sent: every latency counts from here
    sent_s: float | None  # when its last byte left; None: it never did
    status: Status
    deliveries: tuple[tuple[float, int], ...] = ()
    finished_s: float | None = None  # when the answer, or the failure, was complete
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of these, found in the server's cache; as far as it tells
    output_tokens: int = 0  # as the server counts them; the deliveries' sum where it does not
    wanted_tokens: int = 0  # output that the trace asks for
    class_name: str = ""
    session: str | None = None
    turn: int = 0
    slo: str | None = None  # of this request alone
    error: str = ""

    @property
    def ok(self) -> bool:
        return self.status == "ok" and bool(self.deliveries)

    @property
    def send_lag_s(self) -> float:
        return math.inf if self.sent_s is None else self.sent_s - self.scheduled_s

    @property
    def counted_tokens(self) -> int:
        """Tokens of the deliveries; another number than `output_tokens` is a mismatch."""
        return sum(count for _, count in self.deliveries)

    @property
    def token_times(self) -> list[float]:
        """When each token came, from the start of the run. Tokens that only the server has counted came last."""
        times = [moment for moment, count in self.deliveries for _ in range(count)]
        missing = self.output_tokens - len(times)
        return times + times[-1:] * missing if missing > 0 else times

    @property
    def timing(self) -> Timing:
        """Against the scheduled arrival. The tokens of one delivery have gaps of zero between them."""
        if not self.ok:
            return Timing(math.inf, math.inf, 0, ok=False)
        times = self.token_times
        gaps = tuple(after - before for before, after in pairwise(times))
        return Timing(times[0] - self.scheduled_s, times[-1] - self.scheduled_s, len(times), gaps)


@dataclass(frozen=True, slots=True)
class Window:
    """The part of the run whose arrivals count, from its start on."""

    begin_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        return self.end_s - self.begin_s


@dataclass(frozen=True, slots=True)
class EngineCounters:
    """Totals of the server at one moment; None is what it does not tell."""

    prompt_tokens: int | None = None
    generation_tokens: int | None = None
    finished: int | None = None  # answers that came to their end
    rejected: int | None = None
    preemptions: int | None = None
    kv_pool_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class MachineUse:
    """Of all CPU time during the run, as shares."""

    steal: float  # taken by the hypervisor
    others: float | None  # by processes that are neither client nor engine; None: the engine is not on this machine


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one tripwire says: `invalid` runs are shown and never ranked, `saturated` ones count as failed loads."""

    tripwire: str
    outcome: Outcome
    detail: str


@dataclass(frozen=True)
class Run:
    """One replay of a trace; `preemptions` is what this result reports of them, None if nothing."""

    logs: tuple[RequestLog, ...]
    window: Window
    num_requests: int  # of the trace: with those that were never due because the run was cut short
    before: EngineCounters = EngineCounters()
    after: EngineCounters = EngineCounters()
    preemptions: int | None = None
    machine: MachineUse | None = None
    clock_skew_s: float = 0.0  # between the clocks that wrote these logs
    is_cut_short: bool = False
    notes: tuple[str, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)
    verdicts: tuple[Verdict, ...] = ()

    @cached_property
    def arrivals(self) -> tuple[RequestLog, ...]:
        """The requests that were due in the window, answered or not."""
        return tuple(log for log in self.logs if self.window.begin_s <= log.scheduled_s <= self.window.end_s)

    @cached_property
    def timings(self) -> tuple[Timing, ...]:
        return tuple(log.timing for log in self.arrivals)

    @property
    def is_valid(self) -> bool:
        """No tripwire was hit and nobody cut the run short: its figures may be compared with another's."""
        return not self.is_cut_short and all(verdict.outcome != "invalid" for verdict in self.verdicts)

    @property
    def is_saturated(self) -> bool:
        return any(verdict.outcome == "saturated" for verdict in self.verdicts)


def in_flight(logs: Sequence[RequestLog], times: Sequence[float]) -> list[int]:
    """How many requests were due and not over at each of these times."""
    import numpy as np

    due = np.sort([log.scheduled_s for log in logs])
    over = np.sort([math.inf if log.finished_s is None else log.finished_s for log in logs])
    at = np.asarray(times, np.float64)
    counts = np.searchsorted(due, at, "right") - np.searchsorted(over, at, "right")
    return [int(count) for count in counts]
