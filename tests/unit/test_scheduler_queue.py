"""The bounded queue and the answer to those it refuses."""

from __future__ import annotations

import threading

import pytest

from setpoint.engine.queue_gate import MAX_RETRY_AFTER_S, QueueGate
from setpoint.errors import QueueFullError


def refusal(gate: QueueGate, now: float, num_tokens: int = 1) -> int:
    with pytest.raises(QueueFullError) as full:
        gate.enter(num_tokens, now)
    assert type(full.value.retry_after_s) is int
    return full.value.retry_after_s


def test_retry_after_is_the_time_the_queue_takes_to_drain() -> None:
    gate = QueueGate(max_requests=10, max_tokens=1000)
    for _ in range(10):
        gate.enter(1, 0.0)
    assert refusal(gate, 0.0) == 1  # nothing is known yet
    for second in range(1, 6):  # one a second leaves, one enters
        gate.leave(1, float(second))
        gate.enter(1, float(second))
    assert refusal(gate, 6.0) == 10


def test_retry_after_follows_the_rate_and_is_bounded() -> None:
    gate = QueueGate(max_requests=1000, max_tokens=10000)
    for _ in range(1000):
        gate.enter(1, 0.0)
    gate.leave(1, 0.0)
    gate.enter(1, 0.0)
    assert refusal(gate, 50.0) == MAX_RETRY_AFTER_S
    assert refusal(gate, 500.0) == 60  # nothing moved for a minute
    for step in range(100):
        gate.leave(1, 500.0 + step / 100)
        gate.enter(1, 500.0 + step / 100)
    assert refusal(gate, 501.0) == 10  # a thousand wait, about a hundred a second left


def test_tokens_are_bounded_too_but_an_empty_queue_takes_anything() -> None:
    gate = QueueGate(max_requests=10, max_tokens=100)
    gate.enter(500, 0.0)
    assert refusal(gate, 0.0) == 1
    gate.leave(500, 1.0)
    gate.enter(60, 1.0)
    refusal(gate, 1.0, num_tokens=41)
    gate.enter(40, 1.0)
    with pytest.raises(QueueFullError):
        gate.check(1.0)
    assert gate.num_refused == 3


def test_counts_are_exact_under_threads() -> None:
    gate = QueueGate(max_requests=50, max_tokens=10**9)
    refused = []

    def client() -> None:
        for _ in range(500):
            try:
                gate.enter(3, 0.0)
            except QueueFullError:
                refused.append(1)
            else:
                gate.leave(3, 0.0)

    threads = [threading.Thread(target=client) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (gate.num_requests, gate.num_tokens) == (0, 0)
    assert gate.num_refused == len(refused)
