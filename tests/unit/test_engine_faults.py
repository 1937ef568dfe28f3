"""The blast wall: a failure at any point of one request leaves its neighbours byte-identical."""

from __future__ import annotations

import pytest
from engine_support import request, solo
from test_engine import INFO, Served

from setpoint.engine.events import Event
from setpoint.engine.plan import EntryResult, StepPlan, StepResult
from setpoint.errors import EngineDeadError, EngineError
from setpoint.runtime.fake import FakeRunner

POINTS = ["schedule", "allocate", "prepare", "forward", "sample", "commit", "deliver"]
NEIGHBOURS = [request(f"good{number}", range(number, number + 7), max_tokens=6, seed=number) for number in range(3)]


class Injected(RuntimeError):
    pass


class Faults:
    """Raises at one point for requests called `bad...`, from the given visit on."""

    def __init__(self, point: str, first_visit: int = 0) -> None:
        self.point = point
        self.visits = -first_visit
        self.raised = 0

    def __call__(self, point: str, request_id: str) -> None:
        if point == self.point and request_id.startswith("bad"):
            self.visits += 1
            if self.visits > 0:
                self.raised += 1
                raise Injected("prompt text that no client may see")


def check_neighbours(served: Served) -> None:
    served.wait_finished(*(item.request_id for item in NEIGHBOURS))
    for item in NEIGHBOURS:
        assert served.tokens(item.request_id) == solo(item, INFO)[item.request_id, 0]


@pytest.mark.parametrize("first_visit", [0, 1, 3])
@pytest.mark.parametrize("point", POINTS)
def test_a_failure_at_any_point_ends_one_request_only(point: str, first_visit: int) -> None:
    faults = Faults(point, first_visit)
    served = Served(faults=faults)
    for item in [*NEIGHBOURS[:2], request("bad", range(50, 58), max_tokens=8, n=2), NEIGHBOURS[2]]:
        served.engine.submit(item)
    served.engine.start()
    check_neighbours(served)
    served.wait(lambda: served.last("bad", 0) is not None and served.last("bad", 1) is not None)
    assert faults.raised > 0
    for index in range(2):
        last = served.last("bad", index)
        assert last is not None
        assert last.finish_reason == "error"
        assert isinstance(last.error, EngineError)
        assert "prompt text" not in str(last.error)
        assert isinstance(last.error.__cause__, Injected)
    assert served.engine.is_alive
    assert served.engine.stats().num_engine_failures == 0
    assert served.engine.drain(5.0)
    served.scheduler.check_integrity()
    assert served.engine.stats().kv_usage == 0.0
    served.engine.shutdown()


def test_a_failure_in_validation_is_raised_to_the_caller_alone() -> None:
    served = Served(faults=Faults("validate"))
    served.engine.start()
    with pytest.raises(EngineError) as failure:
        served.engine.submit(request("bad", range(4)))
    assert "prompt text" not in str(failure.value)
    for item in NEIGHBOURS:
        served.engine.submit(item)
    check_neighbours(served)
    served.engine.shutdown()
    assert served.scheduler.queue.num_requests == 0


def test_many_poisonous_requests_do_not_end_the_engine() -> None:
    """Each fails alone in its step; the probe shows that the runner still works."""
    served = Served(faults=Faults("forward"))
    served.engine.start()
    for number in range(6):
        served.engine.submit(request(f"bad{number}", range(4)))
        served.wait_finished(f"bad{number}")
    assert served.engine.is_alive
    for item in NEIGHBOURS:
        served.engine.submit(item)
    check_neighbours(served)
    served.engine.shutdown()


class Broken(FakeRunner):
    """Raises in the given calls to execute; None = in all."""

    def __init__(self, calls: set[int] | None) -> None:
        super().__init__(INFO)
        self.calls = calls
        self.count = 0

    def execute(self, plan: StepPlan) -> StepResult:
        self.count += 1
        if self.calls is None or self.count in self.calls:
            raise MemoryError("0xdeadbeef /home/secret")
        return super().execute(plan)


def test_a_failure_that_passes_costs_nobody_anything() -> None:
    served = Served(Broken({2, 7}))  # two whole steps; each entry works when it is tried alone
    for item in NEIGHBOURS:
        served.engine.submit(item)
    served.engine.start()
    check_neighbours(served)
    assert served.engine.stats().counters.finished["error"] == 0
    served.engine.shutdown()


