"""The scheduler by example: budget, order, chunks, preemption, sharing, windows, the bounded queue."""

from __future__ import annotations

import pytest
from engine_support import Harness, request, solo

from setpoint.engine.plan import StepPlan
from setpoint.engine.scheduler import SchedulerLimits
from setpoint.errors import ConfigError, ContextLengthError, EngineError, QueueFullError, RequestError
from setpoint.runtime.fake import fake_info


def shape(plan: StepPlan) -> list[tuple[int, int, int]]:
    """(sequence, start, number of tokens) of each entry."""
    return [(entry.seq_id, entry.start, len(entry.token_ids)) for entry in plan.entries]


def test_one_request_prefill_then_decode() -> None:
    harness = Harness()
    harness.add(request("a", range(5), max_tokens=3))
    outputs = harness.run()
    assert [shape(plan) for plan in harness.plans] == [[(0, 0, 5)], [(0, 5, 1)], [(0, 6, 1)]]
    assert len(outputs["a", 0]) == 3
    assert harness.last("a").finish_reason == "length"


def test_a_long_prompt_is_computed_in_chunks_with_a_row_only_at_its_end() -> None:
    harness = Harness(max_num_batched_tokens=8)
    item = request("a", range(20), max_tokens=2)
    harness.add(item)
    outputs = harness.run()
    assert [shape(plan) for plan in harness.plans] == [[(0, 0, 8)], [(0, 8, 8)], [(0, 16, 4)], [(0, 20, 1)]]
    assert [len(plan.entries[0].rows) for plan in harness.plans] == [0, 0, 1, 1]
    assert outputs == solo(item, harness.info)


def test_decodes_come_first_then_prompts_under_way_then_waiting_ones() -> None:
    harness = Harness(max_num_batched_tokens=8)
    harness.add(request("decode", range(4), max_tokens=20))
    harness.step()
    harness.add(request("long", range(10, 30), max_tokens=2))
    harness.add(request("next", range(30, 34), max_tokens=2))
    assert shape(harness.step()) == [(0, 4, 1), (1, 0, 7)]
    assert shape(harness.step()) == [(0, 5, 1), (1, 7, 7)]
    assert shape(harness.step()) == [(0, 6, 1), (1, 14, 6), (2, 0, 1)]


def test_lower_priority_numbers_start_first_and_arrival_breaks_ties() -> None:
    harness = Harness(max_num_seqs=1)
    for name, priority in [("a", 5), ("b", 0), ("c", 5), ("d", -3)]:
        harness.add(request(name, range(4), max_tokens=1, priority=priority))
    harness.run()
    assert [event.request_id for event in harness.events] == ["d", "b", "a", "c"]


def test_no_more_sequences_run_than_allowed_or_than_tokens_in_a_step() -> None:
    for limits in ({"max_num_seqs": 3}, {"max_num_batched_tokens": 3}):
        harness = Harness(**limits)
        for number in range(6):
            harness.add(request(str(number), range(4), max_tokens=4))
        while harness.scheduler.has_work:
            harness.step()
            assert len(harness.scheduler.running) <= 3


def test_limits_are_hot() -> None:
    harness = Harness(max_num_batched_tokens=4)
    harness.add(request("a", range(40), max_tokens=1))
    assert harness.step().num_tokens == 4
    harness.scheduler.limits = SchedulerLimits(max_num_batched_tokens=16)
    assert harness.step().num_tokens == 16


def test_out_of_blocks_the_last_in_order_is_preempted_and_loses_nothing() -> None:
    info = fake_info(num_blocks=8, block_size=4, max_model_len=32)
    harness = Harness(info)
    items = [request("old", range(8), max_tokens=20, seed=1), request("young", range(50, 58), max_tokens=20, seed=2)]
    for item in items:
        harness.add(item)
    outputs = harness.run()
    assert harness.scheduler.counters.preemptions > 0
    assert harness.last("old").num_preemptions == 0
    assert harness.last("young").num_preemptions > 0
    assert outputs == {**solo(items[0], info), **solo(items[1], info)}


def test_priority_decides_who_is_preempted() -> None:
    info = fake_info(num_blocks=8, block_size=4, max_model_len=32)
    harness = Harness(info)
    harness.add(request("early", range(8), max_tokens=20, priority=1))
    harness.add(request("urgent", range(50, 58), max_tokens=20, priority=0))
    harness.run()
    assert harness.last("urgent").num_preemptions == 0
    assert harness.last("early").num_preemptions > 0


