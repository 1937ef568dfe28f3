"""Drafters, what is learned of them, and the choice how much to draft."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
from engine_support import Harness, request, scaled, solo
from hypothesis import given, settings
from hypothesis import strategies as st

from setpoint.config import EngineConfig, SpeculativeConfig
from setpoint.engine.plan import StepPlan
from setpoint.engine.request import Request
from setpoint.engine.sampling import SamplingParams
from setpoint.engine.scheduler import Scheduler, SchedulerLimits
from setpoint.engine.sequence import ActiveRequest
from setpoint.engine.sequence import Sequence as EngineSequence
from setpoint.engine.speculation.calibration import Calibration
from setpoint.engine.speculation.draft_model import DraftModel
from setpoint.engine.speculation.drafter import MAX_DRAFTS, Draft, Drafter
from setpoint.engine.speculation.prompt_lookup import PromptLookup, continuation
from setpoint.engine.speculation.recurring_text import RecurringText
from setpoint.engine.speculation.speculator import Speculator
from setpoint.engine.speculation.suffix import CorpusSuffix, SessionSuffix
from setpoint.engine.speculation.suffix_automaton import Follower, SuffixAutomaton
from setpoint.engine.speculation.verify_cost import VerifyCost
from setpoint.errors import ConfigError
from setpoint.runtime.fake import CostModelRunner, FakeRunner, LinearCost, VirtualClock, fake_info

texts = st.lists(st.integers(0, 3), max_size=60)


def sequence(
    token_ids: Sequence[int], *, seq_id: int = 1, prompt: int | None = None, root: bytes = b"r"
) -> EngineSequence:
    """A running sequence of which all but the last token is computed."""
    num_prompt = len(token_ids) if prompt is None else prompt
    item = Request("a", list(token_ids[:num_prompt]), SamplingParams(max_tokens=1000))
    seq = EngineSequence(seq_id, ActiveRequest(item, 0.0, root), 0, arrival=0, seed=1, num_groups=1, max_len=4096)
    for token in token_ids[num_prompt:]:
        seq.append(token)
    seq.num_computed = seq.num_tokens - 1
    return seq


def longest_repeat(text: Sequence[int]) -> int:
    """Length of the longest end of `text` that also ends earlier."""
    best = 0
    for end in range(len(text) - 1, 0, -1):
        matched = 0
        while matched < end and text[end - 1 - matched] == text[-1 - matched]:
            matched += 1
        best = max(best, matched)
    return best


# --- automaton ---------------------------------------------------------------------------------------------------


@given(texts, texts)
@settings(max_examples=scaled(200))
def test_a_follower_finds_the_longest_end_that_occurs(text: list[int], other: list[int]) -> None:
    automaton, follower = SuffixAutomaton(), Follower()
    for token in text:
        automaton.append(token)
    places = {tuple(text[i:j]) for i in range(len(text)) for j in range(i, len(text) + 1)} | {()}
    for end, token in enumerate(other, 1):
        follower.read(automaton, token)
        longest = max(n for n in range(end + 1) if tuple(other[end - n : end]) in places)
        assert follower.matched == longest
        source = follower.source(automaton)
        assert text[source - longest : source] == other[end - longest : end]


@given(texts)
@settings(max_examples=scaled(200))
def test_a_growing_text_knows_where_its_end_occurred_before(text: list[int]) -> None:
    recurring = RecurringText()
    for end, token in enumerate(text, 1):
        recurring.extend([token], 0, 1)
        assert recurring.matched == longest_repeat(text[:end])
        if recurring.matched:
            assert recurring.source < end
            matched = text[recurring.source - recurring.matched : recurring.source]
            assert matched == text[end - recurring.matched : end]
    assert len(recurring.automaton.link) <= 2 * max(len(text), 1) + 1


@given(texts, texts, st.integers(0, 60))
@settings(max_examples=scaled(100))
def test_a_follower_survives_an_automaton_that_grows(text: list[int], other: list[int], cut: int) -> None:
    automaton, follower = SuffixAutomaton(), Follower()
    for token in text[:cut]:
        automaton.append(token)
    for token in other:
        follower.read(automaton, token)
    for token in text[cut:]:
        automaton.append(token)
    source = follower.source(automaton)
    assert automaton.text[source - follower.matched : source] == other[len(other) - follower.matched :]


# --- drafters ----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 16))
@settings(max_examples=scaled(200))
def test_lookups_copy_what_followed_an_earlier_occurrence(text: list[int], count: int) -> None:
    for drafter in (PromptLookup(), SessionSuffix()):
        [draft] = drafter.propose([sequence(text)], count)
        if draft is None:
            assert longest_repeat(text) < 4
            continue
        assert len(draft.token_ids) == count
        sources = [
            end
            for end in range(1, len(text))
            if text[max(0, end - draft.strength) : end] == text[len(text) - draft.strength :]
        ]
        assert any(continuation(text, source, count) == draft.token_ids for source in sources)


def test_a_repetition_is_continued_past_the_end_of_the_text() -> None:
    assert continuation([1, 2, 3, 1, 2, 3], 3, 8) == [1, 2, 3, 1, 2, 3, 1, 2]
    [draft] = SessionSuffix().propose([sequence([7, 8, 7, 8, 7])], 5)
    assert draft == Draft([8, 7, 8, 7, 8], 3)


def test_a_lookup_follows_its_sequence_token_by_token() -> None:
    text = random.Random(3).choices(range(6), k=300)
    for make in (PromptLookup, SessionSuffix):
        steady, seq = make(), sequence(text[:20])
        for token in text[20:]:
            seq.append(token)
            assert steady.propose([seq], 8) == make().propose([sequence(seq.token_ids)], 8) or make is SessionSuffix
            [draft] = steady.propose([seq], 8)
            assert draft is None or draft.strength >= 2


def test_a_long_prompt_is_read_over_several_steps() -> None:
    text = list(range(2000)) * 2
    seq, drafter = sequence(text), SessionSuffix()
    drafts = [drafter.propose([seq], 4)[0] for _ in range(8)]
    assert drafts[0] is None
    assert drafts[-1] == Draft([0, 1, 2, 3], 2000)


def test_the_corpus_belongs_to_a_tenant() -> None:
    drafter, answer = CorpusSuffix(), [5, 6, 7, 8, 9, 10, 11]
    drafter.finished(sequence([1, 2, *answer], prompt=2, root=b"mine"))
    mine, theirs = sequence([40, 5, 6, 7], root=b"mine"), sequence([40, 5, 6, 7], root=b"theirs", seq_id=2)
    assert drafter.propose([mine, theirs], 3) == [Draft([8, 9, 10], 3), None]


def test_the_corpus_is_bounded_and_forgets_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("setpoint.engine.speculation.suffix.GENERATION_TOKENS", 50)
    drafter, rng = CorpusSuffix(), random.Random(1)
    outputs = [rng.choices(range(1000), k=40) for _ in range(5)]
    for output in outputs:
        drafter.finished(sequence([1, *output], prompt=1))
        assert drafter.propose([sequence([1, 2])], 3) == [None]
    seen = [drafter.propose([sequence(output[:10])], 3)[0] is not None for output in outputs]
    assert seen[-1]
    assert not seen[0]
    for number in range(40):
        drafter.finished(sequence([1, *outputs[0]], prompt=1, root=bytes([number])))
    assert len(drafter._corpora) <= 16


# --- the cost of a step ------------------------------------------------------------------------------------------


@given(st.floats(0.001, 0.1), st.floats(0.0, 0.5), st.lists(st.integers(1, 64), min_size=30, max_size=80))
@settings(max_examples=scaled(50))
def test_the_cost_of_measured_sizes_is_learned(base: float, slope: float, sizes: list[int]) -> None:
    cost = VerifyCost()
    for _ in range(40):
        for size in sizes:
            cost.learn(size, base * (1 + slope * (size - 1)))
    for size in {size for size in sizes if size <= 16}:
        assert cost.seconds(size) == pytest.approx(base * (1 + slope * (size - 1)), rel=0.15)


@given(st.dictionaries(st.integers(1, 600), st.floats(1e-4, 1.0), min_size=1, max_size=20))
def test_the_cost_is_finite_and_positive_everywhere(measured: dict[int, float]) -> None:
    cost = VerifyCost()
    for size, seconds in measured.items():
        cost.learn(size, seconds)
    assert all(0.0 < cost.seconds(size) < float("inf") for size in range(1, 2000, 7))


def test_the_cost_follows_a_machine_that_became_slower() -> None:
    cost = VerifyCost()
    for factor in (1.0, 1.8):
        for step in range(60):
            cost.learn(1 + step % 4, factor * (1.0 + 0.1 * (step % 4)))
    assert cost.seconds(4) / cost.seconds(1) == pytest.approx(1.3, rel=0.05)
    assert cost.seconds(1) == pytest.approx(1.8, rel=0.05)


# --- the choice --------------------------------------------------------------------------------------------------


def test_promises_that_are_not_kept_are_believed_less_and_plain_steps_are_known() -> None:
    calibration = Calibration()
    assert calibration.drafted(16) == calibration.plain(16) == 1.0
    for _ in range(200):
        calibration.learn_drafted(16, tokens=0.9, seconds=1.2)
        calibration.learn_plain(16, 0.95 / calibration.plain(16))
    assert calibration.drafted(16) == pytest.approx(0.75, rel=0.01)
    assert calibration.plain(16) == pytest.approx(0.95, rel=0.01)
    assert calibration.drafted(4) == calibration.plain(4) == 1.0  # other batches know nothing of it


@given(st.lists(st.tuples(st.integers(1, 5000), st.floats(0, 1e3), st.floats(0, 1e3)), max_size=60))
def test_calibration_is_bounded(steps: list[tuple[int, float, float]]) -> None:
    calibration = Calibration()
    for num_decodes, tokens, seconds in steps:
        calibration.learn_drafted(num_decodes, tokens, seconds)
        calibration.learn_plain(num_decodes, seconds)
        assert 0.5 <= calibration.drafted(num_decodes) <= 1.0
        assert 0.8 <= calibration.plain(num_decodes) <= 1.25


class Oracle:
    """Knows what FakeRunner's script says, or gets every second guess wrong."""

    name = "oracle"

    def __init__(self, rule: Callable[[list[int]], int], wrong: bool = False) -> None:
        self.rule, self.wrong = rule, wrong

    def propose(self, seqs: Sequence[EngineSequence], max_drafts: int) -> list[Draft | None]:
        drafts: list[Draft | None] = []
        for seq in seqs:
            text = list(seq.token_ids)
            for _ in range(max_drafts):
                text.append((self.rule(text) + self.wrong) % 256)
            drafts.append(Draft(text[-max_drafts:], 8))
        return drafts

    def finished(self, seq: EngineSequence) -> None:
        pass