def test_a_runner_that_computes_nothing_ends_the_engine_after_three_steps() -> None:
    now = [0.0]
    served = Served(Broken(None), clock=lambda: now[0])
    served.engine.start()
    for number in range(3):
        assert served.engine.is_alive
        served.engine.submit(request(f"a{number}", range(4)))
        served.wait_finished(f"a{number}")
        now[0] += 10.0
    served.engine._thread.join(10.0)  # type: ignore[union-attr]
    assert not served.engine.is_alive
    assert "MemoryError" in (served.engine.dead_reason or "")
    assert "0x" not in (served.engine.dead_reason or "")
    with pytest.raises(EngineDeadError):
        served.engine.submit(request("late", range(4)))
    assert {event.finish_reason for event in served.events} == {"error"}
    served.engine.shutdown()
    assert served.runner.closed


def test_failures_far_apart_are_survived() -> None:
    now = [0.0]
    served = Served(Broken(None), clock=lambda: now[0])
    served.engine.start()
    for number in range(6):
        served.engine.submit(request(f"a{number}", range(4)))
        served.wait_finished(f"a{number}")
        now[0] += 40.0
    assert served.engine.is_alive
    assert served.engine.stats().num_engine_failures == 6
    served.engine.shutdown()


def test_what_waits_when_the_engine_dies_gets_its_error() -> None:
    served = Served(Broken(None), limits={"max_num_seqs": 1})
    for number in range(8):
        served.engine.submit(request(str(number), range(4)))
    served.engine.start()
    served.wait_finished(*map(str, range(8)))
    errors = [served.last(str(number)) for number in range(8)]
    assert all(last is not None and last.finish_reason == "error" for last in errors)
    assert sum(last is not None and isinstance(last.error, EngineDeadError) for last in errors) == 5
    served.engine.shutdown()


@pytest.mark.parametrize("method", ["schedule", "commit"])
def test_a_scheduler_that_fails_as_a_whole_fails_what_runs_and_goes_on(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = Served()
    calls = [0]
    original = getattr(served.scheduler, method)

    def flaky(*arguments: object) -> object:
        calls[0] += 1
        if calls[0] == 3:
            raise Injected
        return original(*arguments)

    monkeypatch.setattr(served.scheduler, method, flaky)
    served.engine.submit(request("running", range(4), max_tokens=20))
    served.engine.start()
    served.wait_finished("running")
    last = served.last("running")
    assert last is not None
    assert isinstance(last.error, EngineError)
    for item in NEIGHBOURS:
        served.engine.submit(item)
    check_neighbours(served)
    served.engine.shutdown()


def test_a_front_end_that_takes_nothing_ends_its_requests_and_not_the_loop() -> None:
    served = Served()
    deliver = served.deliver
    refusing = [True]

    def deaf(events: list[Event]) -> None:
        if refusing[0]:
            raise Injected
        deliver(events)

    served.engine._delivery.deliver = deaf
    served.engine.submit(request("lost", range(4), max_tokens=50))
    served.engine.start()
    assert served.engine.drain(10.0)
    refusing[0] = False
    assert served.engine.is_alive
    assert not served.scheduler.has_work
    served.engine.shutdown()


def test_a_result_with_an_error_fails_that_entry_only() -> None:
    class Picky(FakeRunner):
        def execute(self, plan: StepPlan) -> StepResult:
            result = super().execute(plan)
            return StepResult(
                tuple(
                    EntryResult(error=ValueError("nan")) if entry.start == 0 and entry.token_ids[0] == 50 else one
                    for entry, one in zip(plan.entries, result.entries, strict=True)
                )
            )

    served = Served(Picky(INFO))
    served.engine.submit(request("bad", range(50, 54), max_tokens=4))
    for item in NEIGHBOURS:
        served.engine.submit(item)
    served.engine.start()
    check_neighbours(served)
    last = served.last("bad")
    assert last is not None
    assert last.finish_reason == "error"
    served.engine.shutdown()


def test_a_loop_that_ends_by_itself_is_not_alive() -> None:
    class Exiting(FakeRunner):
        def execute(self, plan: StepPlan) -> StepResult:
            raise SystemExit

    served = Served(Exiting(INFO))
    served.engine.submit(request("a", range(4)))
    served.engine.start()
    served.wait_finished("a")
    last = served.last("a")
    assert last is not None
    assert isinstance(last.error, EngineDeadError)
    assert not served.engine.is_alive
    served.engine.shutdown()
