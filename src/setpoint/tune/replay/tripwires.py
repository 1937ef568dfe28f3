"""Whether a run may be believed. A tripwire that is hit makes a run *invalid*, never *slow*.

Each rule looks at one way in which figures lie: a client that was late, a load that was never reached, a server that
dropped work silently, clocks, other processes. An invalid run is shown with its reason and never ranked.
Over-saturation is another thing: the run is honest, but its percentiles depend on how long it was, so that load counts
as failed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from setpoint.tune.measure import Outcome, RequestLog, Run, Verdict, in_flight
from setpoint.tune.sla import METRICS, Sla
from setpoint.tune.statistics import slope

MAX_LAG_S = 0.002
MAX_LAG_SHARE = 0.01  # of the tightest target
MIN_ARRIVALS = 0.99  # of the schedule
MIN_SATURATION_S = 30.0
SATURATION_PARTS = 12
MIN_GROWTH = 0.5  # of the mean over the window, to call a slope a growing queue
MAX_SKEW_S = 0.001
MAX_STEAL = 0.02
MAX_OTHERS = 0.05
MIN_TIMED = 20  # deliveries, to judge a clock

Rule = tuple[Outcome, str]


def judged(
    run: Run, slas: Sequence[Sla] = (), reference: Run | None = None, late_metrics: Sequence[str] = METRICS
) -> Run:
    """The run with what every tripwire says of it. `reference` is one of an equal start: its KV pool is too.

    `late_metrics` are those that a late client distorts: all, unless somebody else stamps the tokens.
    """
    rules: dict[str, Callable[[], Rule]] = {
        "client lag": lambda: client_lag(run, slas, late_metrics),
        "load reached": lambda: load_reached(run),
        "preemptions": lambda: preemptions(run),
        "saturation": lambda: saturation(run),
        "KV pool": lambda: kv_pool(run, reference),
        "accounting": lambda: accounting(run),
        "failures": lambda: failures(run),
        "clock": lambda: clock(run),
        "machine": lambda: machine(run),
    }
    verdicts = tuple(Verdict(name, *rule()) for name, rule in rules.items())
    return replace(run, verdicts=verdicts)


def client_lag(run: Run, slas: Sequence[Sla] = (), metrics: Sequence[str] = METRICS) -> Rule:
    """The 99th percentile of how late requests were sent."""
    lags = [log.send_lag_s for log in run.arrivals if log.sent_s is not None]
    if not lags:
        return "invalid", "nothing was sent"
    bounds = [bound for sla in slas for metric in metrics if (bound := sla.tightest(metric)) is not None]
    limit = max(MAX_LAG_S, MAX_LAG_SHARE * min(bounds, default=0.0))
    lag = float(np.percentile(lags, 99, method="inverted_cdf"))
    return _rule(lag <= limit, f"requests left up to {lag * 1e3:.2f} ms late (p99; at most {limit * 1e3:.2f} ms)")


def load_reached(run: Run) -> Rule:
    sent = sum(log.sent_s is not None for log in run.logs)
    share = sent / max(run.num_requests, 1)
    return _rule(share >= MIN_ARRIVALS, f"{sent} of {run.num_requests} requests were sent")


def preemptions(run: Run) -> Rule:
    """Work that the server computed twice must be in the result."""
    counted = _gained(run, "preemptions")
    if counted is None:
        return "unknown", "the server does not count preemptions"
    reported = run.preemptions or 0
    return _rule(reported >= counted, f"{counted} preemptions, {reported} of them reported")


def saturation(run: Run) -> Rule:
    """A queue that grows all the time: the slopes of requests in flight and of TTFT are both positive at 95 %.

    The rule of GuideLLM on means of a twelfth of the window, since single samples say the same thing many times; and
    the growth must be half of the mean, since any trend becomes significant when a window is long enough.
    """
    if run.window.seconds < MIN_SATURATION_S:
        return "unknown", f"a window of {run.window.seconds:.0f} s does not tell; {MIN_SATURATION_S:.0f} s would"
    begin, width = run.window.begin_s, run.window.seconds / SATURATION_PARTS
    ticks = [begin + width / 20 * (tick + 0.5) for tick in range(SATURATION_PARTS * 20)]
    counts = in_flight(run.logs, ticks)
    flying = [float(np.mean(counts[part : part + 20])) for part in range(0, len(counts), 20)]
    queue = slope([begin + width * part for part in range(SATURATION_PARTS)], flying)
    waits: dict[int, list[float]] = {}
    for log in run.arrivals:
        if log.deliveries:
            waits.setdefault(int((log.scheduled_s - begin) / width), []).append(log.deliveries[0][0] - log.scheduled_s)
    wait = slope(list(waits), [float(np.mean(found)) for found in waits.values()])
    growth = queue.estimate * run.window.seconds
    is_growing = queue.low > 0 and wait.low > 0 and growth > max(1.0, MIN_GROWTH * float(np.mean(flying)))
    detail = f"requests in flight grew by {growth:.1f} over the window (mean {np.mean(flying):.1f})"
    return ("saturated", detail) if is_growing else ("ok", detail)


def kv_pool(run: Run, reference: Run | None = None) -> Rule:
    """The server's KV cache has one size, in this run and in others of equal starts."""
    sizes = [run.before.kv_pool_tokens, run.after.kv_pool_tokens]
    sizes += [] if reference is None else [reference.after.kv_pool_tokens]
    known = {size for size in sizes if size is not None}
    if not known:
        return "unknown", "the server does not tell its KV pool"
    return _rule(len(known) == 1, f"{' and '.join(map(str, sorted(known)))} tokens")


