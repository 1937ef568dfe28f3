"""The scheduler under everything at once: whatever happens, every invariant holds and nobody's output changes."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pytest
from engine_support import AlwaysDraft, Harness, request, scaled, solo
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, multiple, precondition, rule

from setpoint.engine.plan import RunnerInfo
from setpoint.engine.request import Request
from setpoint.engine.scheduler import SchedulerLimits
from setpoint.errors import QueueFullError
from setpoint.runtime.fake import fake_info

VOCABULARY = 5  # small: prefixes meet, stop tokens come, guesses are right now and then
PREFIXES = [tuple(random.Random(number).choices(range(VOCABULARY), k=14)) for number in range(3)]


def parrot(token_ids: list[int], max_drafts: int) -> list[int]:
    """Drafts what followed the last token the last time it occurred: right often enough, wrong often enough."""
    for start in range(len(token_ids) - 2, -1, -1):
        if token_ids[start] == token_ids[-1]:
            return token_ids[start + 1 : start + 1 + max_drafts]
    return []


def assert_outputs(harness: Harness, requests: Sequence[Request]) -> None:
    """Finished sequences equal their solo run, aborted ones a beginning of it."""
    outputs = harness.outputs()
    for item in requests:
        for (name, index), expected in solo(item, harness.info).items():
            ends = [event.finish_reason for event in harness.events if (event.request_id, event.index) == (name, index)]
            assert [end for end in ends if end] == ends[-1:], "exactly one last event"
            got = outputs[name, index]
            assert got == (expected[: len(got)] if ends[-1] == "abort" else expected)


class SchedulerMachine(RuleBasedStateMachine):
    live = Bundle("live")

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[Request] = []

    @initialize(
        num_blocks=st.integers(7, 11),
        windows=st.sampled_from([(None,), (None, 6), (5,), (None, 1, 9)]),
        budget=st.sampled_from([3, 8, 64]),
        max_drafts=st.sampled_from([0, 3]),
        prefix_caching=st.sampled_from([True, True, False]),
    )
    def build(
        self, num_blocks: int, windows: tuple[int | None, ...], budget: int, max_drafts: int, prefix_caching: bool
    ) -> None:
        info = fake_info(vocab_size=VOCABULARY, num_blocks=num_blocks, block_size=4, max_model_len=28, windows=windows)
        speculator = AlwaysDraft(parrot) if max_drafts else None
        self.harness = Harness(
            info,
            speculator=speculator,
            prefix_caching=prefix_caching,
            max_drafts=max_drafts,
            max_num_batched_tokens=budget,
            max_num_seqs=6,
            max_num_queued_reqs=5,
        )

    @rule(
        target=live,
        prefix=st.sampled_from(PREFIXES),
        shared=st.integers(0, 14),
        tail=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=4),
        max_tokens=st.sampled_from([1, 3, 9, 10]),
        n=st.sampled_from([1, 1, 1, 2, 3]),
        priority=st.sampled_from([0, 0, -1, 2]),
        tenant=st.sampled_from(["", "", "other"]),
        extras=st.sampled_from(
            [
                {},
                {"temperature": 0.5, "seed": 3},
                {"repetition_penalty": 1.5, "presence_penalty": 1.0},
                {"min_tokens": 1, "eos_token_ids": frozenset([4])},
                {"stop_token_ids": [0], "ignore_eos": True, "eos_token_ids": frozenset([1])},
                {"bad_words_token_ids": [[1, 2], [3]], "logprobs": 1},
                {"prompt_logprobs": 1},
            ]
        ),
    )
    def add(
        self,
        prefix: tuple[int, ...],
        shared: int,
        tail: list[int],
        max_tokens: int,
        n: int,
        priority: int,
        tenant: str,
        extras: dict[str, object],
    ) -> object:
        fields = {"temperature": 1.0, "max_tokens": max_tokens, "n": n, "priority": priority, "tenant": tenant}
        item = request(f"r{len(self.requests)}", [*prefix[:shared], *tail], **{**fields, **extras})
        try:
            self.harness.add(item)
        except QueueFullError:
            return multiple()
        self.requests.append(item)
        return item.request_id

    @precondition(lambda self: self.requests)
    @rule(count=st.sampled_from([1, 2, 8]))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.harness.step()

    @rule(name=consumes(live), index=st.sampled_from([None, None, 0, 1]))
    def abort(self, name: str, index: int | None) -> None:
        self.harness.abort(name, index)

    @rule(name=consumes(live), index=st.sampled_from([None, 0]))
    def abort_while_a_plan_is_out(self, name: str, index: int | None) -> None:
        self.harness.step(between=lambda: self.harness.abort(name, index))

    @precondition(lambda self: self.requests and self.harness.scheduler.running)
    @rule(count=st.integers(1, 2))
    def preempt(self, count: int) -> None:
        roster = self.harness.scheduler._roster
        for seq in roster.running[-count:]:
            roster.preempt(seq)
        self.harness.scheduler.check_integrity()

    @rule()
    def evict(self) -> None:
        for pool in self.harness.scheduler.kv.pools:
            pool.evict_cached()
        self.harness.scheduler.check_integrity()

    @rule(max_num_seqs=st.integers(1, 6), budget=st.sampled_from([1, 5, 64]))
    def turn_the_knobs(self, max_num_seqs: int, budget: int) -> None:
        drafts = self.harness.scheduler.limits.max_drafts
        self.harness.scheduler.limits = SchedulerLimits(max_num_seqs, budget, drafts, max_num_queued_reqs=5)

    def teardown(self) -> None:
        if self.requests:
            self.harness.run()
            assert_outputs(self.harness, self.requests)


SchedulerMachine.TestCase.settings = settings(max_examples=scaled(25), stateful_step_count=40, deadline=None)
test_anything_at_any_time = SchedulerMachine.TestCase


# --- every interleaving of a small world -------------------------------------------------------------------------

SMALL = fake_info(vocab_size=VOCABULARY, num_blocks=6, block_size=2, max_model_len=12)
SMALL_REQUESTS = [
    request("a", [1, 2, 3, 4, 1], max_tokens=4),
    request("b", [1, 2, 3, 4, 2], max_tokens=3, n=2, temperature=1.0, seed=4),
    request("c", [1, 2, 0], max_tokens=5, priority=-1),
]


def play(actions: Sequence[tuple[str, int]], requests: Sequence[Request]) -> Harness:
    harness = Harness(SMALL, max_num_batched_tokens=4)
    for action, number in actions:
        if action == "add":
            harness.add(requests[number])
        elif action == "abort":
            harness.abort(requests[number].request_id)
        else:
            harness.step()
    return harness


def fingerprint(harness: Harness, num_added: int) -> object:
    """Everything that the future depends on."""
    scheduler = harness.scheduler
    return (
        num_added,
        tuple(
            (seq.order, seq.status, seq.num_computed, tuple(seq.token_ids), str(seq.block_tables))
            for seq in (*scheduler.running, *scheduler.waiting)
        ),
        tuple((tuple(pool._blank), tuple(pool._cached), str(pool.published())) for pool in scheduler.kv.pools),
        scheduler._planner.blocked,
    )


def moves(harness: Harness, num_added: int, requests: Sequence[Request]) -> Iterator[tuple[str, int]]:
    if harness.scheduler.has_work:
        yield "step", 0
    if num_added < len(requests):
        yield "add", num_added
    for number in range(num_added):
        if harness.scheduler.has_request(requests[number].request_id):
            yield "abort", number


def explore(requests: Sequence[Request], max_states: int) -> int:
    """Breadth first over all orders of adds, steps and aborts; returns how many different states were reached."""
    seen: set[object] = set()
    frontier: list[tuple[tuple[str, int], ...]] = [()]
    while frontier and len(seen) < max_states:
        following = []
        for actions in frontier:
            harness = play(actions, requests)
            num_added = sum(action == "add" for action, _ in actions)
            state = fingerprint(harness, num_added)
            if state in seen:
                assert not (actions and actions[-1][0] == "step" and not harness.plans[-1].entries), "deadlock"
                continue
            seen.add(state)
            if not harness.scheduler.has_work:
                harness.check_empty()
                assert_outputs(harness, requests[:num_added])
            following += [(*actions, move) for move in moves(harness, num_added, requests)]
        frontier = following
    assert not frontier or len(seen) >= max_states
    return len(seen)


@pytest.mark.parametrize("chosen", [[0], [1], [0, 2], [0, 1, 2]], ids=str)
def test_every_interleaving_of_few_requests_in_six_blocks(chosen: list[int]) -> None:
    assert explore([SMALL_REQUESTS[number] for number in chosen], max_states=scaled(150)) >= 10


# --- exhaustion --------------------------------------------------------------------------------------------------


def demanding_workload(seed: int) -> tuple[RunnerInfo, list[Request], dict[str, int]]:
    """Requests that together need four times the blocks there are."""
    rng = random.Random(seed)
    info = fake_info(
        vocab_size=rng.choice([VOCABULARY, 200]),
        num_blocks=rng.randint(6, 20),
        block_size=rng.choice([2, 4]),
        max_model_len=24,
        windows=rng.choice([(None,), (None, 5), (7,)]),
    )
    requests: list[Request] = []
    demand = 0
    capacity = min(24, info.kv_groups[0].num_blocks * info.block_size)
    while demand < 4 * info.kv_groups[0].num_blocks:
        num_prompt = rng.randint(1, capacity - 1)
        max_tokens = rng.randint(1, capacity - num_prompt)
        shared = PREFIXES[rng.randrange(3)][: rng.randint(0, num_prompt)]
        prompt = [*shared, *rng.choices(range(VOCABULARY), k=num_prompt - len(shared))]
        fields = {"max_tokens": max_tokens, "priority": rng.choice([0, 0, 1]), "seed": len(requests)}
        requests.append(request(str(len(requests)), prompt, **fields))
        demand += -(-(num_prompt + max_tokens) // info.block_size)
    limits = {"max_num_batched_tokens": rng.choice([4, 16, 64]), "max_num_seqs": rng.choice([2, 8, 32])}
    return info, requests, limits


def test_four_times_the_blocks_all_finish_with_the_same_output() -> None:
    preemptions = 0
    for seed in range(scaled(12)):
        info, requests, limits = demanding_workload(seed)
        harness = Harness(info, **limits)
        for item in requests:
            harness.add(item)
        num_tokens = sum(len(item.prompt_token_ids) + (item.params.max_tokens or 0) for item in requests)
        harness.run(max_steps=10 * num_tokens)
        assert_outputs(harness, requests)
        preemptions += harness.scheduler.counters.preemptions
    assert preemptions > 0


def test_the_first_in_order_is_never_preempted_and_never_stands_still() -> None:
    for seed in range(scaled(8)):
        info, requests, limits = demanding_workload(1000 + seed)
        harness = Harness(info, **limits)
        for item in requests:
            harness.add(item)
        while harness.scheduler.has_work:
            first = min(harness.scheduler.running, key=lambda seq: seq.order, default=None)
            before = (first.num_preemptions, first.num_computed) if first else (0, -1)
            harness.step()
            if first is not None and first in harness.scheduler.running:
                assert first.num_preemptions == before[0]
                assert first.num_computed > before[1]


def test_a_schedule_repeats_exactly() -> None:
    """Same requests, seed and times: the same plans, to the last block."""
    info, requests, limits = demanding_workload(7)
    runs = []
    for _ in range(2):
        harness = Harness(info, **limits)
        plans = []
        for item in requests:
            harness.add(item)
        while harness.scheduler.has_work:
            plans.append(str(harness.step()))
        runs.append((plans, harness.events))
    assert runs[0] == runs[1]


@pytest.mark.parametrize(("windows", "drafts"), [((None,), 0), ((None,), 3), ((None, 6), 0), ((None, 6), 3)])
def test_chunked_cached_batched_and_drafted_equal_plain(windows: tuple[int | None, ...], drafts: int) -> None:
    info = fake_info(vocab_size=VOCABULARY, num_blocks=200, block_size=4, max_model_len=128, windows=windows)
    prompts = [[*PREFIXES[0], *PREFIXES[1]], [*PREFIXES[0], *PREFIXES[1], 1], [*PREFIXES[0], *PREFIXES[2]]]
    requests = [request(str(number), prompt, max_tokens=20) for number, prompt in enumerate(prompts)]
    for budget in (3, 16, 512):
        harness = Harness(info, speculator=AlwaysDraft(parrot), max_drafts=drafts, max_num_batched_tokens=budget)
        for item in requests:
            harness.add(item)
            harness.step()
        harness.run()
        assert_outputs(harness, requests)
        assert (harness.scheduler.counters.speculation.accepted_tokens > 0) == (drafts > 0)
