"""Output that follows a grammar: what the sampler is told, when it ends, and that no knob changes a token of it."""

from __future__ import annotations

from typing import Any

import pytest
from automaton import NO_TEXT, Automaton, chain
from engine_support import AlwaysDraft, Harness, request, scaled
from hypothesis import given, settings
from hypothesis import strategies as st

from setpoint.engine.constraint import Grammar
from setpoint.engine.plan import EntryResult, RowResult, RowSampling, StepResult
from setpoint.engine.request import Request
from setpoint.errors import OutputViolationError, RequestError
from setpoint.runtime.fake import fake_info

EOS, OTHER_END = 250, 251
INFO = fake_info(num_blocks=64, block_size=4, max_model_len=128)
LETTERS = list(range(1, 9))


def structured(name: str, grammar: Grammar, prompt: Any = range(20, 26), **fields: Any) -> Request:
    fields.setdefault("eos_token_ids", frozenset([EOS]))
    item = request(name, prompt, structured_outputs={"json_object": True}, **fields)
    item.grammar = grammar
    return item


def rows_of(harness: Harness) -> list[RowSampling]:
    return [row.sampling for plan in harness.plans for entry in plan.entries for row in entry.rows if row.sampling]


def allowed(row: RowSampling) -> set[int]:
    assert row.mask is not None
    return {token for token in range(256) if row.mask[token >> 3] >> (token & 7) & 1}


def ended(harness: Harness, name: str) -> tuple[list[int], str | None, int | None]:
    last = harness.last(name)
    return harness.outputs()[name, 0], last.finish_reason, last.stop_reason


# --- masks and ends ----------------------------------------------------------------------------------------------


def test_every_row_has_the_mask_of_its_place() -> None:
    harness = Harness(jump_forward=False)
    harness.add(structured("a", chain([1, 2], [3], [4, 5])))
    tokens = harness.run()["a", 0]
    assert [allowed(row) for row in rows_of(harness)] == [{1, 2}, {3}, {4, 5}]
    assert all(token in options for token, options in zip(tokens, ([1, 2], [3], [4, 5]), strict=True))


def test_a_grammar_that_can_say_no_more_ends_the_output() -> None:
    harness = Harness()
    harness.add(structured("a", chain([1, 2], [3, 4]), max_tokens=50))
    tokens, finish_reason, stop_reason = ended(harness, "a") if harness.run() else ([], "", 0)
    assert (len(tokens), finish_reason, stop_reason) == (2, "stop", None)


def test_the_end_may_come_only_where_the_text_is_complete() -> None:
    pair = Automaton([{1: 1}, {2: 0}], frozenset([0]))  # (1 2)*
    harness = Harness(jump_forward=False)
    harness.add(structured("a", pair, max_tokens=40, stop_token_ids=[OTHER_END]))
    harness.run()
    for position, row in enumerate(rows_of(harness)):
        assert allowed(row) == ({1, EOS, OTHER_END} if position % 2 == 0 else {2})


def test_an_end_of_sequence_in_a_complete_text_stops() -> None:
    script = iter([1, 2, 1, 2, EOS])
    harness = Harness(next_token=lambda context: next(script), jump_forward=False)
    harness.add(structured("a", Automaton([{1: 1}, {2: 0}], frozenset([0])), max_tokens=40))
    harness.run()
    assert ended(harness, "a") == ([1, 2, 1, 2, EOS], "stop", None)


@pytest.mark.parametrize(
    ("fields", "tokens", "finish_reason", "stop_reason"),
    [
        ({"max_tokens": 3}, [1, 1, 1], "length", None),
        ({"max_tokens": 5, "ignore_eos": True}, [1, 1, 1, 1, 1], "length", None),
        ({"max_tokens": 5, "min_tokens": 3}, [1, 1, 1, EOS], "stop", None),
        ({"max_tokens": 9, "stop_token_ids": [1]}, [1], "stop", 1),
    ],
)
@pytest.mark.parametrize("jump", [True, False])
def test_limits_keep_their_meaning(
    fields: dict[str, Any], tokens: list[int], finish_reason: str, stop_reason: int | None, jump: bool
) -> None:
    """1* to a model that would say EOS from the third token on: the fake takes the next id that is allowed."""
    ones = Automaton([{1: 0}], frozenset([0]))
    wants = lambda context: EOS if "min_tokens" in fields else 1  # noqa: E731
    harness = Harness(next_token=wants, jump_forward=jump)
    harness.add(structured("a", ones, **fields))
    harness.run()
    assert ended(harness, "a") == (tokens, finish_reason, stop_reason)


def test_a_token_against_the_grammar_is_an_error_and_counted() -> None:
    harness = Harness()
    harness.add(structured("bad", chain([1, 2], [3])))
    harness.add(request("good", range(5), max_tokens=3))
    plan = harness.scheduler.schedule(0.0)
    good = harness.runner.execute(plan).entries[1]
    result = StepResult((EntryResult((RowResult(9),)), good))
    harness.events += harness.scheduler.commit(plan, result, 0.0)
    assert isinstance(harness.last("bad").error, OutputViolationError)
    assert harness.scheduler.counters.output_violations == 1
    while harness.scheduler.has_work:
        harness.step()
    assert harness.last("good").finish_reason == "length"


