"""Arrival times with the burstiness of real traffic. All return seconds, ascending, within [0, seconds)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from setpoint.workload.tables import Floats, Quantiles, table

_SMOOTHED_BINS = 3  # of 10 s: drift, without the noise of Poisson counts that is added again
_BIN_S = 10.0


def poisson(rng: np.random.Generator, rate: float, seconds: float) -> Floats:
    """Independent arrivals."""
    return np.sort(rng.random(rng.poisson(rate * seconds)) * seconds)


def drifting(rng: np.random.Generator, rate: float, seconds: float, source: str = "azure2023_conv") -> Floats:
    """Poisson with the slowly moving rate of a source: its 10 s counts, smoothed, from a random place on."""
    counts = np.asarray(table(source)["counts_per_10s"][:-1], np.float64)  # the last bin is partial
    padded = np.pad(counts, _SMOOTHED_BINS // 2, mode="edge")
    smooth = np.convolve(padded, np.ones(_SMOOTHED_BINS) / _SMOOTHED_BINS, "valid")
    shape = smooth / smooth.mean()
    num_bins = int(np.ceil(seconds / _BIN_S))
    begin = rng.integers(len(shape))
    expected = rate * _BIN_S * np.resize(np.roll(shape, -begin), num_bins)
    bins = np.repeat(np.arange(num_bins), rng.poisson(expected))
    times = np.sort((bins + rng.random(len(bins))) * _BIN_S)
    return times[times < seconds]


def bursts(rng: np.random.Generator, rate: float, seconds: float, source: str = "azure2023_code") -> Floats:
    """ON/OFF traffic: whole burst profiles (counts a second) and gaps of a source, drawn anew.

    Another rate is reached by superposing copies and thinning them, which keeps the lengths of bursts and gaps.
    """
    natural = table(source)["rate_rps"]
    copies = max(1, int(np.ceil(rate / natural)))
    times = np.concatenate([_one_burst_source(rng, seconds, source) for _ in range(copies)])
    return np.sort(times[rng.random(len(times)) < rate / (natural * copies)])


def _one_burst_source(rng: np.random.Generator, seconds: float, source: str) -> Floats:
    facts = table(source)["on_off"]
    profiles: list[list[int]] = facts["burst_profiles_counts_per_1s"]
    gaps = Quantiles.of(facts["off_gap_s"])
    times: list[Floats] = []
    now = -float(rng.random() * 60.0)  # begin anywhere in the pattern
    while now < seconds:
        for count in profiles[rng.integers(len(profiles))]:
            times.append(now + np.sort(rng.random(count)))
            now += 1.0
        now += float(gaps.draw(rng, 1)[0]) - 0.5  # the last second of a burst is half empty on average
    merged = np.concatenate(times)
    return merged[(merged >= 0) & (merged < seconds)]


def superposed(
    rng: np.random.Generator, rate: float, seconds: float, shares: Sequence[float], variations: Sequence[float]
) -> tuple[Floats, np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """Clients with these shares of the load, each a Gamma renewal process with its own coefficient of variation.

    Returns the times and, for each, the client's number.
    """
    times, clients = [], []
    for client, (share, variation) in enumerate(zip(shares, variations, strict=True)):
        own = rate * share / sum(shares)
        shape = 1.0 / variation**2
        expected = own * seconds
        found: list[Floats] = []
        now = -100.0 / own  # where the first arrival lies matters for long after, when gaps vary much
        while now < seconds:
            gaps = rng.gamma(shape, 1.0 / (own * shape), int(expected / 4) + 16)
            found.append(now + np.cumsum(gaps))
            now = float(found[-1][-1])
        merged = np.concatenate(found)
        merged = merged[(merged >= 0) & (merged < seconds)]
        times.append(merged)
        clients.append(np.full(len(merged), client))
    every, whose = np.concatenate(times), np.concatenate(clients)
    order = np.argsort(every, kind="stable")
    return every[order], whose[order]