def accounting(run: Run) -> Rule:
    """Every request has one log, every token a place; the server's totals agree with the client's.

    Where requests failed, the server may have done more than the client has seen, never less.
    """
    indices = {log.index for log in run.logs}
    if len(indices) != len(run.logs) or (len(indices) != run.num_requests and not run.is_cut_short):
        return "invalid", f"{len(run.logs)} logs of {run.num_requests} requests"
    mismatched = sum(log.ok and log.counted_tokens > log.output_tokens for log in run.logs)
    if mismatched:
        return "invalid", f"{mismatched} answers brought more tokens than the server says"
    finished = [log for log in run.logs if log.status in ("ok", "short")]
    has_misses = len(finished) < len(run.logs)
    theirs = {name: _gained(run, name) for name in ("prompt_tokens", "generation_tokens", "finished")}
    ours = {
        "prompt_tokens": sum(log.prompt_tokens for log in finished),
        "generation_tokens": sum(log.output_tokens for log in finished),
        "finished": len(finished),
    }
    if all(count is None for count in theirs.values()):
        return "unknown", "the server has no counters to compare with"
    for name, count in theirs.items():
        if count is not None and (count < ours[name] or (count > ours[name] and not has_misses)):
            return "invalid", f"{name.replace('_', ' ')}: {ours[name]} here, {count} on the server"
    hidden = sum(log.ok and log.counted_tokens < log.output_tokens for log in run.logs)
    more = f"; {hidden} answers with tokens that no event showed" if hidden else ""
    return "ok", f"{ours['generation_tokens']} output tokens on both sides{more}"


def failures(run: Run) -> Rule:
    """What failed must not look like a fast answer, and what the server does not force is not comparable."""
    wrong = [log for log in run.logs if log.timing.ok != (log.status == "ok" and bool(log.deliveries))]
    empty = [log for log in run.logs if log.status == "ok" and not log.deliveries]
    short = sum(log.status == "short" for log in run.logs)
    if wrong or empty:
        return "invalid", f"{len(wrong) + len(empty)} failed requests have latencies"
    if short > 0.01 * len(run.logs):
        return "invalid", f"{short} answers ended early: the server does not keep to ignore_eos; try --natural-end"
    missed = sum(log.status != "ok" for log in run.logs)
    return "ok", f"{missed} misses, none of them in a percentile"


def clock(run: Run) -> Rule:
    """Time goes forward, everywhere the same, in less than milliseconds."""
    if abs(run.clock_skew_s) > MAX_SKEW_S:
        return "invalid", f"clocks differ by {run.clock_skew_s * 1e3:.2f} ms"
    backwards = sum(not _is_forward(log) for log in run.logs)
    if backwards:
        return "invalid", f"time goes back in {backwards} logs"
    times = [moment for log in run.logs for moment, _ in log.deliveries]
    if len(times) >= MIN_TIMED and all(abs(moment * 1e3 - round(moment * 1e3)) < 1e-6 for moment in times):
        return "invalid", "the clock counts whole milliseconds"
    return "ok", f"{len(times)} deliveries in order"


def machine(run: Run) -> Rule:
    if run.machine is None:
        return "unknown", "the machine's counters cannot be read"
    others = run.machine.others
    told = "" if others is None else f", other processes {others:.1%}"
    is_quiet = run.machine.steal <= MAX_STEAL and (others is None or others <= MAX_OTHERS)
    limits = f"at most {MAX_STEAL:.0%} and {MAX_OTHERS:.0%}"
    return _rule(is_quiet, f"the hypervisor took {run.machine.steal:.1%} of the CPUs{told} ({limits})")


def _is_forward(log: RequestLog) -> bool:
    """The times of one request, in the order in which they must be."""
    sent = log.scheduled_s if log.sent_s is None else log.sent_s
    end = math.inf if log.finished_s is None else log.finished_s
    times = (log.scheduled_s, sent, *(moment for moment, _ in log.deliveries), end)
    return all(after >= before - 1e-6 for before, after in pairwise(times))


def _gained(run: Run, name: str) -> int | None:
    before, after = getattr(run.before, name), getattr(run.after, name)
    return None if before is None or after is None else after - before


def _rule(is_kept: bool, detail: str) -> Rule:
    return ("ok" if is_kept else "invalid"), detail