def counting(context: list[int]) -> int:
    return (context[-1] + 1) % 256


def simulate(drafter: Drafter | None, cost: LinearCost, *, num_seqs: int, tokens: int = 200) -> tuple[float, Scheduler]:
    """Seconds of virtual time for `num_seqs` sequences of so many tokens."""
    info = fake_info(num_blocks=2000, block_size=16, max_model_len=1024)
    speculator = None if drafter is None else Speculator([drafter])
    limits = SchedulerLimits(max_drafts=MAX_DRAFTS)
    scheduler = Scheduler(info, limits, speculator=speculator, enable_prefix_caching=False)
    clock, runner = VirtualClock(), FakeRunner(info, counting)
    for number in range(num_seqs):
        scheduler.add(request(f"{number}", [number], max_tokens=tokens), clock())
    while scheduler.has_work:
        plan = scheduler.schedule(clock())
        result = runner.execute(plan)
        clock.advance(cost.seconds(plan))
        for event in scheduler.commit(plan, result, clock()):
            if event.error is not None:
                raise event.error
    return clock(), scheduler


CHEAP_ROWS = LinearCost(base_s=4e-3, per_token_s=2e-4)  # bound by memory: a row more costs a twentieth
DEAR_ROWS = LinearCost(base_s=1e-4, per_token_s=1e-3)  # bound by arithmetic: a row more costs a row