def test_a_preempted_sequence_is_dropped_from_the_step_that_takes_its_blocks() -> None:
    """The victim's decode is planned already when the older prompt, computed slowly, runs out of blocks."""
    info = fake_info(num_blocks=9, block_size=4, max_model_len=36)
    for num_young in range(1, 9):
        harness = Harness(info, max_num_batched_tokens=2)
        young = request("young", range(40, 40 + num_young), max_tokens=27)
        old = request("old", range(17), max_tokens=2, priority=-1)
        harness.add(young)
        while harness.scheduler.running == [] or harness.scheduler.running[0].num_output == 0:
            harness.step()
        harness.add(old)
        assert harness.run() == {**solo(old, info), **solo(young, info)}
        assert harness.last("young").num_preemptions > 0


def test_a_request_that_fails_while_planned_leaves_no_entry_behind() -> None:
    harness = Harness()
    harness.add(request("bad", range(6), max_tokens=9, n=3))
    harness.add(request("good", range(6), max_tokens=9))
    harness.step()
    harness.step()
    visits = []

    def fail_once(point: str, request_id: str) -> None:
        if (point, request_id) == ("prepare", "bad"):
            visits.append(1)
            if len(visits) == 2:
                raise ValueError

    harness.scheduler.faults = fail_once
    assert [entry.seq_id for entry in harness.step().entries] == [3]
    assert [harness.last("bad", index).finish_reason for index in range(3)] == ["error"] * 3
    while harness.scheduler.has_work:
        harness.step()
    harness.check_empty()


def test_a_prefix_is_evicted_from_its_end() -> None:
    harness = Harness(fake_info(num_blocks=8, block_size=4, max_model_len=32))
    harness.add(request("a", range(20), max_tokens=1))
    harness.run()
    harness.add(request("filler", range(50, 70), max_tokens=1))  # five blocks: three were blank
    harness.run()
    harness.add(request("again", range(20), max_tokens=1))
    harness.run()
    assert harness.last("again").num_cached_tokens == 12


@pytest.mark.parametrize(("num_prompt", "num_running"), [(12, 2), (13, 1)])
def test_a_newcomer_waits_until_its_prompt_fits_beside_the_running_ones(num_prompt: int, num_running: int) -> None:
    """Of 8 blocks the first holds 3, is about to need a fourth, and keeps one in reserve: 3 are left."""
    harness = Harness(fake_info(num_blocks=8, block_size=4, max_model_len=32))
    harness.add(request("a", range(12), max_tokens=8))
    harness.step()
    harness.add(request("b", range(50, 50 + num_prompt), max_tokens=1, ignore_eos=True))
    assert len(harness.step().entries) == num_running
    harness.run()


def test_nobody_overtakes_a_request_that_does_not_fit_yet() -> None:
    info = fake_info(num_blocks=8, block_size=4, max_model_len=32)
    harness = Harness(info)
    harness.add(request("a", range(12), max_tokens=8))
    harness.step()
    harness.add(request("large", range(50, 74), max_tokens=1))
    harness.add(request("small", range(90, 92), max_tokens=1))
    harness.run()
    finished = [event.request_id for event in harness.events if event.finish_reason]
    assert finished.index("a") < finished.index("large") <= finished.index("small")


