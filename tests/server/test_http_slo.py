"""Targets of requests over HTTP: what is taken, refused by name and shed; what was decided can be read and repeated."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from house import House, completion

from setpoint.engine.scheduler import SchedulerLimits
from setpoint.engine.slo import HeldSla, Slo


@pytest.fixture(scope="module")
def held() -> Iterator[House]:
    limits = SchedulerLimits(max_num_seqs=4, max_num_batched_tokens=32)
    with House(held=HeldSla(Slo(0.25, 0.05)), step_s=0.02, limits=limits) as house:
        yield house


@pytest.mark.parametrize(
    ("slo", "status"),
    [
        ({"ttft_ms": 300, "tpot_ms": 40.5}, 200),
        ({"tpot_ms": 40}, 200),
        ("ttft.p95<300ms,tpot.p95<30ms", 200),
        ({}, 400),
        ({"ttft_ms": 0}, 400),
        ({"ttft_ms": 1e9}, 400),
        ({"e2e_ms": 5}, 400),
        ("e2e.p95<1s", 400),
        ("soon", 400),
        ("x" * 300, 400),
        (7, 400),
    ],
)
def test_a_request_names_its_targets(held: House, slo: Any, status: int) -> None:
    answer = held.post("/v1/completions", completion("hi", max_tokens=2, slo=slo))
    assert answer.status_code == status, answer.text
    assert "X-Setpoint-Ignored-Params" not in answer.headers
    if status == 400:
        assert answer.json()["error"]["param"].startswith("slo")


def test_a_header_says_the_same(held: House) -> None:
    body = completion("hi", max_tokens=2)
    good = held.post("/v1/completions", body, headers={"X-Setpoint-SLO": "ttft.p95<300ms"})
    assert good.status_code == 200
    bad = held.post("/v1/completions", body, headers={"X-Setpoint-SLO": "ttft"})
    assert (bad.status_code, bad.json()["error"]["param"]) == (400, "X-Setpoint-SLO")
    both = held.post("/v1/completions", body | {"slo": {"ttft_ms": 5}}, headers={"X-Setpoint-SLO": "ttft.p95<1s"})
    assert (both.status_code, both.json()["error"]["reason"]) == (400, "conflict")


def test_a_server_that_holds_nothing_says_so(house: House) -> None:
    answer = house.post("/v1/completions", completion("hi", max_tokens=2, slo={"ttft_ms": 300}))
    assert answer.status_code == 200
    assert answer.headers["X-Setpoint-Ignored-Params"] == "slo"
    assert house.get("/v1/setpoint/decisions").status_code == 404


def test_what_would_be_late_is_refused_with_a_time_to_come_back(held: House) -> None:
    def send(number: int) -> Any:
        return held.post("/v1/completions", completion([number % 200 + 1] * 300, max_tokens=3))

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(send, range(32)))
    refused = [answer for answer in answers if answer.status_code == 429]
    assert {answer.status_code for answer in answers} == {200, 429}
    for answer in refused:
        assert answer.json()["error"]["reason"] == "shed"
        assert 1 <= int(answer.headers["Retry-After"]) <= 600
    figures = held.metrics()
    shed = [value for name, value in figures.items() if name.startswith("setpoint_slo_shed_total")]
    assert sum(shed) >= len(refused)
    assert any(name.startswith("setpoint_slo_attainment") for name in figures)
    kinds = [decision["kind"] for decision in held.get("/v1/setpoint/decisions").json()["data"]]
    assert {"step", "arrival"} >= set(kinds)
    assert "step" in kinds
    assert held.engine.stats().rejected["shed"] >= len(refused)