class Asked(Oracle):
    num_calls = 0

    def propose(self, seqs: Sequence[EngineSequence], max_drafts: int) -> list[Draft | None]:
        self.num_calls += 1
        return super().propose(seqs, max_drafts)


def test_looking_up_that_brings_nothing_is_done_seldom() -> None:
    useless, useful = Asked(counting, wrong=True), Asked(counting)
    simulate(useless, CHEAP_ROWS, num_seqs=4, tokens=800)
    _, scheduler = simulate(useful, CHEAP_ROWS, num_seqs=4, tokens=800)
    assert 0 < useless.num_calls < 0.4 * 800
    assert useful.num_calls > 0.9 * (scheduler.counters.step_tokens.num_steps - 4)


def test_right_guesses_are_drafted_where_rows_are_cheap() -> None:
    plain, _ = simulate(None, CHEAP_ROWS, num_seqs=1)
    drafted, scheduler = simulate(Oracle(counting), CHEAP_ROWS, num_seqs=1)
    assert plain / drafted > 4
    totals = scheduler.counters.speculation
    assert totals.saved_seconds == pytest.approx(plain - drafted, rel=0.15)
    assert totals.methods["oracle"] == [totals.draft_tokens, totals.accepted_tokens]
    assert sum(totals.accepted_at) == totals.accepted_tokens