def test_requests_that_can_never_run_are_refused() -> None:
    harness = Harness(fake_info(num_blocks=4, block_size=4, max_model_len=100, vocab_size=50))
    scheduler = harness.scheduler
    assert scheduler.max_model_len == 16  # what the pool holds
    with pytest.raises(ContextLengthError, match="maximum context length is 16 tokens"):
        harness.add(request("a", [0] * 17))
    with pytest.raises(ContextLengthError):
        harness.add(request("a", [0] * 8, max_tokens=9))
    with pytest.raises(RequestError, match="empty"):
        harness.add(request("a", []))
    for bad in (50, -1, True, 1.0, "1", None):
        with pytest.raises(RequestError, match="prompt token ids"):
            harness.add(request("a", [0, bad], max_tokens=1))  # type: ignore[list-item]
    for bad in (128, -129, 1.5, "1", None):
        with pytest.raises(RequestError, match="priority"):
            harness.add(request("a", [0], priority=bad, max_tokens=1))
    with pytest.raises(RequestError, match="request_id"):
        harness.add(request("", [0], max_tokens=1))
    for bad in ("x" * 129, "\n", "é"):
        with pytest.raises(RequestError, match="cache_salt"):
            harness.add(request("a", [0], cache_salt=bad, max_tokens=1))
    with pytest.raises(RequestError, match="stop_token_ids"):
        harness.add(request("a", [0], stop_token_ids=[50], max_tokens=1))
    with pytest.raises(RequestError, match="eos"):
        harness.add(request("a", [0], eos_token_ids=frozenset([50]), max_tokens=1))
    with pytest.raises(RequestError, match="allowed_token_ids"):
        harness.add(request("a", [0], allowed_token_ids=[3], max_tokens=1, min_tokens=1, eos_token_ids=frozenset([3])))
    harness.check_empty()


def test_a_pool_without_blocks_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError):
        Harness(fake_info(num_blocks=0))


def test_max_tokens_none_generates_to_the_end_of_the_context() -> None:
    harness = Harness(fake_info(num_blocks=8, block_size=4, max_model_len=24))
    harness.add(request("a", range(10), max_tokens=None))
    outputs = harness.run()
    assert len(outputs["a", 0]) == 14
    assert harness.last("a").finish_reason == "length"


def test_a_repeated_prompt_hits_all_full_blocks_but_computes_a_token() -> None:
    harness = Harness()
    for name in ("a", "b"):
        harness.add(request(name, range(12), max_tokens=2))
        outputs = harness.run()
    assert outputs["a", 0] == outputs["b", 0]
    assert harness.last("a").num_cached_tokens == 0
    assert harness.last("b").num_cached_tokens == 8
    counters = harness.scheduler.counters
    assert (counters.prefix_queries, counters.prefix_hits) == (24, 8)
    assert (counters.prompt_tokens, counters.prompt_tokens_cached, counters.generation_tokens) == (24, 8, 4)


def test_generated_blocks_are_reused_by_the_next_turn() -> None:
    harness = Harness()
    harness.add(request("a", range(6), max_tokens=7))
    answer = harness.run()["a", 0]
    harness.add(request("b", [*range(6), *answer, 9], max_tokens=1))
    harness.run()
    assert harness.last("b").num_cached_tokens == 12


@pytest.mark.parametrize("field", ["tenant", "cache_salt"])
def test_other_tenants_and_salts_do_not_hit(field: str) -> None:
    harness = Harness()
    for name, value in [("a", "x"), ("b", "y"), ("c", "x")]:
        harness.add(request(name, range(12), max_tokens=2, **{field: value}))
        harness.run()
    assert [harness.last(name).num_cached_tokens for name in "abc"] == [0, 0, 8]


def test_without_prefix_caching_nothing_is_kept() -> None:
    harness = Harness(prefix_caching=False)
    for name in ("a", "b"):
        harness.add(request(name, range(12), max_tokens=2, n=2, temperature=1.0))
        harness.run()
    assert harness.last("b").num_cached_tokens == 0
    assert len(harness.scheduler.kv.tree) == 0
    assert harness.scheduler.counters.prefix_queries == 0


def test_siblings_wait_for_the_first_and_share_its_prompt() -> None:
    harness = Harness(max_num_batched_tokens=8)
    item = request("a", range(18), max_tokens=5, n=3)
    harness.add(item)
    assert shape(harness.step()) == [(0, 0, 8)]
    assert shape(harness.step()) == [(0, 8, 8)]
    assert shape(harness.step()) == [(0, 16, 2), (1, 16, 2), (2, 16, 2)]
    outputs = harness.run()
    assert outputs == solo(item, harness.info)
    assert len({tuple(tokens) for tokens in outputs.values()}) == 3  # each has its own seed
    assert [harness.last("a", index).num_cached_tokens for index in range(3)] == [0, 16, 16]


def test_others_are_not_held_up_by_waiting_siblings() -> None:
    harness = Harness(max_num_batched_tokens=8)
    harness.add(request("a", range(13), max_tokens=2, n=2))
    harness.add(request("b", range(50, 53), max_tokens=2))
    harness.step()
    assert shape(harness.step()) == [(0, 8, 5), (2, 0, 3)]
    harness.run()