# --- conflicts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"allowed_token_ids": [7]}, "structured_outputs"),
        ({"bad_words_token_ids": [[1], [2]]}, "structured_outputs"),
        ({"min_tokens": 5, "max_tokens": 9}, "min_tokens"),
        ({"min_tokens": 2, "stop_token_ids": [3], "max_tokens": 9}, "structured_outputs"),
    ],
)
@pytest.mark.parametrize("jump", [True, False])
def test_a_conflict_that_leaves_no_token_fails_its_request_only(fields: dict[str, Any], param: str, jump: bool) -> None:
    harness = Harness(jump_forward=jump)
    harness.add(structured("a", chain([1, 2], [3]), **fields))
    harness.add(request("b", range(5), max_tokens=3))
    while harness.scheduler.has_work:
        harness.step()
    error = harness.last("a").error
    assert isinstance(error, RequestError)
    assert (error.param, error.reason) == (param, "conflict")
    assert harness.last("b").finish_reason == "length"


def test_bans_narrow_what_the_grammar_leaves() -> None:
    harness = Harness()
    item = structured("a", chain(LETTERS, LETTERS), allowed_token_ids=[2, 3, 100], bad_words_token_ids=[[2]])
    harness.add(item)
    assert harness.run()["a", 0] == [3, 3]


def test_a_structure_that_was_not_compiled_is_refused() -> None:
    harness = Harness()
    with pytest.raises(RequestError, match="structured_outputs"):
        harness.add(request("a", range(5), structured_outputs={"json_object": True}))


# --- forced tokens -----------------------------------------------------------------------------------------------


def test_forced_tokens_cost_no_step() -> None:
    steps = {}
    for jump in (True, False):
        harness = Harness(jump_forward=jump)
        harness.add(structured("a", chain([1], [2], [3, 4], [5], [6], [7], [8, 9])))
        steps[jump] = (harness.run()["a", 0], harness.runner.num_steps)
    assert steps[True][0] == steps[False][0]
    assert (steps[True][1], steps[False][1]) == (2, 7)


def test_forced_tokens_are_counted_and_told_once() -> None:
    harness = Harness()
    harness.add(structured("a", chain([1], [2], [3, 4], [5])))
    harness.run()
    assert [len(event.token_ids) for event in harness.events] == [4]
    counters = harness.scheduler.counters
    assert (counters.generation_tokens, counters.forced_tokens) == (4, 3)
    assert harness.last("a").num_output_tokens == 4


def test_an_output_with_one_possibility_needs_no_runner() -> None:
    harness = Harness()
    harness.add(structured("a", chain([1], [2], [3]), n=2, temperature=1.0))
    assert harness.run() == {("a", 0): [1, 2, 3], ("a", 1): [1, 2, 3]}
    assert all(not plan.entries for plan in harness.plans)


def test_more_forced_tokens_than_one_step_may_take() -> None:
    info = fake_info(num_blocks=128, block_size=4, max_model_len=512)
    harness = Harness(info)
    harness.add(structured("a", chain(*[[1 + i % 7] for i in range(300)], [8, 9]), max_tokens=400))
    assert harness.run()["a", 0][:300] == [1 + i % 7 for i in range(300)]


def test_logprobs_take_the_exact_path() -> None:
    harness = Harness()
    harness.add(structured("a", chain([1], [2], [3, 4], [5]), logprobs=1))
    tokens = harness.run()["a", 0]
    assert [probability.token_id for event in harness.events for probability in event.logprobs or ()] == tokens
    assert len(tokens) == 4


def test_prompt_logprobs_come_with_the_first_tokens() -> None:
    harness = Harness()
    harness.add(structured("a", chain([1], [2], [3, 4], [5]), prompt_logprobs=0))
    harness.run()
    scores = harness.events[0].prompt_logprobs
    assert scores is not None
    assert [score.token_id for score in scores[1:] if score] == list(range(21, 26))


# --- drafts ------------------------------------------------------------------------------------------------------


def drafting(*drafts: int) -> AlwaysDraft:
    """The same drafts every time."""
    return AlwaysDraft(lambda token_ids, max_drafts: list(drafts[:max_drafts]))


def test_drafts_end_where_the_grammar_forbids_them() -> None:
    harness = Harness(speculator=drafting(2, 9, 3), max_drafts=3, jump_forward=False)
    harness.add(structured("a", chain([1, 2], [1, 2], [1, 2, 3], [1, 2])))
    harness.run()
    assert {entry.num_drafts for plan in harness.plans for entry in plan.entries} <= {0, 1}


