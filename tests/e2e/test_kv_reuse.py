"""Law 1 through the tiers: cold = warm = restored from memory = restored from disk in another process. Bit for bit.

Compared are token ids and the log-probabilities of the 20 most likely tokens at every position.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forward import open_runner
from setpoint.engine.blast_wall import execute_isolated
from setpoint.engine.disk_store import DiskStore, open_directory
from setpoint.engine.disk_tier import DiskTier
from setpoint.engine.events import Event
from setpoint.engine.lower_tiers import LowerTiers
from setpoint.engine.request import Request
from setpoint.engine.sampling import SamplingParams
from setpoint.engine.scheduler import Scheduler, SchedulerLimits
from setpoint.loaders.checkpoint import open_checkpoint
from setpoint.models import build_model
from setpoint.runtime.cpu.kv_layout import group_shapes
from setpoint.runtime.cpu.runner import CpuRunner
from tiny_models import VOCABULARY, TinyModel

Outcome = dict[tuple[str, int], list[tuple[Any, ...]]]


def readings(event: Event) -> list[tuple[Any, ...]]:
    assert event.error is None
    assert event.logprobs is not None
    return [(p.token_id, p.logprob, p.rank, tuple(p.top_ids), tuple(p.top_logprobs)) for p in event.logprobs]


class Served:
    """One process's worth of scheduler and tiers over a runner."""

    def __init__(
        self, runner: CpuRunner, *, host_bytes: int = 0, path: Path | None = None, prefix_caching: bool = True
    ) -> None:
        self.runner = runner
        self.disk = None
        secret = None
        if path is not None:
            secret = open_directory(path)
            files = DiskStore(path, secret, runner.kv_fingerprint(), 1 << 30, reserved_bytes=0)
            self.disk = DiskTier(files, [group.block_bytes for group in runner.info.kv_groups])
            assert self.disk.wait_until_scanned(10)
        lower = LowerTiers(runner.info, host_bytes=host_bytes, disk=self.disk, secret=secret)
        self.scheduler = Scheduler(
            runner.info, SchedulerLimits(), seed=0, lower=lower, enable_prefix_caching=prefix_caching
        )

    def generate(self, requests: Sequence[Request]) -> Outcome:
        outcome: Outcome = defaultdict(list)
        for item in requests:
            self.scheduler.add(item, time.monotonic())
        deadline = time.monotonic() + 120
        while self.scheduler.has_work:
            assert time.monotonic() < deadline
            for event in self.step():
                outcome[event.request_id, event.index].extend(readings(event))
        self.scheduler.check_integrity()
        return outcome

    def step(self) -> Any:
        plan = self.scheduler.schedule(time.monotonic())
        result, error = execute_isolated(self.runner, plan)
        assert error is None
        return self.scheduler.commit(plan, result, time.monotonic())

    def end(self) -> None:
        while self.scheduler.num_unsaved:
            self.step()
        if self.disk is not None:
            self.disk.close(30)

    @property
    def num_restored(self) -> int:
        return self.scheduler.counters.prompt_tokens_restored


def alone(runner: CpuRunner, requests: Sequence[Request]) -> Outcome:
    """The oracle: each request by itself, without any cache."""
    outcome: Outcome = {}
    for item in requests:
        outcome |= Served(runner, prefix_caching=False).generate([item])
    return outcome


def conversations(count: int, length: int) -> list[Request]:
    rng = np.random.default_rng(11)
    shared = [int(token) for token in rng.integers(0, VOCABULARY, length // 2)]
    requests = []
    for number in range(count):
        own = [int(token) for token in rng.integers(0, VOCABULARY, length // 2 + number)]
        params = {"temperature": 0.9, "seed": number, "n": 2} if number % 2 else {}
        sampling = SamplingParams(**{"max_tokens": 8, "temperature": 0.0, "logprobs": 20, "ignore_eos": True, **params})
        requests.append(Request(f"r{number}", shared + own, sampling))
    return requests


def small_pool(path: Path, max_model_len: int) -> CpuRunner:
    """One that holds about one and a half sequences."""
    shapes = group_shapes(build_model(open_checkpoint(path).config), "s16", max_model_len, 512)
    one = sum(shape.block_bytes * shape.max_blocks for shape in shapes)
    return open_runner(path, max_model_len=max_model_len, kv_cache_memory_bytes=one * 3 // 2)


def test_a_tiny_model_of_every_family(tiny: TinyModel, tiny_q8: Path, tmp_path: Path) -> None:
    requests = conversations(5, 120)
    large = open_runner(tiny_q8)
    oracle = alone(large, requests)
    large.close()
    runner = small_pool(tiny_q8, 144)
    served = Served(runner, host_bytes=64 << 20)
    assert served.generate(requests) == oracle  # cold
    assert served.generate(requests) == oracle  # from memory, and from the pool
    assert served.num_restored > 0
    written = Served(runner, path=tmp_path / "kv")
    assert written.generate(requests) == oracle
    written.end()
    runner.close()
    second = open_runner(tiny_q8)
    restarted = Served(second, path=tmp_path / "kv")
    assert restarted.generate(requests) == oracle
    assert restarted.num_restored > 0
    restarted.end()
    second.close()


@pytest.mark.parametrize("model", ["smollm2_path", "gemma3_path"])
def test_a_real_model(model: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    path = request.getfixturevalue(model)
    requests = conversations(3, 700)  # past a split of the attention and past Gemma's window
    options: dict[str, Any] = {"max_model_len": 1024, "max_num_seqs": 8, "kv_cache_memory_bytes": 256 << 20}
    runner = open_runner(path, **options)
    oracle = alone(runner, requests)
    written = Served(runner, host_bytes=1 << 30, path=tmp_path / "kv")
    assert written.generate(requests) == oracle
    assert written.generate(requests) == oracle
    written.end()
    runner.close()
    second = open_runner(path, **options)
    restarted = Served(second, path=tmp_path / "kv")
    assert restarted.generate(requests) == oracle
    assert restarted.num_restored >= 1024
    restarted.end()
    second.close()