@pytest.mark.parametrize("num_seqs", [1, 4, 16])
@pytest.mark.parametrize(("cost", "wrong"), [(CHEAP_ROWS, True), (DEAR_ROWS, True), (DEAR_ROWS, False)])
def test_drafts_never_cost_more_than_they_bring(num_seqs: int, cost: LinearCost, wrong: bool) -> None:
    plain, _ = simulate(None, cost, num_seqs=num_seqs, tokens=400)
    drafted, _ = simulate(Oracle(counting, wrong), cost, num_seqs=num_seqs, tokens=400)
    assert plain / drafted >= 0.98


def test_speculation_turns_itself_off_and_on_again() -> None:
    oracle = Oracle(counting, wrong=True)
    _, scheduler = simulate(oracle, CHEAP_ROWS, num_seqs=1, tokens=400)
    assert scheduler.counters.speculation.draft_tokens < 40
    text = Oracle(counting)
    speculator = Speculator([oracle])
    oracle.wrong = True
    info = fake_info(num_blocks=2000, block_size=16, max_model_len=1024)
    scheduler = Scheduler(info, SchedulerLimits(max_drafts=8), speculator=speculator, enable_prefix_caching=False)
    runner, now = FakeRunner(info, text.rule), 0.0
    scheduler.add(request("a", [1], max_tokens=900), 0.0)
    accepted = []
    while scheduler.has_work:
        plan = scheduler.schedule(now)
        now += CHEAP_ROWS.seconds(plan)
        for event in scheduler.commit(plan, runner.execute(plan), now):
            oracle.wrong = event.num_output_tokens < 450
            accepted.append(len(event.token_ids) - 1)
    assert sum(accepted[: len(accepted) // 3]) < 10
    assert max(accepted[-10:]) > 3


class Scripted:
    """Guesses at random from a small vocabulary: right now and then."""

    name = "scripted"

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def propose(self, seqs: Sequence[EngineSequence], max_drafts: int) -> list[Draft | None]:
        return [
            Draft(self.random.choices(range(4), k=self.random.randint(1, max_drafts)), self.random.randint(1, 40))
            if self.random.random() < 0.8
            else None
            for _ in seqs
        ]

    def finished(self, seq: EngineSequence) -> None:
        pass


@given(
    st.integers(0, 1000),
    st.lists(
        st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.integers(1, 40)), min_size=1, max_size=5
    ),
    st.sampled_from([4, 9, 64]),
    st.sampled_from([(None,), (None, 6)]),
    st.sampled_from([0.0, 0.9]),
)
@settings(max_examples=scaled(40), deadline=None)
def test_every_method_gives_the_tokens_of_plain_decoding(
    seed: int,
    items: list[tuple[list[int], int]],
    budget: int,
    windows: tuple[int | None, ...],
    temperature: float,
) -> None:
    info = fake_info(vocab_size=4, num_blocks=24, block_size=4, max_model_len=64, windows=windows)
    speculator = Speculator([SessionSuffix(), CorpusSuffix(), PromptLookup(), Scripted(seed)])
    harness = Harness(info, speculator=speculator, max_drafts=6, max_num_batched_tokens=budget, max_num_seqs=3)
    requests = [
        request(f"r{number}", prompt, max_tokens=length, temperature=temperature, seed=number)
        for number, (prompt, length) in enumerate(items)
    ]
    for item in requests:
        harness.add(item)
    outputs = harness.run()
    for item in requests:
        for key, expected in solo(item, info).items():
            assert outputs[key] == expected


class Broken:
    name = "broken"

    def propose(self, seqs: Sequence[EngineSequence], max_drafts: int) -> list[Draft | None]:
        raise ValueError("no idea")

    def finished(self, seq: EngineSequence) -> None:
        raise ValueError("no idea")


def test_a_drafter_that_fails_costs_nobody_a_token() -> None:
    harness = Harness(next_token=counting, speculator=Speculator([Broken()]), max_drafts=4)
    harness.add(request("a", [9], max_tokens=9))
    assert harness.run()["a", 0] == list(range(10, 19))


def test_a_step_of_a_full_batch_is_planned_in_little_time() -> None:
    """Not a timing: the number of guesses ranked is what would make it slow."""
    info = fake_info(num_blocks=4000, block_size=16, max_model_len=1024)
    speculator = Speculator([Oracle(counting)])
    scheduler = Scheduler(info, SchedulerLimits(max_num_seqs=64, max_drafts=16), speculator=speculator)
    clock = VirtualClock()
    runner = CostModelRunner(info, clock, DEAR_ROWS)
    for number in range(64):
        scheduler.add(request(f"{number}", [number], max_tokens=50), 0.0)
    plans: list[StepPlan] = []
    while scheduler.has_work:
        plans.append(scheduler.schedule(clock()))
        scheduler.commit(plans[-1], runner.execute(plans[-1]), clock())
    assert sum(plan.num_tokens for plan in plans) < 64 * 50 * 1.05


# --- configuration -----------------------------------------------------------------------------------------------


def test_the_configuration_is_a_name_or_an_object() -> None:
    assert SpeculativeConfig.parse("off") == SpeculativeConfig("off")
    given_fields = '{"method": "draft", "model": "m.gguf", "num_speculative_tokens": 4}'
    assert SpeculativeConfig.parse(given_fields) == SpeculativeConfig("draft", "m.gguf", 4)
    assert SpeculativeConfig.parse('{"model": "m.gguf"}').method == "draft"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ngram", "choose one of"),
        ("{", "not valid JSON"),
        ('{"methods": "auto"}', "it takes"),
        ('{"method": "draft"}', "needs a model"),
        ('{"method": "suffix", "model": "m"}', "takes no model"),
        ('{"num_speculative_tokens": 17}', "1..16"),
        ('{"num_speculative_tokens": true}', "1..16"),
        ('{"model": ""}', "name or path"),
        ('{"method": ["auto"]}', "choose one of"),
    ],
)
def test_a_wrong_configuration_is_refused_by_name(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        EngineConfig(model="m", speculative_config=text)


# --- draft model -------------------------------------------------------------------------------------------------


def drafting_harness(
    rule: Callable[[list[int]], int] | None, *, num_blocks: int = 200, **limits: int
) -> tuple[Harness, DraftModel]:
    """A harness whose drafts come from a second FakeRunner with `rule` (None: a hash, as the target's own)."""
    info = fake_info(num_blocks=60, block_size=4, max_model_len=128, windows=(None, 6))
    small = fake_info(num_blocks=num_blocks, block_size=4, max_model_len=100, windows=(None, 5))
    model = DraftModel(FakeRunner(small, rule), small, cost_share=0.1)
    ticks = iter(range(10**9))
    speculator = Speculator([], model, clock=lambda: next(ticks) * 1e-6)
    return Harness(info, next_token=counting, speculator=speculator, max_drafts=6, **limits), model


def mostly_counting(context: list[int]) -> int:
    """Wrong after every multiple of seven."""
    return (context[-1] + 1 + (context[-1] % 7 == 0)) % 256


@pytest.mark.parametrize("rule", [counting, mostly_counting])
@pytest.mark.parametrize("budget", [8, 64])
def test_a_draft_model_speeds_up_and_changes_nothing(rule: Callable[[list[int]], int], budget: int) -> None:
    harness, model = drafting_harness(rule, max_num_batched_tokens=budget)
    items = [request(f"r{number}", range(number, number + 9), max_tokens=60, seed=number) for number in range(3)]
    for item in items:
        harness.add(item)
    while harness.scheduler.has_work:
        harness.step()
        model.check_integrity()
    outputs = harness.outputs()
    for number, item in enumerate(items):
        assert outputs[item.request_id, 0] == [(number + 9 + i) % 256 for i in range(60)]
    totals = harness.scheduler.counters.speculation
    assert totals.methods["draft"][1] == totals.accepted_tokens > 40
    if rule is counting:
        assert totals.accepted_tokens == totals.draft_tokens


def test_a_draft_model_without_room_or_context_drafts_nothing() -> None:
    harness, model = drafting_harness(counting, num_blocks=4)
    harness.add(request("a", range(90), max_tokens=30))
    harness.add(request("b", range(5), max_tokens=30))
    outputs = harness.run()
    assert outputs["a", 0] == [(90 + i) % 256 for i in range(30)]
    assert outputs["b", 0] == [5 + i for i in range(30)]
    model.check_integrity()


@given(st.integers(0, 10**6), st.sampled_from([3, 8, 64]))
@settings(max_examples=scaled(30), deadline=None)
def test_a_draft_model_under_preemption_and_aborts(seed: int, budget: int) -> None:
    rng = random.Random(seed)
    info = fake_info(vocab_size=5, num_blocks=9, block_size=4, max_model_len=28, windows=(None, 6))
    small = fake_info(vocab_size=5, num_blocks=rng.choice([6, 30]), block_size=4, max_model_len=28, windows=(None, 6))
    model = DraftModel(FakeRunner(small), small, cost_share=0.1)  # the same hash of the same context: often right
    speculator = Speculator([PromptLookup()], model, clock=lambda: 0.0)
    harness = Harness(info, speculator=speculator, max_drafts=3, max_num_batched_tokens=budget, max_num_seqs=3)
    items = [request(f"r{i}", rng.choices(range(5), k=rng.randint(1, 14)), max_tokens=10, seed=i) for i in range(5)]
    for item in items:
        harness.add(item)
    aborted = f"r{rng.randint(0, 4)}"
    for step in range(400):
        if not harness.scheduler.has_work:
            break
        if step == 6:
            harness.abort(aborted)
        harness.step()
        model.check_integrity()
    outputs = harness.outputs()
    for item in items:
        [expected] = solo(item, info).values()
        got = outputs[item.request_id, 0]
        assert got == expected if item.request_id != aborted else expected[: len(got)] == got
