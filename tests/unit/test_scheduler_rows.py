"""What a sequence asks of the sampler, when it ends, and what drafts and logprobs mean."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from engine_support import AlwaysDraft, Harness, request, solo

from setpoint.engine.plan import EntryResult, RowResult, RowSampling, StepPlan, StepResult
from setpoint.engine.row_state import RowState, sequence_seed
from setpoint.engine.sampling import SamplingParams
from setpoint.errors import EngineError, RequestError
from setpoint.runtime.fake import fake_info


def counting(context: list[int]) -> int:
    """Each token is the one before plus one."""
    return (context[-1] + 1) % 256


def knowing(rule: Callable[[int], int]) -> AlwaysDraft:
    """Drafts by a given rule."""

    def propose(token_ids: list[int], max_drafts: int) -> list[int]:
        drafts = [rule(token_ids[-1])]
        while len(drafts) < max_drafts:
            drafts.append(rule(drafts[-1]))
        return drafts

    return AlwaysDraft(propose)


def rows_of(harness: Harness) -> list[RowSampling]:
    return [row.sampling for plan in harness.plans for entry in plan.entries for row in entry.rows if row.sampling]


# --- how it ends -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "tokens", "finish_reason", "stop_reason"),
    [
        ({"eos_token_ids": frozenset([12])}, [10, 11, 12], "stop", None),
        ({"eos_token_ids": frozenset([12]), "ignore_eos": True}, [10, 11, 12, 13, 14], "length", None),
        ({"stop_token_ids": [11]}, [10, 11], "stop", 11),
        ({"stop_token_ids": [12], "eos_token_ids": frozenset([12])}, [10, 11, 12], "stop", None),
        ({"stop_token_ids": [12], "eos_token_ids": frozenset([12]), "ignore_eos": True}, [10, 11, 12], "stop", 12),
        ({"max_tokens": 1}, [10], "length", None),
    ],
)
def test_how_a_sequence_ends(
    fields: dict[str, object], tokens: list[int], finish_reason: str, stop_reason: int | None
) -> None:
    harness = Harness(next_token=counting)
    harness.add(request("a", [9], **{"max_tokens": 5, **fields}))
    assert harness.run()["a", 0] == tokens
    assert (harness.last("a").finish_reason, harness.last("a").stop_reason) == (finish_reason, stop_reason)


def test_min_tokens_bans_every_stop_until_then() -> None:
    harness = Harness(next_token=counting)
    harness.add(
        request("a", [9], max_tokens=9, min_tokens=2, stop_token_ids=[10, 12], eos_token_ids=frozenset([11, 15]))
    )
    assert harness.run()["a", 0] == [13, 14, 15]
    assert [tuple(row.banned_ids) for row in rows_of(harness)] == [(10, 11, 12, 15)] * 2 + [()]


def test_a_stop_token_drawn_against_the_ban_does_not_stop() -> None:
    harness = Harness(next_token=counting)
    harness.add(request("a", [9], max_tokens=4, min_tokens=3, stop_token_ids=[10]))
    plan = harness.scheduler.schedule(0.0)
    events = harness.scheduler.commit(plan, StepResult((EntryResult((RowResult(10),)),)), 0.0)
    assert events[0].finish_reason is None


# --- what the sampler is told ------------------------------------------------------------------------------------


def test_parameters_reach_every_row_with_its_position() -> None:
    harness = Harness()
    harness.add(request("a", range(5), max_tokens=3, temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, seed=4))
    harness.run()
    rows = rows_of(harness)
    assert [row.position for row in rows] == [5, 6, 7]
    assert {(row.temperature, row.top_k, row.top_p, row.min_p, row.seed) for row in rows} == {
        (0.7, 5, 0.9, 0.1, sequence_seed(4, 0))
    }


def test_bias_and_allowed_ids_reach_every_row() -> None:
    harness = Harness()
    harness.add(request("a", range(5), max_tokens=2, logit_bias={3: -1.5, 9: 2.0}, allowed_token_ids=[3, 9, 11]))
    harness.run()
    for row in rows_of(harness):
        assert dict(zip(row.bias_ids, row.bias_values, strict=True)) == {3: -1.5, 9: 2.0}
        assert row.allowed_ids is not None
        assert set(row.allowed_ids) == {3, 9, 11}


def state_of(**fields: object) -> RowState:
    return RowState(SamplingParams(**fields), seed=0, prompt=[7, 8, 7], stop_ids=[])  # type: ignore[arg-type]


def counts_of(row: RowSampling) -> dict[int, int]:
    return dict(zip(row.penalty_ids, row.penalty_counts, strict=True))


def test_penalty_counts_grow_with_the_output() -> None:
    state = state_of(frequency_penalty=1.0)
    assert counts_of(state.row([7, 8, 7], 3)) == {}
    for token in (5, 7, 5):
        state.append(token)
    assert counts_of(state.row([7, 8, 7, 5, 7, 5], 3)) == {5: 2, 7: 1}


def test_the_repetition_penalty_also_knows_the_prompt() -> None:
    state = state_of(repetition_penalty=1.2)
    state.append(8)
    assert counts_of(state.row([7, 8, 7, 8], 3)) == {7: 0, 8: 1}
    assert counts_of(state_of().row([7, 8, 7], 3)) == {}


def test_guesses_count_as_if_accepted_and_leave_no_trace() -> None:
    state = state_of(presence_penalty=1.0)
    state.append(5)
    guessed = state.row([7, 8, 7, 5], 3, [5, 6])
    assert counts_of(guessed) == {5: 2, 6: 1}
    assert guessed.position == 6
    assert counts_of(state.row([7, 8, 7, 5], 3)) == {5: 1}


@pytest.mark.parametrize(
    ("output", "guesses", "banned"),
    [([], [], {4}), ([1], [], {4, 2}), ([1, 2], [], {4, 3}), ([9, 1], [2], {4, 3}), ([2], [], {4}), ([], [1], {4, 2})],
)
def test_bad_words_ban_their_last_token_after_the_others(
    output: list[int], guesses: list[int], banned: set[int]
) -> None:
    """Words are found in the output only: the prompt ends with 1, which starts one of them."""
    params = SamplingParams(bad_words_token_ids=[[4], [1, 2], [1, 2, 3]])
    state = RowState(params, seed=0, prompt=[5, 1], stop_ids=[])
    assert set(state.row([5, 1, *output], 2, guesses).banned_ids) == banned


def test_a_row_that_would_permit_nothing_fails_its_request_only() -> None:
    harness = Harness()
    harness.add(request("a", range(5), max_tokens=8, allowed_token_ids=[3], bad_words_token_ids=[[3, 3]]))
    harness.add(request("b", range(5), max_tokens=3))
    while harness.scheduler.has_work:
        harness.step()
    assert isinstance(harness.last("a").error, RequestError)
    assert [event.token_ids for event in harness.events if event.request_id == "a"] == [(3,), ()]
    assert harness.last("b").finish_reason == "length"


def test_seeds_differ_by_seed_and_index_and_fit_64_bits() -> None:
    seeds = {sequence_seed(seed, index) for seed in (-(1 << 63), -1, 0, 1, (1 << 63) - 1) for index in range(64)}
    assert len(seeds) == 5 * 64
    assert all(0 <= seed < 1 << 64 for seed in seeds)
    assert sequence_seed(1, 0) == sequence_seed(1, 0)


# --- logprobs ----------------------------------------------------------------------------------------------------


def test_logprobs_come_with_each_token() -> None:
    harness = Harness()
    harness.add(request("a", range(5), max_tokens=3, logprobs=2))
    harness.run()
    for event in harness.events:
        assert event.logprobs is not None
        assert [logprob.token_id for logprob in event.logprobs] == list(event.token_ids)
        assert all(len(logprob.top_ids) == len(logprob.top_logprobs) == 2 for logprob in event.logprobs)


@pytest.mark.parametrize("budget", [1, 4, 7, 64])
def test_prompt_logprobs_are_collected_over_chunks(budget: int) -> None:
    whole, chunked = Harness(), Harness(max_num_batched_tokens=budget)
    for harness in (whole, chunked):
        harness.add(request("warm", range(18), max_tokens=1))  # its blocks are cached, but must not be used
        harness.run()
        harness.add(request("a", range(18), max_tokens=3, prompt_logprobs=1, n=2, temperature=1.0))
        harness.run()
    events = [event for event in chunked.events if (event.request_id, event.index) == ("a", 0)]
    scores = events[0].prompt_logprobs
    assert scores is not None
    assert scores[0] is None
    assert [score.token_id for score in scores[1:] if score] == list(range(1, 18))
    assert events[0].num_cached_tokens == 0
    assert all(event.prompt_logprobs is None for event in events[1:])
    assert all(event.prompt_logprobs is None for event in chunked.events if event.index == 1)
    assert scores == next(event for event in whole.events if event.request_id == "a").prompt_logprobs


def test_prompt_logprobs_survive_preemption() -> None:
    """Rows scored before the preemption are neither asked for again nor lost."""
    alone = Harness()
    item = request("a", range(50, 68), max_tokens=2, prompt_logprobs=0)
    alone.add(item)
    alone.run()
    for num_steps in range(1, 8):
        harness = Harness(max_num_batched_tokens=3)
        harness.add(item)
        for _ in range(num_steps):
            harness.step()
        for seq in list(harness.scheduler.running):
            harness.scheduler._roster.preempt(seq)
        assert harness.run() == alone.outputs()
        assert harness.events[0].prompt_logprobs == alone.events[0].prompt_logprobs
        num_scored = sum(row.target is not None for plan in harness.plans for row in plan.entries[0].rows)
        assert num_scored == 17


# --- drafts ------------------------------------------------------------------------------------------------------


def test_right_drafts_come_out_in_one_step() -> None:
    harness = Harness(next_token=counting, speculator=knowing(lambda token: token + 1), max_drafts=3)
    harness.add(request("a", [9], max_tokens=9))
    assert harness.run()["a", 0] == list(range(10, 19))
    assert [len(event.token_ids) for event in harness.events] == [1, 4, 4]
    assert (
        harness.scheduler.counters.speculation.draft_tokens,
        harness.scheduler.counters.speculation.accepted_tokens,
    ) == (6, 6)


def test_wrong_drafts_are_rolled_back() -> None:
    harness = Harness(next_token=counting, speculator=knowing(lambda token: token + 1 + token % 2), max_drafts=3)
    harness.add(request("a", [9], max_tokens=9))
    assert harness.run()["a", 0] == list(range(10, 19))
    assert harness.scheduler.counters.speculation.accepted_tokens < harness.scheduler.counters.speculation.draft_tokens


def test_a_draft_may_end_the_sequence() -> None:
    harness = Harness(next_token=counting, speculator=knowing(lambda token: token + 1), max_drafts=5)
    harness.add(request("a", [9], max_tokens=20, eos_token_ids=frozenset([12])))
    assert harness.run()["a", 0] == [10, 11, 12]


def test_drafts_never_pass_max_tokens_the_context_or_the_budget() -> None:
    info = fake_info(num_blocks=8, block_size=4, max_model_len=16)
    harness = Harness(info, speculator=knowing(lambda token: (token + 1) % 256), max_drafts=8, max_num_batched_tokens=6)
    items = [request("a", range(4), max_tokens=12), request("b", range(50, 53), max_tokens=6, seed=2)]
    for item in items:
        harness.add(item)
    outputs = harness.run()
    assert all(plan.num_tokens <= 6 for plan in harness.plans)
    assert all(len(plan.entries) == 2 for plan in harness.plans[2:6])  # drafts leave room for the neighbour
    assert outputs == {**solo(items[0], info), **solo(items[1], info)}


def test_drafts_take_no_blocks_from_others() -> None:
    info = fake_info(num_blocks=4, block_size=4, max_model_len=16)
    harness = Harness(info, speculator=knowing(lambda token: (token + 1) % 256), max_drafts=8)
    harness.add(request("a", range(4), max_tokens=4))
    harness.add(request("b", range(50, 54), max_tokens=4))
    harness.run()
    assert harness.scheduler.counters.preemptions == 0


# --- results that cannot be --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "result",
    [
        EntryResult(()),
        EntryResult((RowResult(1), RowResult(2))),
        EntryResult((RowResult(256),)),
        EntryResult((RowResult(-1),)),
        EntryResult((RowResult(1),)),  # without the logprob that was asked for
        EntryResult(error=ValueError("secret")),
    ],
)
def test_an_impossible_result_fails_its_request_only(result: EntryResult) -> None:
    harness = Harness()
    harness.add(request("bad", range(5), max_tokens=3, logprobs=0))
    harness.add(request("good", range(5), max_tokens=3))
    plan: StepPlan = harness.scheduler.schedule(0.0)
    results = harness.runner.execute(plan).entries
    harness.events += harness.scheduler.commit(plan, StepResult((result, results[1])), 0.0)
    error = harness.last("bad").error
    assert isinstance(error, EngineError)
    assert "secret" not in str(error)
    harness.scheduler.check_integrity()
    while harness.scheduler.has_work:
        harness.step()
    assert harness.last("good").finish_reason == "length"
    harness.check_empty()
