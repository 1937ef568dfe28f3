"""Replay equivalence with a real model: what the engine's thread did is planned again, step by step, without it."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from engine_support import AlwaysDraft

from forward import open_runner
from setpoint.engine.engine import Engine
from setpoint.engine.events import Event
from setpoint.engine.plan import RunnerInfo
from setpoint.engine.request import Request
from setpoint.engine.sampling import SamplingParams
from setpoint.engine.scheduler import Scheduler, SchedulerLimits
from setpoint.tune.simulate.recording import RecordedScheduler, replay
from tiny_models import VOCABULARY


def parrot(token_ids: list[int], max_drafts: int) -> list[int]:
    """What followed the last token when it occurred before."""
    for start in range(len(token_ids) - 2, -1, -1):
        if token_ids[start] == token_ids[-1]:
            return token_ids[start + 1 : start + 1 + max_drafts]
    return []


def make(kind: type[Scheduler], info: RunnerInfo, *, drafts: bool, prefix_caching: bool) -> Scheduler:
    return kind(
        info,
        SchedulerLimits(max_num_seqs=6, max_num_batched_tokens=48, max_drafts=4 if drafts else 0),
        enable_prefix_caching=prefix_caching,
        seed=0,
        speculator=AlwaysDraft(parrot) if drafts else None,
    )


def requests() -> list[Request]:
    """Enough to preempt; prompts that share a beginning, and that repeat themselves so that guesses are right."""
    rng = np.random.default_rng(1)
    shared = [int(token) for token in rng.integers(0, VOCABULARY, 40)]
    made = []
    for number in range(16):
        own = [int(token) for token in rng.integers(0, VOCABULARY, int(rng.integers(4, 40)))]
        prompt = shared + own if number % 2 else (own * 3)[:90]
        params = SamplingParams(temperature=0.0 if number % 3 else 0.8, max_tokens=40, ignore_eos=True, seed=number)
        made.append(Request(f"r{number}", prompt, params))
    return made


def tokens(events: Sequence[Event]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for event in events:
        assert event.error is None
        found.setdefault(event.request_id, []).extend(event.token_ids)
    return found


@pytest.mark.parametrize(("drafts", "prefix_caching"), [(False, True), (True, True), (True, False), (False, False)])
def test_a_real_run_is_planned_again(drafts: bool, prefix_caching: bool, tiny_llama: Path) -> None:
    runner = open_runner(tiny_llama, max_model_len=256, kv_cache_memory_bytes=27 * 4608, max_num_seqs=6)
    info = runner.info
    scheduler = make(RecordedScheduler, info, drafts=drafts, prefix_caching=prefix_caching)
    assert isinstance(scheduler, RecordedScheduler)
    recording = scheduler.record()
    delivered: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
    engine = Engine(scheduler, runner, delivered.put)
    engine.start()
    for item in requests():  # while it runs: some arrive between two steps, some together
        engine.submit(item)
    assert engine.drain(60)
    engine.shutdown()
    events = [event for batch in iter(lambda: [] if delivered.empty() else delivered.get(), []) for event in batch]
    counters = scheduler.counters
    assert counters.preemptions > 0
    assert (counters.prefix_hits > 0) == prefix_caching
    assert (counters.speculation.draft_tokens > 0) == drafts
    replayed = replay(recording, lambda: make(Scheduler, info, drafts=drafts, prefix_caching=prefix_caching), info)
    assert (replayed.steps, replayed.diverged_at) == (len(recording.steps), None)
    assert tokens(replayed.events) == tokens(events)
