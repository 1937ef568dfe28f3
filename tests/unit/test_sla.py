"""SLAs: what can be written, what it means over all arrivals, and that nothing unserved looks fast."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from setpoint.errors import ConfigError
from setpoint.tune.sla import Sla, Term, Timing

MISS = Timing(0.0, 0.0, 0, ok=False)


def timing(ttft: float, tpot: float = 0.01, tokens: int = 11) -> Timing:
    return Timing(ttft, ttft + tpot * (tokens - 1), tokens, (tpot,) * (tokens - 1))


def test_terms_are_read_with_their_units() -> None:
    sla = Sla.parse("ttft.p95<200ms, tpot.p95 < 0.03s,error.rate<0.1%")
    assert sla.terms == (Term("ttft", "p95", 0.2), Term("tpot", "p95", 0.03), Term("error", "rate", 0.001))
    assert str(sla) == "ttft.p95<200ms,tpot.p95<30ms,error.rate<0.1%"
    assert Sla.parse(str(sla)) == sla


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "1 to 16 terms"),
        ("fast", "not of the form"),
        ("ttft<200ms", "not of the form"),
        ("ttft.p95<200", "not of the form"),
        ("ttft.p95>200ms", "not of the form"),
        ("ttft.p95<200ms,", "not of the form"),
        ("latency.p95<1s", "choose one of ttft"),
        ("ttft.p42<1s", "choose one of p50"),
        ("ttft.p95<5%", "needs a time"),
        ("ttft.p95<0ms", "above 0"),
        ("error.p95<1%", "error.rate"),
        ("ttft.p95<1s,ttft.p95<2s", "twice"),
        (",".join(["ttft.p95<1s"] * 17), "1 to 16 terms"),
    ],
)
def test_what_cannot_be_read_is_named(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Sla.parse(text)


def test_levels_of_terms_and_what_they_give_together() -> None:
    sla = Sla.parse("ttft.p95<200ms,ttft.p99<1s,tpot.p95<30ms,error.rate<0.1%")
    assert [term.level for term in sla.terms] == [0.95, 0.99, 0.95, 0.999]
    assert sla.joint_floor == pytest.approx(1 - 0.05 - 0.01 - 0.05 - 0.001)
    assert sla.tightest("ttft") == 0.2
    assert sla.tightest("e2e") is None
    assert Sla.parse("ttft.mean<1s").joint_floor is None
    assert Sla.parse("itl.p95<1s,stall.max<2s").joint_floor is None


def test_a_percentile_is_over_all_arrivals() -> None:
    sla = Sla.parse("ttft.p95<200ms")
    assert sla.holds([timing(0.1)] * 95 + [timing(0.5)] * 5)
    assert not sla.holds([timing(0.1)] * 94 + [timing(0.5)] * 6)
    assert sla.holds([timing(0.1)] * 95 + [MISS] * 5)
    assert not sla.holds([timing(0.1)] * 94 + [MISS] * 6)
    assert sla.terms[0].value([timing(0.1)] * 94 + [MISS] * 6) == math.inf


def test_dropping_late_requests_does_not_help() -> None:
    late = [timing(0.1)] * 80 + [timing(0.9)] * 20
    dropped = [timing(0.1)] * 80 + [MISS] * 20
    for text in ("ttft.p90<200ms", "tpot.p90<20ms", "e2e.p95<1s", "itl.p99<20ms"):
        sla = Sla.parse(text)
        assert sla.attainment(dropped) <= sla.attainment(late)
        assert sla.holds(dropped) <= sla.holds(late)


def test_one_token_has_no_tpot_and_meets_any() -> None:
    sla = Sla.parse("tpot.p95<1ms")
    single = Timing(0.1, 0.1, 1)
    assert single.tpot_s is None
    assert sla.is_good(single)
    assert not sla.is_good(timing(0.1))


def test_a_stall_is_the_longest_gap() -> None:
    assert Sla.parse("stall.max<1s").holds([Timing(0.1, 1.0, 3, (0.1, 0.8))])
    assert not Sla.parse("stall.max<1s").holds([Timing(0.1, 2.0, 3, (0.1, 1.8))])


@given(st.lists(st.floats(0.001, 10.0) | st.none(), min_size=1, max_size=60), st.floats(0.001, 10.0))
def test_a_bound_that_holds_for_every_request_holds_for_every_statistic(
    ttfts: list[float | None], bound: float
) -> None:
    timings = [MISS if ttft is None else timing(ttft) for ttft in ttfts]
    for statistic in ("p50", "p90", "p95", "p99", "mean", "max"):
        sla = Sla((Term("ttft", statistic, bound),))
        if sla.attainment(timings) == 1.0:
            assert sla.holds(timings)
        if statistic == "max":
            assert sla.holds(timings) == (sla.attainment(timings) == 1.0)
