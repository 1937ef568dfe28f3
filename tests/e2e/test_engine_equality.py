"""Law 1 through the scheduler: cached = preempted = batched = chunked = alone, with the real runner.

Compared are token ids and the log-probabilities of the 20 most likely tokens at every position, bit for bit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forward import open_runner
from setpoint.engine.events import Event
from setpoint.engine.request import Request
from setpoint.engine.sampling import SamplingParams
from setpoint.engine.scheduler import Scheduler, SchedulerLimits
from setpoint.engine.speculation.draft_model import DraftModel
from setpoint.engine.speculation.prompt_lookup import PromptLookup
from setpoint.engine.speculation.speculator import Speculator
from setpoint.engine.speculation.suffix import CorpusSuffix, SessionSuffix
from setpoint.models import build_model
from setpoint.runtime.cpu.kv_layout import group_shapes
from setpoint.runtime.cpu.runner import CpuRunner
from tiny_models import VOCABULARY, TinyModel

Outcome = dict[tuple[str, int], list[tuple[Any, ...]]]


def generate(
    runner: CpuRunner,
    requests: Sequence[Request],
    *,
    prefix_caching: bool = True,
    speculator: Speculator | None = None,
    **limits: int,
) -> tuple[Outcome, Scheduler]:
    """Run requests to their end; per (request, choice) the tokens with every log-probability that was reported."""
    scheduler = Scheduler(
        runner.info,
        SchedulerLimits(**limits),
        enable_prefix_caching=prefix_caching,
        seed=0,
        speculator=speculator,
    )
    for item in requests:
        scheduler.add(item, 0.0)
    outcome: Outcome = defaultdict(list)
    step = 0
    while scheduler.has_work:
        plan = scheduler.schedule(float(step))
        for event in scheduler.commit(plan, runner.execute(plan), step + 0.5):  # all steps take the same time
            outcome[event.request_id, event.index].extend(readings(event))
        step += 1
        assert step < 20000
    scheduler.check_integrity()
    return outcome, scheduler


def readings(event: Event) -> list[tuple[Any, ...]]:
    assert event.error is None
    assert event.logprobs is not None
    return [(p.token_id, p.logprob, p.rank, tuple(p.top_ids), tuple(p.top_logprobs)) for p in event.logprobs]


def request(name: str, prompt: Sequence[int], **params: Any) -> Request:
    defaults: dict[str, Any] = {"max_tokens": 24, "temperature": 0.0, "logprobs": 20, "ignore_eos": True}
    return Request(name, list(prompt), SamplingParams(**(defaults | params)))


def mixed_requests(count: int, seed: int) -> list[Request]:
    """Prompts of all lengths, some sharing a prefix; greedy and seeded sampling with every processor."""
    rng = np.random.default_rng(seed)
    shared = [int(t) for t in rng.integers(0, VOCABULARY, 40)]
    requests = []
    for number in range(count):
        prompt = [int(t) for t in rng.integers(0, VOCABULARY, int(rng.integers(1, 70)))]
        if number % 3 == 0:
            prompt = shared + prompt[:9]
        params: dict[str, Any] = {}
        if number % 2:
            params = {"temperature": 0.9, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "seed": number, "n": 1 + number % 3}
        if number % 4 == 1:
            params |= {"presence_penalty": 0.5, "frequency_penalty": 0.3, "repetition_penalty": 1.1}
        if number % 5 == 2:
            params |= {"logit_bias": {5: 3.0, 9: -100.0}}
        requests.append(request(f"r{number}", prompt, max_tokens=int(rng.integers(2, 30)), **params))
    return requests


def alone(runner: CpuRunner, requests: Sequence[Request]) -> Outcome:
    """The oracle: each request by itself, without any cache."""
    outcome: Outcome = {}
    for item in requests:
        outcome |= generate(runner, [item], prefix_caching=False)[0]
    return outcome


@pytest.fixture
def runner(tiny_q8: Path) -> Any:
    opened = open_runner(tiny_q8)
    yield opened
    opened.close()


def test_batched(tiny: TinyModel, runner: CpuRunner) -> None:
    requests = mixed_requests(10, seed=1)
    assert generate(runner, requests, prefix_caching=False)[0] == alone(runner, requests)


@pytest.mark.parametrize("budget", [1, 7, 16, 50])
def test_chunked_by_any_token_budget(tiny: TinyModel, runner: CpuRunner, budget: int) -> None:
    requests = mixed_requests(6, seed=2)
    assert generate(runner, requests, max_num_batched_tokens=budget)[0] == alone(runner, requests)


def test_prefix_cached(tiny: TinyModel, runner: CpuRunner) -> None:
    """The second round finds its prompts, and the answers of the first, in the cache."""
    requests = mixed_requests(8, seed=3)
    oracle = alone(runner, requests)
    scheduler = Scheduler(runner.info, SchedulerLimits(), seed=0)
    for turn in range(3):
        outcome: Outcome = defaultdict(list)
        for item in requests:
            scheduler.add(Request(f"{item.request_id}-{turn}", item.prompt_token_ids, item.params), 0.0)
        cached = 0
        while scheduler.has_work:
            plan = scheduler.schedule(0.0)
            for event in scheduler.commit(plan, runner.execute(plan), 0.0):
                outcome[event.request_id.rpartition("-")[0], event.index].extend(readings(event))
                cached += event.num_cached_tokens
        assert outcome == oracle
        assert turn == 0 or cached > 0
    scheduler.check_integrity()


def test_preempted(tiny: TinyModel, tiny_q8: Path) -> None:
    """A pool that holds only a fraction of the demand."""
    shapes = group_shapes(build_model(tiny.config), "f16", 112, 512)
    one_sequence = sum(shape.block_bytes * shape.max_blocks for shape in shapes)
    small = open_runner(tiny_q8, max_model_len=112, kv_cache_memory_bytes=one_sequence)
    try:
        requests = mixed_requests(8, seed=4)
        outcome, scheduler = generate(small, requests)
        grows = any(group.window is None for group in small.info.kv_groups)  # a small window is set aside at admission
        assert (scheduler.counters.preemptions > 0) == grows
    finally:
        small.close()
    large = open_runner(tiny_q8)
    assert outcome == alone(large, requests)
    large.close()


@pytest.mark.parametrize("budget", [9, 512])
def test_drafted_by_lookups(tiny: TinyModel, runner: CpuRunner, budget: int) -> None:
    """Rows cost nothing by this clock, so whatever is guessed is verified."""
    requests = mixed_requests(8, seed=6)
    speculator = Speculator([SessionSuffix(), CorpusSuffix(), PromptLookup()])
    twice = [*requests, *(replace(item, request_id=f"{item.request_id} again") for item in requests)]
    limits = {"max_drafts": 8, "max_num_batched_tokens": budget, "max_num_seqs": 8}
    outcome, scheduler = generate(runner, twice, speculator=speculator, **limits)
    oracle = alone(runner, requests)
    assert outcome == oracle | {(f"{name} again", index): output for (name, index), output in oracle.items()}
    assert scheduler.counters.speculation.accepted_tokens > 0


def test_drafted_by_a_model(tiny: TinyModel, runner: CpuRunner, tiny_q8: Path) -> None:
    """The same weights guess: every greedy draft is right, drawn ones too, as both draw with the same seed."""
    requests = mixed_requests(6, seed=7)
    small = open_runner(tiny_q8)
    model = DraftModel(small, small.info, cost_share=0.01)  # short outputs must pay for reading their prompts
    ticks = iter(range(10**9))
    speculator = Speculator([], model, clock=lambda: next(ticks) * 1e-6)
    outcome, scheduler = generate(runner, requests, speculator=speculator, max_drafts=5, max_num_batched_tokens=64)
    assert outcome == alone(runner, requests)
    totals = scheduler.counters.speculation
    assert totals.accepted_tokens > 0.9 * totals.draft_tokens > 0
    model.check_integrity()
    speculator.close()


@pytest.mark.parametrize("model", ["smollm2_path", "gemma3_path"])
def test_a_real_model(model: str, request: pytest.FixtureRequest) -> None:
    runner = open_runner(
        request.getfixturevalue(model), max_model_len=1024, max_num_seqs=32, kv_cache_memory_bytes=512 << 20
    )
    requests = mixed_requests(8, seed=5)
    oracle = alone(runner, requests)
    assert generate(runner, requests, max_num_batched_tokens=48)[0] == oracle
    speculator = Speculator([SessionSuffix(), CorpusSuffix(), PromptLookup()])
    drafted, scheduler = generate(runner, requests, speculator=speculator, max_drafts=8)
    assert drafted == oracle
    assert scheduler.counters.speculation.accepted_tokens > 0
    runner.close()