def test_a_sibling_takes_over_when_the_first_is_aborted() -> None:
    harness = Harness(max_num_batched_tokens=8)
    item = request("a", range(18), max_tokens=3, n=3)
    harness.add(item)
    harness.step()
    harness.abort("a", 0)
    harness.scheduler.limits = SchedulerLimits(max_num_batched_tokens=64)
    outputs = harness.run()
    alone = solo(item, harness.info)
    assert {key: outputs[key] for key in [("a", 1), ("a", 2)]} == {key: alone[key] for key in [("a", 1), ("a", 2)]}
    assert harness.last("a", 0).finish_reason == "abort"
    assert [harness.last("a", index).num_cached_tokens for index in (1, 2)] == [8, 16]


def test_seeds_are_derived_per_index_and_repeat() -> None:
    first, second, other = Harness(), Harness(), Harness()
    for harness, seed in [(first, 7), (second, 7), (other, 8)]:
        harness.add(request("a", range(6), max_tokens=6, n=2, seed=seed))
        harness.run()
    assert first.outputs() == second.outputs()
    assert first.outputs()["a", 0] != first.outputs()["a", 1]
    assert not set(map(tuple, first.outputs().values())) & set(map(tuple, other.outputs().values()))


def test_requests_without_a_seed_get_different_ones() -> None:
    harness = Harness()
    for name in ("a", "b"):
        harness.add(request(name, range(6), max_tokens=6, seed=None))
    outputs = harness.run()
    assert outputs["a", 0] != outputs["b", 0]


