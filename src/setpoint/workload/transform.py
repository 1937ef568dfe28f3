"""Cutting and scaling a trace. What was done is added to its header."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from setpoint.errors import ConfigError
from setpoint.workload.trace import MAX_NAME_CHARS, Trace, TraceError, TraceRequest

_ID_STRIDE = 1 << 40  # between the block ids of superposed copies
_REPEAT_STRIDE = 1 << 50  # and of those that follow each other


def split(trace: Trace, share: float) -> tuple[Trace, Trace]:
    """By time: what arrives in the first `share` of the trace, and the rest, which begins at 0 again.

    A session that is cut in two goes on in the second part, with the history that it has there.
    """
    if not 0 < share < 1:
        raise ConfigError("the share of the first part must be between 0 and 1")
    begin = trace.requests[0].arrival_s
    border = begin + share * trace.seconds
    first = [request for request in trace.requests if request.arrival_s < border]
    second = [replace(request, arrival_s=request.arrival_s - border) for request in trace.requests[len(first) :]]
    if not first or not second:
        raise TraceError("one part of the split would hold no request; choose another share")
    return _with(trace, first, f"first {share:g} of the time"), _with(trace, second, f"last {1 - share:g} of the time")


def scale_rate(trace: Trace, factor: float, seed: int = 0) -> Trace:
    """`factor` times as many requests a second.

    Independent requests are brought together in time. Sessions are not: their turns would collide and their pauses
    shrink, which no growth of traffic does. Instead sessions are left out, or copies of the trace are laid over it,
    shifted in time, that share only the blocks that sessions of the trace share.
    """
    if not 1e-3 <= factor <= 1e3:
        raise ConfigError("the rate's factor must be in 0.001..1000")
    if factor == 1.0:
        return trace
    if not trace.has_sessions:
        faster = [replace(request, arrival_s=request.arrival_s / factor) for request in trace.requests]
        return _with(trace, faster, f"time / {factor:g}")
    rng = np.random.default_rng(seed)
    shared = _shared_blocks(trace.requests)
    whole, part = int(factor), factor - int(factor)
    requests: list[TraceRequest] = []
    for copy in range(whole + (part > 0)):
        kept = trace.requests if copy < whole else _thinned(trace.requests, part, rng)
        shift = 0.0 if copy == 0 else float(rng.random()) * trace.seconds
        requests += [_copied(request, copy, shift, trace, shared) for request in kept]
    if not requests:
        raise TraceError("no session is left at this rate; choose a larger factor")
    return _with(trace, sorted(requests, key=lambda request: request.arrival_s), f"sessions x {factor:g}, seed {seed}")


def repeated(trace: Trace, times: int) -> Trace:
    """The trace so many times one after the other: sessions and blocks anew each time, but what sessions share."""
    if not 1 <= times <= 1000:
        raise ConfigError("a trace is repeated 1 to 1000 times")
    shared = _shared_blocks(trace.requests)
    period = trace.seconds * (1 + 1 / max(len(trace.requests) - 1, 1))
    requests = [
        replace(
            request,
            arrival_s=request.arrival_s + copy * period,
            session=None if request.session is None else f"{request.session}~r{copy}"[:MAX_NAME_CHARS],
            hash_ids=tuple(block if block in shared else block + copy * _REPEAT_STRIDE for block in request.hash_ids),
        )
        for copy in range(times)
        for request in trace.requests
    ]
    return _with(trace, requests, f"repeated {times} times") if times > 1 else trace


def excerpt(trace: Trace, begin_s: float, seconds: float) -> Trace:
    """What arrives in `seconds` from `begin_s` on, at 0; a trace that is too short goes round with new blocks.

    Sessions that are under way at the border go on with the history that they have there.
    """
    if not 0 < seconds <= 1e6 or not 0 <= begin_s <= 1e9:
        raise ConfigError("an excerpt has a length above 0 s")
    requests = trace.requests
    period = trace.seconds + trace.seconds / max(len(requests) - 1, 1)  # the last one is followed as the others are
    if period == 0:
        return _with(trace, requests, f"{seconds:g} s")
    begin = begin_s % period
    again = repeated(trace, int((begin + seconds) // period) + 1)
    times = [request.arrival_s - requests[0].arrival_s - begin for request in again.requests]
    found = [
        replace(request, arrival_s=at) for request, at in zip(again.requests, times, strict=True) if 0 <= at < seconds
    ]
    if not found:
        raise TraceError(f"no request arrives in these {seconds:g} s; take more of the trace")
    return _with(trace, found, f"{seconds:g} s from {begin:.1f} s on")


def scale_lengths(trace: Trace, divisor: float) -> Trace:
    """Every length and the block size divided, for a model with a shorter context."""
    if not 0.01 <= divisor <= 1e4:
        raise ConfigError("the lengths' divisor must be in 0.01..10000")
    size = max(1, round(trace.header.block_size / divisor))
    requests = []
    for request in trace.requests:
        tokens = max(1, round(request.input_tokens / divisor))
        requests.append(
            replace(
                request,
                input_tokens=tokens,
                output_tokens=max(1, round(request.output_tokens / divisor)),
                hash_ids=request.hash_ids[: -(-tokens // size)],
            )
        )
    scaled = _with(trace, requests, f"lengths / {divisor:g}")
    return replace(scaled, header=replace(scaled.header, block_size=size))


def more_bursts(trace: Trace, factor: float = 2.0, seed: int = 0) -> Trace:
    """The same requests over the same time, with so many times the variation (CV) of the gaps between arrivals.

    Each gap is multiplied by a gamma variate of mean 1. Sessions move as a whole: it is their beginnings that gather.
    """
    if not 1 <= factor <= 10:
        raise ConfigError("the variation's factor must be in 1..10")
    begins: dict[str | int, float] = {}
    for index, request in enumerate(trace.requests):
        begins.setdefault(index if request.session is None else request.session, request.arrival_s)
    times = np.asarray(sorted(begins.values()))
    gaps = np.diff(times)
    if len(gaps) < 2 or not gaps.any():
        return trace
    squared = float(gaps.var() / gaps.mean() ** 2)
    variance = (factor**2 - 1) * squared / (1 + squared)
    if not variance:
        return trace
    weighed = gaps * np.random.default_rng(seed).gamma(1 / variance, variance, len(gaps))
    weighed *= gaps.sum() / weighed.sum()
    moved = dict(zip(times.tolist(), (times[0] + np.concatenate([[0.0], np.cumsum(weighed)])).tolist(), strict=True))
    requests = []
    for index, request in enumerate(trace.requests):
        begin = begins[index if request.session is None else request.session]
        requests.append(replace(request, arrival_s=moved[begin] + request.arrival_s - begin))
    requests.sort(key=lambda request: request.arrival_s)
    return _with(trace, requests, f"variation of gaps x {factor:g}, seed {seed}")


def _with(trace: Trace, requests: list[TraceRequest], step: str) -> Trace:
    return Trace(replace(trace.header, scaling=(*trace.header.scaling, step)), requests)


def _shared_blocks(requests: Sequence[TraceRequest]) -> set[int]:
    """Blocks that requests of different sessions have in common: a product's, not a session's."""
    owner: dict[int, str | None] = {}
    shared: set[int] = set()
    for request in requests:
        for block in request.hash_ids:
            if owner.setdefault(block, request.session) != request.session:
                shared.add(block)
    return shared


def _thinned(requests: Sequence[TraceRequest], share: float, rng: np.random.Generator) -> list[TraceRequest]:
    """Whole sessions, and single requests, each kept with this probability."""
    kept: dict[str, bool] = {}
    chosen = []
    for request in requests:
        keep = rng.random() < share
        if request.session is not None:
            keep = kept.setdefault(request.session, keep)
        if keep:
            chosen.append(request)
    return chosen


def _copied(request: TraceRequest, copy: int, shift: float, trace: Trace, shared: set[int]) -> TraceRequest:
    """Shifted around the end of the trace, under another session name and with blocks of its own."""
    if copy == 0:
        return request
    moved = request.arrival_s + shift
    wrapped = moved > trace.requests[-1].arrival_s  # a session cut in two by the end of the trace begins anew
    session = None if request.session is None else f"{request.session}~{copy}{'w' if wrapped else ''}"
    ids = tuple(block if block in shared else block + copy * _ID_STRIDE for block in request.hash_ids)
    return replace(request, arrival_s=moved - trace.seconds if wrapped else moved, session=session, hash_ids=ids)