def test_a_draft_that_completes_the_output_is_left_to_the_row_before_it() -> None:
    harness = Harness(speculator=drafting(2, 2, 2), max_drafts=3, next_token=lambda context: 2, jump_forward=False)
    harness.add(structured("a", chain([1, 2], [1, 2], [1, 2])))
    assert harness.run()["a", 0] == [2, 2, 2]
    assert [plan.entries[0].num_drafts for plan in harness.plans] == [0, 1]


def test_a_draft_that_nothing_may_follow_is_not_tried() -> None:
    """After 2 only 3 could come, and it is a bad word: that concerns nobody while 2 is a guess."""
    grammar = Automaton([{1: 0, 2: 1}, {3: 0}], frozenset([0]))
    harness = Harness(speculator=drafting(2), max_drafts=1, next_token=lambda context: 1)
    harness.add(structured("a", grammar, max_tokens=5, bad_words_token_ids=[[3]]))
    assert harness.run()["a", 0] == [1] * 5


# --- no knob changes a token -------------------------------------------------------------------------------------


@st.composite
def automata(draw: st.DrawFn) -> Automaton:
    """Up to six states; many have one way on, so that there is something to force."""
    size = draw(st.integers(1, 6))
    edges: list[dict[int, int]] = []
    for _ in range(size):
        tokens = draw(st.lists(st.sampled_from(LETTERS), max_size=3, unique=True))
        edges.append({token: draw(st.integers(0, size - 1)) for token in tokens})
    accepting = {state for state in range(size) if not edges[state] or draw(st.booleans())}
    if not edges[0]:
        edges[0] = {1: draw(st.integers(0, size - 1))}
        accepting.discard(0)
    return Automaton(edges, frozenset(accepting))


@st.composite
def requests(draw: st.DrawFn, number: int) -> Request:
    fields: dict[str, Any] = {
        "max_tokens": draw(st.integers(1, 24)),
        "temperature": draw(st.sampled_from([0.0, 1.0])),
        "seed": draw(st.integers(0, 3)),
        "ignore_eos": draw(st.booleans()),
        "logprobs": draw(st.sampled_from([None, None, None, 0])),
        "repetition_penalty": draw(st.sampled_from([1.0, 1.0, 1.3])),
        "stop_token_ids": draw(st.sampled_from([[], [], [3], [OTHER_END]])),
    }
    if fields["temperature"]:
        fields["n"] = draw(st.integers(1, 3))
    prompt = list(range(20, 20 + draw(st.integers(1, 14))))
    return structured(f"r{number}", draw(automata()), prompt, **fields)


def outcome(harness: Harness) -> dict[tuple[str, int], tuple[tuple[int, ...], str | None, int | None]]:
    outputs = harness.run()
    last = {(event.request_id, event.index): event for event in harness.events}
    return {key: (tuple(outputs[key]), last[key].finish_reason, last[key].stop_reason) for key in last}


def repeat(token_ids: list[int], max_drafts: int) -> list[int]:
    """Drafts that are right as often as the sequence repeats itself."""
    for begin in range(len(token_ids) - 2, -1, -1):
        if token_ids[begin] == token_ids[-1]:
            return token_ids[begin + 1 : begin + 1 + max_drafts]
    return [1, 2, 3][:max_drafts]


@given(st.data())
@settings(max_examples=scaled(120), deadline=None)
def test_no_knob_changes_a_token(data: st.DataObject) -> None:
    """Drafts, jumps, chunks, preemption, cached prefixes and company: the tokens are those of the plain run alone."""
    items = [data.draw(requests(number)) for number in range(data.draw(st.integers(1, 4)))]
    plain = {}
    for item in items:
        alone = Harness(INFO, prefix_caching=False, jump_forward=False, max_num_batched_tokens=1 << 20)
        alone.add(item)
        plain.update(outcome(alone))
    num_blocks = data.draw(st.sampled_from([14, 20, 64]))
    harness = Harness(
        fake_info(num_blocks=num_blocks, block_size=4, max_model_len=44),
        speculator=data.draw(st.sampled_from([None, AlwaysDraft(repeat), drafting(1, 2, 3, 4)])),
        prefix_caching=data.draw(st.booleans()),
        max_drafts=data.draw(st.integers(1, 4)),
        max_num_batched_tokens=data.draw(st.sampled_from([2, 5, 64])),
        jump_forward=data.draw(st.booleans()),
    )
    for item in items:
        harness.add(item)
    assert outcome(harness) == plain
    for item in items:
        check(item, plain)


def check(item: Request, outcomes: dict[tuple[str, int], tuple[tuple[int, ...], str | None, int | None]]) -> None:
    """What came out is in the language, whole when it stopped by itself."""
    grammar = item.grammar
    assert isinstance(grammar, Automaton)
    for index in range(item.params.n):
        tokens, finish_reason, stop_reason = outcomes[item.request_id, index]
        text = [token for token in tokens if token < NO_TEXT]
        assert len(tokens) - len(text) <= 1
        cut = stop_reason is not None and stop_reason < NO_TEXT
        assert grammar.accepts(text, whole=finish_reason == "stop" and not cut)
