"""The engine thread: submit, stream, abort, drain, shut down, and tell the truth meanwhile."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from engine_support import request, solo

from setpoint.engine.engine import Engine
from setpoint.engine.events import Event
from setpoint.engine.plan import StepPlan, StepResult
from setpoint.engine.scheduler import Scheduler, SchedulerLimits
from setpoint.errors import EngineDeadError, EngineError, QueueFullError, RequestError
from setpoint.runtime.fake import FakeRunner, fake_info

INFO = fake_info(num_blocks=64, block_size=4, max_model_len=128)
PATIENCE_S = 20.0


class GatedRunner(FakeRunner):
    """Stops before each step while `gate` is cleared."""

    def __init__(self) -> None:
        super().__init__(INFO)
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def execute(self, plan: StepPlan) -> StepResult:
        self.entered.set()
        assert self.gate.wait(PATIENCE_S)
        return super().execute(plan)


class Served:
    """An engine with everything it delivered."""

    def __init__(self, runner: FakeRunner | None = None, **fields: Any) -> None:
        self.runner = runner or FakeRunner(INFO)
        limits = SchedulerLimits(**fields.pop("limits", {}))
        self.scheduler = Scheduler(INFO, limits)
        self.events: list[Event] = []
        self.batches: list[list[Event]] = []
        self._changed = threading.Condition()
        self.engine = Engine(self.scheduler, self.runner, self.deliver, **fields)

    def deliver(self, events: list[Event]) -> None:
        with self._changed:
            self.batches.append(events)
            self.events += events
            self._changed.notify_all()

    def wait(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, PATIENCE_S)

    def wait_finished(self, *names: str) -> None:
        self.wait(lambda: all(self.last(name) is not None for name in names))

    def last(self, name: str, index: int = 0) -> Event | None:
        ends = [
            event
            for event in list(self.events)
            if (event.request_id, event.index) == (name, index) and event.finish_reason is not None
        ]
        assert len(ends) <= 1
        return ends[0] if ends else None

    def tokens(self, name: str) -> list[int]:
        return [token for event in self.events if event.request_id == name for token in event.token_ids]


@pytest.fixture
def served() -> Iterator[Served]:
    each = Served()
    each.engine.start()
    yield each
    each.engine.shutdown()


@pytest.fixture
def gated() -> Iterator[Served]:
    each = Served(GatedRunner(), limits={"max_num_queued_reqs": 3})
    each.engine.start()
    yield each
    each.runner.gate.set()  # type: ignore[attr-defined]
    each.engine.shutdown()


def hold(gated: Served, name: str = "held", **fields: Any) -> GatedRunner:
    """Submit a request and stop the runner inside its first step."""
    runner = gated.runner
    assert isinstance(runner, GatedRunner)
    runner.gate.clear()
    runner.entered.clear()
    gated.engine.submit(request(name, range(9), **{"max_tokens": 50, **fields}))
    assert runner.entered.wait(PATIENCE_S)
    return runner


def test_many_clients_at_once_each_get_their_solo_output(served: Served) -> None:
    items = [request(f"r{number}", range(number, number + 9), max_tokens=12, seed=number) for number in range(24)]

    def client(mine: list[Any]) -> None:
        for item in mine:
            served.engine.submit(item)

    threads = [threading.Thread(target=client, args=(items[start::4],)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    served.wait_finished(*(item.request_id for item in items))
    for item in items:
        assert served.tokens(item.request_id) == solo(item, INFO)[item.request_id, 0]


def test_clients_that_leave_at_any_time_cost_the_others_nothing(served: Served) -> None:
    items = [request(f"r{number}", range(number % 7, 20), max_tokens=20, seed=number) for number in range(48)]
    left: set[str] = set()

    def client(mine: list[Any], seed: int) -> None:
        rng = random.Random(seed)
        for item in mine:
            served.engine.submit(item)
            if rng.random() < 0.6:
                time.sleep(rng.choice([0.0, 0.0, 0.001, 0.005]))
                left.add(item.request_id)
                served.engine.abort(item.request_id)

    threads = [threading.Thread(target=client, args=(items[start::4], start)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    served.wait_finished(*(item.request_id for item in items))
    assert served.engine.drain(PATIENCE_S)
    for item in items:
        expected = solo(item, INFO)[item.request_id, 0]
        got = served.tokens(item.request_id)
        assert got == (expected[: len(got)] if item.request_id in left else expected)
    served.scheduler.check_integrity()
    assert (served.engine.stats().kv_blocks_leaked, served.scheduler.queue.num_requests) == (0, 0)


def test_events_of_a_step_come_in_one_batch(gated: Served) -> None:
    runner = hold(gated, max_tokens=3)
    gated.engine.submit(request("b", range(5), max_tokens=3))
    gated.engine.submit(request("c", range(6), max_tokens=3))
    runner.gate.set()
    gated.wait_finished("held", "b", "c")
    assert max(len(batch) for batch in gated.batches) == 3
    assert all(len({(event.request_id, event.index) for event in batch}) == len(batch) for batch in gated.batches)


def test_submit_refuses_on_the_callers_thread(gated: Served) -> None:
    engine = gated.engine
    with pytest.raises(RequestError):
        engine.submit(request("a", []))
    hold(gated)
    with pytest.raises(RequestError, match="in use"):
        engine.submit(request("held", range(4)))
    for name in ("a", "b", "c"):
        engine.submit(request(name, range(4)))
    with pytest.raises(RequestError, match="in use"):
        engine.submit(request("a", range(4)))
    with pytest.raises(QueueFullError):
        engine.submit(request("d", range(4)))
    with pytest.raises(QueueFullError):
        engine.check_admission()
    stats = engine.stats()
    assert stats.rejected == {"invalid": 3, "queue_full": 2, "draining": 0}
    assert (stats.num_running, stats.num_waiting, stats.num_queued_requests) == (1, 3, 3)


def test_abort_before_the_engine_saw_the_request(gated: Served) -> None:
    runner = hold(gated)
    gated.engine.submit(request("queued", range(4), max_tokens=4))
    gated.engine.abort("queued")
    gated.engine.abort("never heard of")
    runner.gate.set()
    gated.wait_finished("queued")
    assert gated.tokens("queued") == []
    gated.engine.abort("held")
    gated.wait_finished("held")
    assert gated.scheduler.counters.aborted_by_state["waiting"] == 1


def test_abort_while_computing_frees_the_blocks_within_two_steps(gated: Served) -> None:
    runner = hold(gated, max_tokens=100)
    gated.engine.abort("held")
    steps = runner.num_steps
    runner.gate.set()
    gated.wait_finished("held")
    assert runner.num_steps <= steps + 2
    assert gated.engine.stats().kv_usage == 0.0
    assert gated.engine.stats().kv_blocks_leaked == 0


def test_one_sequence_of_several_may_be_aborted(served: Served) -> None:
    item = request("a", range(9), max_tokens=100, n=3)
    served.engine.submit(item)
    served.wait(lambda: bool(served.tokens("a")))
    served.engine.abort("a", 1)
    served.wait(lambda: served.last("a", 1) is not None)
    served.wait(lambda: served.last("a", 0) is not None and served.last("a", 2) is not None)
    reasons = [event.finish_reason for index in range(3) if (event := served.last("a", index))]
    assert reasons[1] in ("abort", "length")
    assert (reasons[0], reasons[2]) == ("length", "length")


def test_drain_finishes_what_was_accepted_and_refuses_the_rest(gated: Served) -> None:
    runner = hold(gated, max_tokens=5)
    gated.engine.submit(request("queued", range(4), max_tokens=5))
    result: list[bool] = []
    drainer = threading.Thread(target=lambda: result.append(gated.engine.drain(PATIENCE_S)))
    drainer.start()
    while not gated.engine.is_draining:
        time.sleep(0.001)
    with pytest.raises(EngineDeadError, match="draining"):
        gated.engine.submit(request("late", range(4)))
    runner.gate.set()
    drainer.join(PATIENCE_S)
    assert result == [True]
    for name in ("held", "queued"):
        last = gated.last(name)
        assert last is not None
        assert last.finish_reason == "length"
    assert gated.engine.is_alive
    assert gated.engine.stats().rejected["draining"] == 1


def test_drain_aborts_with_events_what_does_not_finish_in_time() -> None:
    served = Served(FakeRunner(INFO, step_s=0.01), limits={"max_num_seqs": 1})
    served.engine.start()
    for name in ("a", "b"):
        served.engine.submit(request(name, range(4), max_tokens=100))
    assert not served.engine.drain(0.05)
    for name in ("a", "b"):
        last = served.last(name)
        assert last is not None
        assert last.finish_reason == "abort"
    served.engine.shutdown()


@pytest.mark.parametrize("start", [True, False])
def test_shutdown_ends_every_request_and_the_runner(start: bool) -> None:
    served = Served()
    if start:
        served.engine.start()
    for number in range(4):
        served.engine.submit(request(str(number), range(4), max_tokens=100))
    served.engine.shutdown()
    served.engine.shutdown()
    assert all(served.last(str(number)) is not None for number in range(4))
    assert served.runner.closed
    with pytest.raises(EngineDeadError):
        served.engine.submit(request("late", range(4)))
    served.engine.abort("0")
    thread = served.engine._thread
    assert thread is None or not thread.is_alive()


def test_an_engine_starts_once(served: Served) -> None:
    with pytest.raises(EngineError):
        served.engine.start()


def test_the_heartbeat_goes_on_while_idle_and_stops_while_stuck(gated: Served) -> None:
    engine = gated.engine
    first = engine._loop.heartbeat
    deadline = time.monotonic() + PATIENCE_S
    while engine._loop.heartbeat == first and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine._loop.heartbeat > first
    hold(gated)
    stuck = engine._loop.heartbeat
    age = engine.heartbeat_age_s()
    time.sleep(0.05)
    assert engine._loop.heartbeat == stuck
    assert engine.heartbeat_age_s() > age


def test_stats_count_what_happened(served: Served) -> None:
    served.engine.submit(request("a", range(9), max_tokens=3))
    served.wait_finished("a")
    served.engine.submit(request("b", range(9), max_tokens=2))
    served.wait_finished("b")
    stats = served.engine.stats()
    counters = stats.counters
    assert (counters.prompt_tokens, counters.prompt_tokens_cached, counters.generation_tokens) == (18, 8, 5)
    assert counters.finished == {"stop": 0, "length": 2, "abort": 0, "error": 0}
    assert (stats.num_running, stats.num_waiting, stats.kv_usage, stats.oldest_queue_age_s) == (0, 0, 0.0, 0.0)
    assert stats.is_alive
    assert counters is not served.scheduler.counters


def test_limits_are_those_of_the_model_and_the_pool(served: Served) -> None:
    assert (served.engine.limits.vocab_size, served.engine.limits.max_model_len) == (256, 128)