def test_a_window_releases_what_no_later_token_sees() -> None:
    info = fake_info(num_blocks=64, block_size=4, max_model_len=128, windows=(None, 8))
    harness = Harness(info, max_num_batched_tokens=16)
    item = request("a", range(40), max_tokens=30)
    harness.add(item)
    while harness.scheduler.has_work:
        harness.step()
        for seq in harness.scheduler.running:
            live = [block for block in seq.block_tables[1] if block >= 0]
            assert len(live) <= 3
            assert len(seq.block_tables[0]) == -(-seq.num_computed // 4)
    assert harness.outputs() == solo(item, info)


def test_a_windowed_model_runs_past_its_pool() -> None:
    info = fake_info(num_blocks=5, block_size=4, max_model_len=128, windows=(9,))
    harness = Harness(info)
    assert harness.scheduler.max_model_len == 128
    item = request("a", range(50), max_tokens=40)
    harness.add(item)
    assert harness.run() == solo(item, info)


def test_a_window_longer_than_the_pool_limits_the_context() -> None:
    info = fake_info(num_blocks=5, block_size=4, max_model_len=128, windows=(64,))
    assert Harness(info).scheduler.max_model_len == 20


def test_a_hit_in_a_windowed_model_starts_with_a_partial_table() -> None:
    info = fake_info(num_blocks=64, block_size=4, max_model_len=128, windows=(None, 8))
    harness = Harness(info)
    for name, extra in [("a", [1]), ("b", [2])]:
        harness.add(request(name, [*range(24), *extra], max_tokens=3))
        harness.run()
    assert harness.last("b").num_cached_tokens == 24
    tables = next(plan for plan in reversed(harness.plans) if plan.entries[0].start == 24).entries[0].block_tables
    assert len(tables) == 2
    assert harness.outputs()["b", 0] == solo(request("b", [*range(24), 2], max_tokens=3), info)["b", 0]


def test_the_queue_is_bounded_by_requests_and_by_tokens() -> None:
    harness = Harness(max_num_queued_reqs=2, max_num_seqs=1)
    for name in ("a", "b"):
        harness.add(request(name, range(4), max_tokens=1))
    with pytest.raises(QueueFullError) as full:
        harness.add(request("c", range(4), max_tokens=1))
    assert full.value.retry_after_s >= 1
    harness.step()  # one of them runs now
    harness.add(request("c", range(4), max_tokens=1))
    harness.run()

    harness = Harness(max_num_queued_tokens=10)
    harness.add(request("large", range(20), max_tokens=1))  # alone it may always wait
    with pytest.raises(QueueFullError):
        harness.add(request("small", range(1), max_tokens=1))
    harness.run()


def test_preempted_sequences_do_not_count_as_queued() -> None:
    info = fake_info(num_blocks=8, block_size=4, max_model_len=32)
    harness = Harness(info, max_num_queued_reqs=1)
    harness.add(request("a", range(8), max_tokens=20))
    harness.step()
    harness.add(request("b", range(50, 58), max_tokens=20))
    while not harness.scheduler.counters.preemptions:
        harness.step()
    assert harness.scheduler.queue.num_requests == 0
    harness.add(request("c", range(4), max_tokens=1))
    harness.run()


@pytest.mark.parametrize("index", [None, 0])
def test_abort_in_every_state_frees_everything(index: int | None) -> None:
    for steps in range(9):
        info = fake_info(num_blocks=7, block_size=4, max_model_len=28)
        harness = Harness(info, max_num_batched_tokens=6)
        survivor = request("survivor", range(7), max_tokens=12)
        harness.add(survivor)
        harness.add(request("victim", range(50, 62), max_tokens=8, seed=3))
        for _ in range(steps):
            harness.step()
        harness.abort("victim", index)
        assert harness.last("victim").finish_reason == "abort"
        harness.abort("victim", index)  # twice is harmless
        assert harness.run()["survivor", 0] == solo(survivor, info)["survivor", 0]
    assert sum(event.finish_reason is not None for event in harness.events) == 2


def test_abort_while_a_plan_is_out_drops_its_results() -> None:
    harness = Harness()
    harness.add(request("a", range(6), max_tokens=5))
    harness.add(request("b", range(9), max_tokens=5))
    harness.step(between=lambda: harness.abort("a"))
    assert [event.finish_reason for event in harness.events if event.request_id == "a"] == ["abort"]
    harness.run()
    assert harness.scheduler.counters.aborted_by_state["prefill"] == 1


def test_aborts_are_counted_by_state() -> None:
    info = fake_info(num_blocks=8, block_size=4, max_model_len=32)
    harness = Harness(info, max_num_batched_tokens=8)
    harness.add(request("decode", range(4), max_tokens=20))
    harness.step()
    harness.add(request("prefill", range(30, 50), max_tokens=1))
    harness.step()
    harness.add(request("waiting", range(60, 80), max_tokens=1))
    for name in ("waiting", "prefill", "decode", "unknown"):
        harness.abort(name)
    assert harness.scheduler.counters.aborted_by_state == {"waiting": 1, "preempted": 0, "prefill": 1, "decode": 1}
    assert harness.scheduler.counters.finished["abort"] == 3
    harness.check_empty()


def test_a_sequence_ended_by_its_front_end_is_no_abort() -> None:
    harness = Harness()
    harness.add(request("a", range(4), max_tokens=20, n=3))
    harness.step()
    harness.abort("a", 1)
    assert sum(harness.scheduler.counters.aborted_by_state.values()) == 0
    harness.abort("a")  # what is left of it, once
    assert harness.scheduler.counters.aborted_by_state["decode"] == 1


def test_an_id_may_be_used_again_only_after_it_ended() -> None:
    harness = Harness()
    harness.add(request("a", range(4), max_tokens=2))
    with pytest.raises(EngineError, match="already"):
        harness.add(request("a", range(4), max_tokens=2))
    harness.run()
    harness.add(request("a", range(4), max_tokens=2))
    harness.run()


def test_event_times_and_counts() -> None:
    harness = Harness(max_num_seqs=1)
    harness.add(request("a", range(4), max_tokens=2))
    harness.add(request("b", range(4), max_tokens=3))
    harness.run()
    events = [event for event in harness.events if event.request_id == "b"]
    assert [event.time for event in events] == [3.0, 4.0, 5.0]
    assert {event.first_scheduled_time for event in events} == {3.0}
    assert {event.queued_s for event in events} == {3.0}
    assert [event.num_output_tokens for event in events] == [1, 2, 3]


def test_step_tokens_fill_the_histogram() -> None:
    harness = Harness(max_num_batched_tokens=8)
    harness.add(request("a", range(20), max_tokens=2))
    harness.run()
    steps = harness.scheduler.counters.step_tokens
    assert (steps.num_steps, steps.num_tokens) == (4, 21)
    assert steps.counts[:3] == [1, 3, 0]  # at most 1, at most 8
