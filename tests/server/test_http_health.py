"""CR-6: probes tell whether the engine loop advances, cost the engine nothing, and do not fail during long work."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest
from house import House, completion, raw_request, until

from setpoint.engine.plan import StepPlan, StepResult
from setpoint.engine.scheduler import SchedulerLimits
from setpoint.runtime.fake import FakeRunner, fake_info

PATH = "/v1/completions"


class StuckRunner(FakeRunner):
    """Hangs in `execute` until it is let go: a kernel that never returns."""

    def __init__(self) -> None:
        super().__init__(fake_info(vocab_size=262, max_model_len=1024))
        self.free = threading.Event()
        self.free.set()

    def execute(self, plan: StepPlan) -> StepResult:
        self.free.wait()
        return super().execute(plan)


class BrokenRunner(FakeRunner):
    def __init__(self) -> None:
        super().__init__(fake_info(vocab_size=262, max_model_len=1024))

    def execute(self, plan: StepPlan) -> StepResult:
        raise RuntimeError("the device is gone")


def reasons(house: House, path: str) -> tuple[int, list[str]]:
    response = house.get(path)
    return response.status_code, response.json()["reasons"]


def test_all_good(house: House) -> None:
    for path in ("/startupz", "/livez", "/readyz", "/health", "/ping"):
        response = house.get(path)
        assert response.status_code == 200
        assert response.json() == {"status": "ok", "reasons": []}


def test_stuck_runner_is_not_live_and_recovers() -> None:
    runner = StuckRunner()
    with House(runner=runner, max_heartbeat_age_s=1.0) as house:
        runner.free.clear()
        sock = house.connect()
        sock.sendall(raw_request(PATH, json.dumps(completion(max_tokens=3, ignore_eos=True)).encode()))
        began = time.monotonic()
        until(lambda: house.get("/livez").status_code == 503)
        assert time.monotonic() - began < 3
        for path in ("/livez", "/readyz", "/health", "/ping"):
            assert reasons(house, path) == (503, ["engine_stuck"])
            assert int(house.get(path).headers["retry-after"]) >= 1
        assert reasons(house, "/startupz") == (200, [])
        assert house.metrics()['setpoint_engine_heartbeat_age_seconds{engine="0",model_name="tiny"}'] > 1
        runner.free.set()
        assert sock.recv(4096).startswith(b"HTTP/1.1 200")
        sock.close()
        until(lambda: house.get("/livez").status_code == 200)


def test_dead_engine() -> None:
    with House(runner=BrokenRunner()) as house:
        statuses = {house.post(PATH, completion(max_tokens=1)).status_code for _ in range(6)}
        assert statuses <= {500, 503}
        until(lambda: not house.engine.is_alive)
        assert reasons(house, "/livez") == (503, ["engine_dead"])
        refused = house.post(PATH, completion())
        assert refused.status_code == 503
        assert refused.json()["error"]["reason"] == "not_ready"
        assert int(refused.headers["retry-after"]) >= 1


def test_long_prefill_and_idle_hours_are_alive() -> None:
    """A prompt of many chunks keeps the engine busy for longer than the limit; the heartbeat goes on."""
    limits = SchedulerLimits(max_num_batched_tokens=16)
    with House(step_s=0.05, limits=limits, max_heartbeat_age_s=0.8) as house:
        seen: list[int] = []
        done = threading.Event()

        def probe() -> None:
            with house.client() as client:
                while not done.wait(0.02):
                    seen.append(client.get("/livez").status_code)

        thread = threading.Thread(target=probe)
        thread.start()
        assert house.post(PATH, completion("x" * 600, max_tokens=1)).status_code == 200
        time.sleep(1.2)  # idle for longer than the limit
        done.set()
        thread.join()
        assert len(seen) > 20
        assert set(seen) == {200}


def test_probes_do_no_engine_work(house: House) -> None:
    steps, waiting = house.runner.num_steps, house.engine.stats().counters.prompt_tokens
    with house.client() as client:
        for _ in range(300):
            client.get("/readyz")
    assert house.runner.num_steps == steps
    assert house.engine.stats().counters.prompt_tokens == waiting


def test_full_queue_is_still_ready() -> None:
    with House(limits=SchedulerLimits(max_num_seqs=1, max_num_queued_reqs=1), step_s=0.02) as house:
        socks = [house.connect() for _ in range(3)]
        for sock in socks:
            sock.sendall(raw_request(PATH, json.dumps(completion(max_tokens=100, ignore_eos=True)).encode()))
            until(lambda: house.engine.stats().num_running == 1)  # the first runs, the second waits, the third is late
        until(lambda: house.engine.stats().num_waiting == 1)
        assert reasons(house, "/readyz") == (200, [])
        for sock in socks:
            sock.close()


def test_draining_is_not_ready_but_live() -> None:
    with House(step_s=0.02) as house, house.client() as client:
        thread = threading.Thread(target=lambda: client.post(PATH, json=completion(max_tokens=60, ignore_eos=True)))
        thread.start()
        until(lambda: house.server.admission.num_active == 1)
        house.server.drain()
        assert reasons(house, "/readyz") == (503, ["draining"])
        assert reasons(house, "/livez") == (200, [])
        refused = house.post(PATH, completion())
        assert (refused.status_code, refused.json()["error"]["reason"]) == (503, "draining")
        assert int(refused.headers["retry-after"]) >= 1
        thread.join()


@pytest.mark.parametrize("body", [b"", b"{}", b"x" * 1000])
def test_probes_with_a_body(house: House, body: bytes) -> None:
    def get(content: Any) -> int:
        with house.client() as client:
            return client.request("GET", "/livez", content=content).status_code

    assert get(body) == 200
