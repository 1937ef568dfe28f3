"""Measuring the machine: short probes to stand beside a benchmark's samples, and the whole record."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence

from setpoint import _native
from setpoint.tune.probe.machine import SCHEMA, Ceilings, MachineIdentity, MachineRecord, Noise, Rate, this_identity

SLICE_S = 0.05
BARRIER_S = 0.1
MIN_ROUNDS = 3
NOISE_SHARE = 0.2  # of the time, for the noise floor

PEAKS = {"int8_gops": "int8", "int16_gops": "int16", "bf16_gflops": "bf16", "fp32_gflops": "fp32"}


class Probe:
    """What the machine can do at this moment. Take one just before and one just after each sample of a benchmark.

    Threads are pinned, one a CPU. The buffer (several times the last cache) is allocated by the first `dram` and kept.
    """

    def __init__(self) -> None:
        self._native = _native.Probe()

    def vnni(self, threads: int, ms: float = 50) -> float | None:
        """GOP/s of 8-bit integer products (vpdpbusd, or the AVX2 chain); None on a CPU that has neither."""
        return self._native.peak("int8", threads, ms / 1e3)

    def dram(self, threads: int, ms: float = 50) -> float:
        """GB/s read from memory."""
        return self._native.dram(threads, ms / 1e3)


def measure_machine(seconds: float, report: Callable[[int, int], None]) -> MachineRecord:
    """Measure every ceiling in about `seconds`, three rounds at least; in twice as long on a machine too busy for that.

    Kinds and thread counts take turns, so that a drift of the machine meets all of them. `report(done, total)` counts
    slices.
    """
    identity, probe = this_identity(), _native.Probe()
    counts = thread_counts(identity.num_cpus)
    turns = [
        (threads, name, measure) for threads in counts for name, measure in _kinds(probe, identity, threads).items()
    ]
    rounds = max(MIN_ROUNDS, int(seconds * (1 - NOISE_SHARE) / (len(turns) * SLICE_S)))
    num_noise = max(10, int(seconds * NOISE_SHARE / SLICE_S))
    total = rounds * len(turns) + num_noise
    probe.dram(counts[-1], 0.001)  # the first touch of the buffer is not a measurement
    began, before = time.monotonic(), _native.cpu_times()
    patience_s = max(seconds, total * SLICE_S)
    samples: dict[tuple[int, str], list[float]] = defaultdict(list)
    done_rounds = 0
    while done_rounds < rounds and (done_rounds == 0 or time.monotonic() - began < 1.5 * patience_s):
        for index, (threads, name, measure) in enumerate(turns):
            rate = measure()
            if rate is not None:
                samples[threads, name].append(rate)
            report(done_rounds * len(turns) + index + 1, total)
        done_rounds += 1
    ceilings = tuple(_ceilings(threads, samples, probe.barrier(threads, BARRIER_S)) for threads in counts)
    steady: list[float] = []
    while len(steady) < num_noise and (len(steady) < 3 or time.monotonic() - began < 2 * patience_s):
        rate = probe.peak("int8", counts[-1], SLICE_S)
        steady.append(probe.dram(counts[-1], SLICE_S) if rate is None else rate)
        report(total - num_noise + len(steady), total)
    report(total, total)
    noise = _noise(steady, before, _native.cpu_times())
    return MachineRecord(SCHEMA, identity, time.time(), SLICE_S * 1e3, done_rounds, ceilings, noise)


def thread_counts(num_cpus: int) -> list[int]:
    """1, 2, 4, ... and all."""
    counts = [1]
    while counts[-1] * 2 < num_cpus:
        counts.append(counts[-1] * 2)
    return counts if num_cpus == 1 else [*counts, num_cpus]


def _kinds(probe: _native.Probe, identity: MachineIdentity, threads: int) -> dict[str, Callable[[], float | None]]:
    """What can be measured with so many threads. Caches are read in working sets of half their size (L3: a share)."""
    kinds: dict[str, Callable[[], float | None]] = {}
    for name, kind in PEAKS.items():
        if probe.peak(kind, 1, 0.001) is not None:
            kinds[name] = lambda kind=kind: probe.peak(kind, threads, SLICE_S)  # type: ignore[misc]
    sharing = min(threads, max(identity.l3_cpus, 1))
    sets = {"l1_read_gb_s": identity.l1_bytes // 2, "l2_read_gb_s": identity.l2_bytes // 2}
    if identity.l3_bytes // 2 // sharing >= 2 * identity.l2_bytes:  # otherwise it cannot be told from L2
        sets["l3_read_gb_s"] = identity.l3_bytes // 2 // sharing
    for name, working_set in sets.items():
        if working_set >= 4096:
            kinds[name] = lambda working_set=working_set: probe.read(threads, working_set, SLICE_S)  # type: ignore[misc]
    kinds["dram_read_gb_s"] = lambda: probe.dram(threads, SLICE_S)
    return kinds


def _ceilings(threads: int, samples: dict[tuple[int, str], list[float]], barrier_us: tuple[float, float]) -> Ceilings:
    def rate(name: str) -> Rate | None:
        return _rate(samples[threads, name]) if samples[threads, name] else None

    return Ceilings(
        threads=threads,
        int8_gops=rate("int8_gops"),
        int16_gops=rate("int16_gops"),
        bf16_gflops=rate("bf16_gflops"),
        fp32_gflops=rate("fp32_gflops"),
        l1_read_gb_s=rate("l1_read_gb_s"),
        l2_read_gb_s=rate("l2_read_gb_s"),
        l3_read_gb_s=rate("l3_read_gb_s"),
        dram_read_gb_s=_rate(samples[threads, "dram_read_gb_s"]),
        barrier_median_us=round(barrier_us[0], 4),
        barrier_p99_us=round(barrier_us[1], 4),
    )


def _rate(values: Sequence[float]) -> Rate:
    return Rate(*(float(f"{value:.4g}") for value in (statistics.median(values), _percentile(values, 10), max(values))))


def _percentile(values: Sequence[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[round(percent / 100 * (len(ordered) - 1))]


def _noise(steady: Sequence[float], before: dict[str, float], after: dict[str, float]) -> Noise:
    used = {name: max(after[name] - before[name], 0.0) for name in after}
    total = max(used["total_s"], 1e-9)
    return Noise(
        slices=len(steady),
        spread=round((_percentile(steady, 90) - _percentile(steady, 10)) / statistics.median(steady), 4),
        steal_fraction=round(min(used["steal_s"] / total, 1.0), 4),
        others_fraction=round(min(max(used["busy_s"] - used["own_s"], 0.0) / total, 1.0), 4),
    )
