"""Capacity of a virtual queue: the interval holds the truth as often as it says (T6); what cannot be found is said."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from test_measure import SLA, answered, missed, run_of

from setpoint.cli.bench_serve import enough_seconds
from setpoint.errors import ConfigError
from setpoint.tune.measure import Verdict
from setpoint.tune.metrics import Targets
from setpoint.tune.replay.capacity import (
    Capacity,
    CapacitySearch,
    Point,
    Share,
    capacity_document,
    check_targets,
    isotonic_border,
    point_of,
)
from setpoint.tune.statistics import effective_n

LEVEL, WAIT, REQUESTS = 0.95, 5.0, 400


def passes(rng: np.random.Generator, load: float, count: int = REQUESTS) -> np.ndarray:
    """One server, gamma service of mean 1, Poisson arrivals; who waits less than five services (Lindley)."""
    steps = rng.gamma(4, 0.25, count) - rng.exponential(1 / load, count)
    sums = np.concatenate([[0.0], np.cumsum(steps)[:-1]])
    waits = sums - np.minimum.accumulate(sums)
    return (waits < WAIT).astype(float)


def truth() -> float:
    """Of hundreds of runs of this length."""
    rng = np.random.default_rng(0)
    low, high = 0.3, 0.95
    for _ in range(12):
        middle = math.sqrt(low * high)
        share = np.mean([passes(rng, middle).mean() for _ in range(1000)])
        low, high = (middle, high) if share >= LEVEL else (low, middle)
    return math.sqrt(low * high)


def measured(rng: np.random.Generator, load: float) -> Point:
    is_saturated = load > 1.1
    met = passes(rng, load)
    effect = REQUESTS / effective_n(met, 10)
    return Point(
        load,
        {"wait": Share(float(met.sum()), REQUESTS, LEVEL)},
        is_met=float(met.mean()) >= LEVEL and not is_saturated,
        is_saturated=is_saturated,
        design_effect=effect,
    )


def searched(seed: int, **options: float) -> Capacity:
    rng = np.random.default_rng(seed)
    search = CapacitySearch(start=math.exp(rng.normal(math.log(0.6), 0.3)), **options)  # type: ignore[arg-type]
    while (load := search.next_factor()) is not None:
        search.add(measured(rng, load))
    return search.result()


def test_the_interval_holds_the_capacity_as_often_as_it_promises() -> None:
    """T6: coverage 95 +/- 3 % over 200 searches of at most twelve runs."""
    true = truth()
    found = [searched(5000 + seed) for seed in range(200)]
    intervals = [capacity.interval for capacity in found if capacity.interval is not None]
    assert len(intervals) == 200
    coverage = sum(true in interval for interval in intervals) / 200
    assert 0.92 <= coverage <= 0.98
    errors = [math.log(interval.estimate / true) for interval in intervals]
    assert abs(float(np.mean(errors))) < 0.015
    assert float(np.std(errors)) < 0.06
    assert np.median([math.log(i.high / max(i.low, 1e-9)) / 2 for i in intervals]) < 0.14
    isotonic = [math.log(capacity.isotonic / true) for capacity in found if capacity.isotonic]
    assert abs(float(np.median(isotonic))) < 0.06  # the curve is not what makes the answer


def test_a_search_repeats_with_its_seed_and_stays_near_the_border() -> None:
    one, two = searched(1), searched(1)
    assert one == two
    loads = [point.factor for point in one.points]
    assert len(loads) <= 12
    assert sum(0.4 < load < 1.1 for load in loads) >= len(loads) - 4


def test_a_planted_curve_is_found_exactly() -> None:
    """Shares without noise, on a probit line with its border at 2."""
    from statistics import NormalDist

    normal = NormalDist()
    points = []
    for load in (1.0, 1.5, 1.9, 2.1, 2.5):
        share = normal.cdf(normal.inv_cdf(LEVEL) - 4 * math.log(load / 2))
        points.append(Point(load, {"a": Share(share * 1000, 1000, LEVEL)}, share >= LEVEL))
    search = CapacitySearch()
    search.points = points
    found = search.result()
    assert found.interval is not None
    assert found.interval.estimate == pytest.approx(2.0, rel=1e-3)
    assert 1.8 < found.interval.low < 2.0 < found.interval.high < 2.2
    assert found.isotonic == pytest.approx(2.0, rel=0.02)


def test_the_tightest_term_binds() -> None:
    points = []
    for load in (1.0, 1.5, 2.0, 2.5, 3.0):
        ttft, tpot = 1000 - 25 * load**2, 1000 - 5 * load**2
        shares = {"ttft": Share(ttft, 1000, 0.95), "tpot": Share(tpot, 1000, 0.95)}
        points.append(Point(load, shares, ttft >= 950 and tpot >= 950))
    search = CapacitySearch()
    search.points = points
    found = search.result()
    assert found.binding == "ttft"
    assert found.interval is not None
    assert found.interval.estimate == pytest.approx(math.sqrt(2), rel=0.05)
    assert found.fits["tpot"].capacity.estimate > found.interval.estimate


def test_what_cannot_be_found_is_said() -> None:
    always = CapacitySearch(start=100.0)
    while (load := always.next_factor()) is not None:
        always.add(Point(load, {"a": Share(100, 100, 0.95)}, True))
    assert always.result().interval is None
    assert "every load" in always.result().reason
    never = CapacitySearch(start=0.1)
    while (load := never.next_factor()) is not None:
        never.add(Point(load, {"a": Share(0, 100, 0.95)}, False))
    assert never.result().interval is None
    assert "cannot be met at any load" in never.result().reason
    assert len(never.points) == 3
    assert capacity_document(never.result(), 2.0)["factor"] is None


def test_saturated_loads_bound_the_interval_and_give_no_shares() -> None:
    search = CapacitySearch()
    for load, share, is_saturated in ((1.0, 0.99, False), (1.1, 0.97, False), (1.2, 0.94, False), (1.3, 0.93, True)):
        search.add(Point(load, {"a": Share(share * 60, 60, 0.95)}, share >= 0.95, is_saturated))
    found = search.result().interval
    assert found is not None
    assert found.high <= 1.3


def test_isotonic_shares_by_hand() -> None:
    points = [Point(load, {"a": Share(met, 100, 0.95)}, True) for load, met in ((1, 100), (2, 94), (3, 98), (4, 80))]
    border = isotonic_border(points, "a")  # 2 and 3 are pooled: 96
    assert border is not None
    assert border == pytest.approx(math.exp(math.log(3) + (0.96 - 0.95) / 0.16 * math.log(4 / 3)))
    assert isotonic_border(points[:1], "a") is None


def test_a_run_becomes_a_point() -> None:
    targets = Targets.parse([SLA])
    logs = [answered(i, float(i), 0.1 if i % 10 else 0.5) for i in range(50)]
    point = point_of(run_of(*logs, seconds=50.0), 1.5, targets)
    assert point.factor == 1.5
    assert point.shares["ttft.p95<200ms"] == Share(45, 50, 0.95)
    assert point.shares["tpot.p95<30ms"] == Share(50, 50, 0.95)
    assert not point.is_met
    assert point.attainment == pytest.approx(0.9)
    assert point.rate == pytest.approx(1.0)
    saturated = replace(run_of(*logs[1:2]), verdicts=(Verdict("saturation", "saturated", ""),))
    assert point_of(saturated, 1.0, targets).is_saturated
    assert not point_of(saturated, 1.0, targets).is_met
    assert point_of(run_of(missed()), 1.0, targets).shares["ttft.p95<200ms"].met == 0
    with pytest.raises(ValueError, match="invalid"):
        point_of(replace(run_of(*logs), verdicts=(Verdict("clock", "invalid", ""),)), 1.0, targets)


@pytest.mark.parametrize("slo", [[], ["ttft.mean<1s"], ["ttft.max<1s"], ["itl.p95<20ms"]])
def test_only_shares_of_requests_have_a_capacity(slo: list[str]) -> None:
    with pytest.raises(ConfigError):
        check_targets(Targets.parse(slo))
    check_targets(Targets.parse(["ttft.p95<1s,error.rate<1%", "batch=e2e.p50<9s"]))


def _searched(share_missed: Callable[[float], float], n: int = 60) -> CapacitySearch:
    search = CapacitySearch(start=2.0)
    while (load := search.next_factor()) is not None:
        met = round(n * (1 - share_missed(load)))
        search.add(Point(load, {"ttft.p95<500ms": Share(met, n, 0.95)}, met >= 0.95 * n))
    return search


def test_an_sla_that_long_prompts_miss_alone_ends_the_search() -> None:
    """Seen live: every fifth prompt takes longer than the bound, however quiet the server is."""
    search = _searched(lambda load: 0.2)
    assert len(search.points) == 3
    assert "ttft.p95<500ms" in search.result().reason
    assert search.result().interval is None


def test_a_capacity_far_below_the_start_is_still_found() -> None:
    search = _searched(lambda load: min(1.0, 0.05 * (load / 0.1) ** 0.7))
    found = search.result().interval
    assert found is not None
    assert found.estimate == pytest.approx(0.1, rel=0.3)


def test_runs_at_low_loads_become_longer_within_bounds() -> None:
    targets = Targets.parse(["ttft.p95<1s"])
    assert enough_seconds(60.0, 10.0, targets) == 60.0
    assert enough_seconds(60.0, 0.5, targets) == pytest.approx(59 / 0.5)
    assert enough_seconds(60.0, 0.001, targets) == 360.0
