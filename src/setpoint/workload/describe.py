"""What a trace is like: lengths, burstiness, sharing of prefixes; and how near it is to a shipped source."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from setpoint.workload.tables import Floats, Quantiles, table
from setpoint.workload.trace import Trace

PERCENTILES = (5, 25, 50, 75, 90, 95, 99)
WINDOWS_S = (1, 10, 60)
LRU_SHARES = (0.01, 0.03, 0.1, 0.3, 1.0)  # of the unique blocks


@dataclass(frozen=True, slots=True)
class Counts:
    """Arrivals in windows of one length."""

    window_s: int
    var_over_mean: float  # 1 = Poisson
    max_over_mean: float
    lag1: float  # autocorrelation


def dispersion(times: Floats, seconds: float) -> list[Counts]:
    """For each window of which the trace holds at least three."""
    found = []
    for window in WINDOWS_S:
        num_windows = int(seconds // window)
        if num_windows < 3:
            continue
        counts = np.bincount((times // window).astype(np.int64), minlength=num_windows)[:num_windows].astype(np.float64)
        mean, var = counts.mean(), counts.var()
        lag = float(np.mean((counts[1:] - mean) * (counts[:-1] - mean)) / var) if var > 0 else 0.0
        found.append(Counts(window, float(var / max(mean, 1e-9)), float(counts.max() / max(mean, 1e-9)), lag))
    return found


def ks_distance(values: Floats, source: Quantiles) -> float:
    """Kolmogorov-Smirnov: the largest difference between the two cumulative distributions."""
    distinct, counts = np.unique(values, return_counts=True)
    cumulative = np.cumsum(counts) / len(values)
    expected = source.below(distinct)
    before = np.concatenate(([0.0], cumulative[:-1]))
    just_below = source.below(distinct - 0.5)  # lengths are integers
    return float(max(np.abs(cumulative - expected).max(), np.abs(before - just_below).max()))


def hit_rate(trace: Trace, capacity_blocks: int | None = None) -> float:
    """Share of the prompt tokens found in a cache of whole blocks: least recently used go first; None = endless."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = total = 0
    for request in trace.requests:
        total += request.input_tokens
        matching = True
        for block in request.hash_ids:
            known = block in cache
            matching = matching and known
            hits += matching
            if known:
                cache.move_to_end(block)
            else:
                cache[block] = None
        while capacity_blocks is not None and len(cache) > capacity_blocks:
            cache.popitem(last=False)
    return min(1.0, hits * trace.header.block_size / total) if total else 0.0


def describe(trace: Trace) -> dict[str, Any]:
    """Plain numbers, ready for JSON."""
    requests = trace.requests
    times = np.asarray([request.arrival_s for request in requests]) - requests[0].arrival_s
    seconds = float(times[-1])
    gaps = np.diff(times)
    sessions = Counter(request.session for request in requests if request.session is not None)
    document: dict[str, Any] = {
        "source": trace.header.source,
        "scaling": list(trace.header.scaling),
        "requests": len(requests),
        "seconds": seconds,
        "rate_rps": len(requests) / seconds if seconds else None,
        "input": _lengths([request.input_tokens for request in requests]),
        "output": _lengths([request.output_tokens for request in requests]),
        "iat_cv": float(gaps.std() / gaps.mean()) if len(gaps) > 1 and gaps.mean() > 0 else None,
        "counts": [
            {"window_s": c.window_s, "var_over_mean": c.var_over_mean, "max_over_mean": c.max_over_mean, "lag1": c.lag1}
            for c in dispersion(times, seconds)
        ],
        "classes": dict(Counter(request.class_name or "-" for request in requests)),
        "sessions": len(sessions),
        "turns_mean": float(np.mean(list(sessions.values()))) if sessions else None,
        "largest_session_share": max(sessions.values()) / len(requests) if sessions else None,
    }
    unique = len({block for request in requests for block in request.hash_ids})
    if unique:
        capacities = [max(1, math.ceil(unique * share)) for share in LRU_SHARES]
        document["prefix"] = {
            "unique_blocks": unique,
            "endless_hit": hit_rate(trace),
            "lru": [{"blocks": capacity, "hit": hit_rate(trace, capacity)} for capacity in capacities],
        }
    return document


def compare(trace: Trace, source: str) -> dict[str, Any]:
    """With a shipped table: distances of the lengths, and dispersion beside the source's."""
    facts = table(source)
    times = np.asarray([request.arrival_s for request in trace.requests]) - trace.requests[0].arrival_s
    theirs = facts.get("dispersion", {})
    return {
        "source": source,
        "ks_input": ks_distance(_array(trace, "input_tokens"), Quantiles.of(facts["input_len"])),
        "ks_output": ks_distance(_array(trace, "output_tokens"), Quantiles.of(facts["output_len"])),
        "counts": [
            {
                "window_s": c.window_s,
                "var_over_mean": c.var_over_mean,
                "source_var_over_mean": theirs.get(f"{c.window_s}s", {}).get("var_over_mean"),
            }
            for c in dispersion(times, float(times[-1]))
        ],
    }


def _array(trace: Trace, name: str) -> Floats:
    return np.asarray([getattr(request, name) for request in trace.requests], np.float64)


def _lengths(tokens: Sequence[int]) -> dict[str, float]:
    values = np.asarray(tokens, np.float64)
    quantiles = np.percentile(values, PERCENTILES)
    named = {f"p{p}": float(value) for p, value in zip(PERCENTILES, quantiles, strict=True)}
    return named | {"mean": float(values.mean()), "max": float(values.max()), "total": float(values.sum())}
