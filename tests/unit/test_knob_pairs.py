"""Every lossless knob with every other one: the tokens are those of the plain run, and each knob really was at work."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
from automaton import Automaton
from engine_support import Harness, request
from test_structured_rows import EOS, outcome
from tier_support import Attic, fixed_cost, tiers

from setpoint.engine.request import Request
from setpoint.engine.speculation.draft_model import DraftModel
from setpoint.engine.speculation.prompt_lookup import PromptLookup
from setpoint.engine.speculation.speculator import Speculator
from setpoint.engine.speculation.suffix import CorpusSuffix, SessionSuffix
from setpoint.runtime.fake import FakeRunner, fake_info

KNOBS = ("speculation", "prefix cache", "tiers", "preemption", "structured output", "n", "chunking", "sessions")
WINDOWS = (None, 6)
ROOMY = fake_info(num_blocks=200, block_size=4, max_model_len=64, windows=WINDOWS)
TIGHT = fake_info(num_blocks=18, block_size=4, max_model_len=64, windows=WINDOWS)
TIGHTEST = fake_info(num_blocks=13, block_size=4, max_model_len=64, windows=WINDOWS)
RECORD = Automaton([{1: 1}, {2: 2}, {3: 3, 4: 3, 5: 3}, {6: 0, 7: 4}, {}], frozenset([4]))  # (1 2 [345] 6)* 1 2 [345] 7


def work(knobs: frozenset[str], turn: int) -> list[Request]:
    """Four requests; the second turn asks the same again under other names."""
    made = []
    for number in range(4):
        prompt = [20 + (i * (number // 2 + 1)) % 7 for i in range(14 + number)]
        item = request(
            f"r{number} turn {turn}",
            prompt,
            max_tokens=16,
            seed=number,
            temperature=float(number % 2),
            n=3 if "n" in knobs and number % 2 else 1,
            eos_token_ids=frozenset([EOS]),
            allowed_token_ids=None if "structured output" in knobs else [1, 2, 3],
            structured_outputs={"json_object": True} if "structured output" in knobs else None,
        )
        if "structured output" in knobs:
            item.grammar = RECORD
        made.append(replace(item, session_id=f"s{number}") if "sessions" in knobs else item)
    return made


def harness_with(knobs: frozenset[str]) -> Harness:
    info = ROOMY if "preemption" not in knobs else TIGHTEST if len(knobs) > 2 else TIGHT
    speculator = None
    if "speculation" in knobs:
        small = fake_info(num_blocks=100, block_size=4, max_model_len=64, windows=WINDOWS)
        model = DraftModel(FakeRunner(small), small, cost_share=0.1)
        speculator = Speculator([SessionSuffix(), CorpusSuffix(), PromptLookup()], model, clock=lambda: 0.0)
    lower = None
    if "tiers" in knobs:
        lower = tiers(info, host_blocks=60, disk=Attic(1), cost=fixed_cost(info, blocks_per_step=4.0))
    return Harness(
        info,
        speculator=speculator,
        prefix_caching=bool(knobs & {"prefix cache", "tiers", "sessions"}),
        lower=lower,
        max_drafts=4,
        max_num_batched_tokens=5 if "chunking" in knobs else 512,
        max_num_seqs=8,
        jump_forward="structured output" in knobs,
    )


def plain(items: list[Request]) -> dict[tuple[str, int], object]:
    """Each request alone, nothing on."""
    found: dict[tuple[str, int], object] = {}
    for item in items:
        alone = Harness(ROOMY, prefix_caching=False, jump_forward=False, max_num_batched_tokens=1 << 20)
        alone.add(item)
        found.update(outcome(alone))
    return found


def forget_pool(harness: Harness) -> None:
    """The pool is emptied as other traffic would do it, once everything was saved below."""
    for _ in range(100):
        if not harness.scheduler.num_unsaved:
            break
        harness.step()
    for pool in harness.scheduler.kv.pools:
        pool.evict_cached()
    harness.scheduler.check_integrity()


def check(knobs: frozenset[str]) -> None:
    harness = harness_with(knobs)
    asked = []
    for turn in range(2):
        items = work(knobs, turn)
        asked += items
        for item in items:
            harness.add(item)
        found = outcome(harness)
        if "tiers" in knobs:
            forget_pool(harness)
    assert found == plain(asked)
    counters = harness.scheduler.counters
    evidence = {
        "speculation": counters.speculation.accepted_tokens,
        "prefix cache": counters.prefix_hits + counters.external_hits,
        "tiers": counters.external_hits,
        "preemption": counters.preemptions,
        "structured output": sum(len(event.token_ids) > 1 for event in harness.events),  # forced ones come along
        "n": sum(event.index for event in harness.events),
        "chunking": sum(len(entry.rows) == 0 for plan in harness.plans for entry in plan.entries),
    }
    for knob in knobs & evidence.keys():
        assert evidence[knob] > 0, f"{knob} was not at work"


@pytest.mark.parametrize("knobs", list(combinations(KNOBS, 2)), ids=" x ".join)
def test_a_pair_of_knobs(knobs: tuple[str, str]) -> None:
    check(frozenset(knobs))


@pytest.mark.parametrize("knob", KNOBS)
def test_one_knob(knob: str) -> None:
    check(frozenset([knob]))


def test_all_knobs_together() -> None:
    check(frozenset(KNOBS))
