"""From timed samples to the numbers that are published: pairs, medians, shares of what the machine could do."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

MAX_DRIFT = 0.10  # between the probes before and after a sample
MAX_STEAL = 0.01  # of the CPU time that the hypervisor gave to others
MAX_OTHERS = 0.05  # of the CPU time that other processes used


@dataclass(frozen=True, slots=True)
class Probe:
    """What the machine could do in that moment, all threads together."""

    vnni_gops: float
    dram_gb_s: float


@dataclass(frozen=True, slots=True)
class Sample:
    """One timed run of one engine, with a probe on either side."""

    seconds: float
    tokens: int
    before: Probe
    after: Probe
    steal: float
    others: float

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    def drift(self, resources: Sequence[str]) -> float:
        """How far the probes lie apart, as a fraction of the larger: the worst of the named resources."""
        pairs = [(float(getattr(self.before, name)), float(getattr(self.after, name))) for name in resources]
        return max(1 - min(pair) / max(pair) for pair in pairs)

    def doubts(self, resources: Sequence[str]) -> list[str]:
        """Why this sample should not count."""
        found = []
        if self.drift(resources) > MAX_DRIFT:
            found.append("probes differ")
        if self.steal > MAX_STEAL:
            found.append("steal")
        if self.others > MAX_OTHERS:
            found.append("other processes")
        return found

    def share(self, operations: float, num_bytes: float) -> float:
        """The time these operations and bytes need at the rates of the probes, by the time they took."""
        vnni = (self.before.vnni_gops + self.after.vnni_gops) / 2 * 1e9
        dram = (self.before.dram_gb_s + self.after.dram_gb_s) / 2 * 1e9
        return max(operations / vnni, num_bytes / dram) / self.seconds


@dataclass(frozen=True, slots=True)
class Pair:
    """Both engines in the same turn."""

    ours: Sample
    theirs: Sample

    @property
    def ratio(self) -> float:
        return self.ours.rate / self.theirs.rate

    def doubts(self, resources: Sequence[str]) -> list[str]:
        return sorted({*self.ours.doubts(resources), *self.theirs.doubts(resources)})

    def badness(self, resources: Sequence[str]) -> float:
        """The worse sample, each doubt in units of its limit: what to leave out first."""
        return max(
            max(sample.drift(resources) / MAX_DRIFT, sample.steal / MAX_STEAL, sample.others / MAX_OTHERS)
            for sample in (self.ours, self.theirs)
        )


def chosen(pairs: Sequence[Pair], resources: Sequence[str], wanted: int) -> list[Pair]:
    """All pairs without a doubt; when they are too few, the least doubtful ones beside them, up to `wanted`."""
    clean = [pair for pair in pairs if not pair.doubts(resources)]
    if len(clean) >= wanted:
        return clean
    return sorted(pairs, key=lambda pair: pair.badness(resources))[:wanted]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Medians over the chosen pairs; `low` and `high` are the extreme ratios among them."""

    ours: float
    theirs: float
    ratio: float
    low: float
    high: float
    pairs: int
    clean: int
    attempts: int


def compare(pairs: Sequence[Pair], resources: Sequence[str], wanted: int) -> Comparison:
    used = chosen(pairs, resources, wanted)
    ratios = [pair.ratio for pair in used]
    return Comparison(
        ours=statistics.median(pair.ours.rate for pair in used),
        theirs=statistics.median(pair.theirs.rate for pair in used),
        ratio=statistics.median(ratios),
        low=min(ratios),
        high=max(ratios),
        pairs=len(used),
        clean=sum(not pair.doubts(resources) for pair in used),
        attempts=len(pairs),
    )


def passes(row_goal: float | None, value: float) -> bool | None:
    """None: nothing was promised."""
    return None if row_goal is None else value >= row_goal
