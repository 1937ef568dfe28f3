"""At a temperature, drafts leave the distribution of what is drawn as it is: over 100,000 draws against the softmax."""

from __future__ import annotations

from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forward import open_runner
from setpoint.engine.plan import LogitsRow, PlanEntry, StepPlan
from setpoint.engine.request import Request
from setpoint.engine.sampling import SamplingParams
from setpoint.engine.scheduler import Scheduler, SchedulerLimits
from setpoint.engine.sequence import Sequence
from setpoint.engine.stats import SpeculationCounters
from setpoint.runtime.cpu.runner import CpuRunner

PROMPT = [11, 12, 13]
ALLOWED = [20, 21, 22]
LENGTH = 3
NUM_REQUESTS = 34_000  # three draws each
TEMPERATURE = 1.3


class Stubborn:
    """Drafts the same tokens always: right about as often as the model draws them."""

    def __init__(self) -> None:
        self.counters = SpeculationCounters()

    def draft(self, decodes: list[Sequence], num_prefill: int, room: int, max_drafts: int) -> None:
        for seq in decodes:
            seq.drafts = ALLOWED[: max(0, seq.max_tokens - seq.num_output - 1)]

    def verified(self, *_: Any) -> None: ...

    def learn(self, *_: Any) -> None: ...

    def finished(self, *_: Any) -> None: ...

    def close(self) -> None: ...


def expected(runner: CpuRunner) -> dict[tuple[int, ...], float]:
    """The probability of every output, from raw logits."""
    probabilities = {}
    for output in product(ALLOWED, repeat=LENGTH):
        tokens = [*PROMPT, *output[:-1]]
        rows = tuple(LogitsRow(len(PROMPT) - 1 + i, target=0) for i in range(LENGTH))
        tables = tuple([0] for _ in runner.info.kv_groups)
        logits = runner.logits(StepPlan((PlanEntry(0, tokens, 0, tables, rows),)))[:, ALLOWED].astype(np.float64)
        weights = np.exp((logits - logits.max(axis=1, keepdims=True)) / TEMPERATURE)
        shares = weights / weights.sum(axis=1, keepdims=True)
        chosen = [shares[i, ALLOWED.index(token)] for i, token in enumerate(output)]
        probabilities[output] = float(np.prod(chosen))
    return probabilities


@pytest.fixture
def runner(tiny_llama: Path) -> Any:
    opened = open_runner(tiny_llama, max_num_seqs=64)
    yield opened
    opened.close()


def test_drafts_leave_the_distribution_as_it_is(runner: CpuRunner) -> None:
    probabilities = expected(runner)
    limits = SchedulerLimits(max_num_seqs=64, max_num_queued_reqs=NUM_REQUESTS, max_drafts=LENGTH)
    scheduler = Scheduler(runner.info, limits, enable_prefix_caching=False, speculator=Stubborn())
    outputs: dict[str, list[int]] = {}
    for number in range(NUM_REQUESTS):
        params = SamplingParams(
            max_tokens=LENGTH, temperature=TEMPERATURE, seed=number, allowed_token_ids=ALLOWED, ignore_eos=True
        )
        scheduler.add(Request(str(number), PROMPT, params), 0.0)
    while scheduler.has_work:
        plan = scheduler.schedule(0.0)
        for event in scheduler.commit(plan, runner.execute(plan), 0.0):
            assert event.error is None
            outputs.setdefault(event.request_id, []).extend(event.token_ids)
    totals = scheduler.counters.speculation
    assert 0.1 < totals.accepted_tokens / totals.draft_tokens < 0.9
    found = Counter(map(tuple, outputs.values()))
    assert set(found) <= set(probabilities)
    chi_square = sum(
        (found[output] - NUM_REQUESTS * share) ** 2 / (NUM_REQUESTS * share) for output, share in probabilities.items()
    )
    assert chi_square < 60  # 26 degrees of freedom: once in ten thousand; the seeds are fixed
