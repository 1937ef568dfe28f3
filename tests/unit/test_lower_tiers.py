"""Blocks below the pool: what comes back is what was lost, where it pays, and never anything else."""

from __future__ import annotations

import pytest
from engine_support import Harness, request, solo
from tier_support import Attic, fixed_cost, tiers

from setpoint.engine.lower_tiers import LowerTiers
from setpoint.engine.plan import RunnerInfo, StepPlan, StepResult
from setpoint.engine.request import Request
from setpoint.engine.restore_cost import RestoreCost
from setpoint.runtime.fake import fake_info

INFO = fake_info(num_blocks=8, block_size=4, max_model_len=32)
WINDOWED = fake_info(num_blocks=8, block_size=4, max_model_len=32, windows=(None, 6))
PROMPT = list(range(1, 18))  # four full blocks and one token


def again(name: str = "again", prompt: list[int] = PROMPT, **fields: object) -> Request:
    return request(name, prompt, **{"max_tokens": 4, "temperature": 1.0, **fields})


def run(harness: Harness, item: Request) -> int:
    """Serve it to its end, compare with the oracle; returns its cached tokens."""
    harness.add(item)
    harness.run()
    for key, expected in solo(item, harness.info).items():
        assert harness.outputs()[key] == expected
    return harness.last(item.request_id).num_cached_tokens


def crowd_out(harness: Harness, num: int = 3) -> None:
    """Other prompts take every block of the pool."""
    for number in range(num):
        run(harness, again(f"other-{number}-{harness.now}", [100 + 30 * number + i for i in range(24)]))


@pytest.mark.parametrize("info", [INFO, WINDOWED], ids=["full", "windowed"])
def test_what_the_pool_loses_comes_back_from_memory(info: RunnerInfo) -> None:
    harness = Harness(info, lower=tiers(info, host_blocks=100))
    assert run(harness, again("first")) == 0
    crowd_out(harness)
    assert run(harness, again()) == 16
    assert sum(len(plan.restores) for plan in harness.plans) == 4 if info is INFO else 6
    counters = harness.scheduler.counters
    assert counters.external_hits == counters.prompt_tokens_restored == 16


@pytest.mark.parametrize("info", [INFO, WINDOWED], ids=["full", "windowed"])
@pytest.mark.parametrize("delay", [0, 3])
def test_what_a_process_wrote_behind_comes_back_in_the_next(info: RunnerInfo, delay: int) -> None:
    disk = Attic(delay)
    first = Harness(info, lower=tiers(info, disk=disk))
    run(first, again("first"))
    while first.scheduler.num_unsaved:
        first.step()
    second = Harness(info, lower=tiers(info, disk=disk))
    assert run(second, again()) == 16
    assert disk.num_fetched >= 4


@pytest.mark.parametrize("room", [1, 2, 3])
def test_a_disk_that_is_full_in_the_middle_of_a_step_gets_the_rest_later(room: int) -> None:
    """Copies are planned while it takes more; those that it then refuses would leave a hole in the prefix."""
    disk = Attic()
    disk.room = room
    harness = Harness(INFO, lower=tiers(INFO, disk=disk, cost=fixed_cost(INFO, blocks_per_step=100)))
    run(harness, again("first"))
    for _ in range(10):
        harness.step()
        disk.takes_more, disk.room = True, room
    assert not harness.scheduler.num_unsaved
    second = Harness(INFO, lower=tiers(INFO, disk=disk))
    assert run(second, again()) == 16


def test_a_disk_that_takes_nothing_is_not_remembered_without_end() -> None:
    disk = Attic()
    disk.takes_more = False
    harness = Harness(INFO, lower=tiers(INFO, disk=disk))
    for _ in range(4):
        crowd_out(harness)
    assert 0 < harness.scheduler.num_unsaved <= 8
    disk.takes_more = True
    while harness.scheduler.num_unsaved:
        harness.step()
    assert disk.records  # what is in the pool still


def test_nothing_is_kept_or_looked_for_when_both_are_off() -> None:
    harness = Harness(INFO)
    run(harness, again("first"))
    crowd_out(harness)
    assert run(harness, again()) == 0
    assert not any(plan.saves or plan.restores for plan in harness.plans)


def test_a_host_budget_of_two_blocks_holds_the_beginning_of_a_prefix_longest() -> None:
    harness = Harness(INFO, lower=tiers(INFO, host_blocks=2))
    run(harness, again("first"))
    host = harness.scheduler.kv.lower.host  # type: ignore[union-attr]
    other = again("other", [100 + i for i in range(17)])
    run(harness, other)
    assert len(host) <= 2
    harness.scheduler.check_integrity()


def test_reading_that_costs_more_than_computing_is_left_alone() -> None:
    dear = fixed_cost(INFO, compute_s_per_token=1e-9)
    harness = Harness(INFO, lower=tiers(INFO, host_blocks=100, disk=Attic(), cost=dear))
    run(harness, again("first"))
    crowd_out(harness)
    assert run(harness, again()) == 0
    assert not any(plan.restores for plan in harness.plans)


def saved_on(disk: Attic) -> None:
    """What the prompt's four blocks are, written by an earlier process."""
    first = Harness(INFO, lower=tiers(INFO, disk=disk))
    run(first, again("first"))
    while first.scheduler.num_unsaved:
        first.step()


def waits(harness: Harness) -> int:
    """Steps, of a second each, in which nothing was computed."""
    return sum(not plan.entries for plan in harness.plans)


def test_a_disk_that_says_nothing_costs_a_part_of_what_computing_takes() -> None:
    disk = Attic()
    saved_on(disk)
    disk.delay = 10**9
    second = Harness(INFO, lower=tiers(INFO, disk=disk, cost=fixed_cost(INFO, compute_s_per_token=0.5)))
    assert run(second, again()) == 0  # 16 tokens take 8 s
    assert waits(second) == 3  # a quarter, and the second that the wait is over in
    assert disk.num_forgotten == 4


@pytest.mark.parametrize("block_s", [2, 3, 4, 5])
def test_a_disk_that_is_slower_than_computing_is_left_and_what_came_is_used(block_s: int) -> None:
    disk = Attic()
    saved_on(disk)
    disk.delay, disk.blocks_at_once = block_s - 1, 1
    block_compute_s = block_s - 0.75
    harness = Harness(
        INFO, lower=tiers(INFO, disk=disk, cost=fixed_cost(INFO, compute_s_per_token=block_compute_s / 4))
    )
    cached = run(harness, again())
    assert cached < 16
    assert waits(harness) + (16 - cached) / 4 * block_compute_s <= 1.25 * 4 * block_compute_s + 2  # steps of a second


def test_a_disk_that_keeps_up_is_waited_for_to_the_end() -> None:
    disk = Attic()
    saved_on(disk)
    disk.blocks_at_once = 1
    second = Harness(INFO, lower=tiers(INFO, disk=disk, cost=fixed_cost(INFO, compute_s_per_token=0.5)))
    assert run(second, again()) == 16
    assert disk.num_forgotten == 0


def test_a_disk_that_was_slow_once_is_tried_again() -> None:
    disk = Attic()
    saved_on(disk)
    block_bytes = INFO.kv_groups[0].block_bytes
    cost = RestoreCost(compute_s_per_token=1e-3, disk_bytes_per_s=block_bytes / 5e-3)  # of 4 ms to compute
    harness = Harness(INFO, lower=tiers(INFO, disk=disk, cost=cost))
    cached = []
    while not any(cached) and len(cached) < 30:
        crowd_out(harness)
        cost.compute_s_per_token = 1e-3  # whatever the harness's steps of a second taught it
        cached.append(run(harness, again(f"again-{len(cached)}")))
    assert cached[0] == 0
    assert cached[-1] == 16


def test_those_behind_it_go_on_while_one_waits_for_the_disk() -> None:
    disk = Attic()
    first = Harness(INFO, lower=tiers(INFO, disk=disk))
    run(first, again("first"))
    while first.scheduler.num_unsaved:
        first.step()
    disk.delay = 10**9
    second = Harness(INFO, lower=tiers(INFO, disk=disk))
    second.add(again("slow"))
    second.add(again("quick", [200, 201, 202]))
    second.step()
    assert [seq.owner.request.request_id for seq in second.scheduler.running] == ["quick"]
    second.run()


def test_restores_are_bounded_in_every_step_and_others_decode_meanwhile() -> None:
    info = fake_info(num_blocks=40, block_size=4, max_model_len=128)
    cost = fixed_cost(info, blocks_per_step=1.5)
    harness = Harness(info, lower=tiers(info, host_blocks=300, cost=cost), max_num_batched_tokens=16)
    long = again("first", [7 * i % 250 for i in range(81)])
    run(harness, long)
    for number in range(6):
        run(harness, again(f"o{number}", [(number * 40 + i) % 250 for i in range(100)]))
    harness.add(again("neighbour", [1, 2, 3], max_tokens=40))
    harness.step()
    harness.add(again("again", long.prompt_token_ids))
    before = len(harness.plans)
    harness.run()
    restoring = [plan for plan in harness.plans[before:] if plan.restores]
    assert len(restoring) == 10
    assert all(len(plan.restores) == 2 and plan.entries for plan in restoring)
    assert harness.outputs()["again", 0] == solo(again("again", long.prompt_token_ids), info)["again", 0]


def test_blocks_that_cannot_be_written_are_computed_and_the_tiers_are_left_alone() -> None:
    harness = Harness(INFO, lower=tiers(INFO, host_blocks=100))
    run(harness, again("first"))
    crowd_out(harness)
    harness.add(again())
    scheduler = harness.scheduler
    plan = scheduler.schedule(100.0)
    assert plan.restores
    unrestored = frozenset(move.seq_id for move in plan.restores)
    scheduler.commit(plan, StepResult([], unrestored=unrestored), 100.0)
    scheduler.check_integrity()
    harness.runner.execute(StepPlan((), plan.saves))
    harness.run()
    assert harness.outputs()["again", 0] == solo(again(), INFO)["again", 0]
    assert not any(plan.restores for plan in harness.plans[-4:])


def test_a_wrong_restore_does_not_go_unnoticed() -> None:
    """The negative control of everything here: bytes of another block change the output, or raise."""
    harness = Harness(INFO, lower=tiers(INFO, host_blocks=100))
    run(harness, again("first"))
    crowd_out(harness)
    lower = harness.scheduler.kv.lower
    assert isinstance(lower, LowerTiers)
    records = lower.host._records
    payloads = [record.payload for record in records.values()]
    for name, payload in zip(list(records), payloads[1:] + payloads[:1], strict=True):
        object.__setattr__(records[name], "payload", payload)
    harness.add(again())
    with pytest.raises(AssertionError):  # KVError, or another output
        assert harness.run()["again", 0] == solo(again(), INFO)["again", 0]


def test_a_sequence_preempted_while_its_blocks_are_planned_writes_none_of_them() -> None:
    """It gets the last free blocks for what it restores, finds none for the next token, and gives all back."""
    info = fake_info(num_blocks=24, block_size=4, max_model_len=48)
    lower = tiers(info, host_blocks=100, cost=fixed_cost(info, blocks_per_step=1.0))
    harness = Harness(info, lower=lower, max_num_batched_tokens=8)
    run(harness, again("first"))
    for number in range(5):
        run(harness, again(f"o{number}", [50 + 30 * number + i for i in range(40)]))
    harness.add(again("elder", [60, 61, 62], max_tokens=40))
    harness.step()
    harness.add(again("again"))
    harness.step()
    scheduler, pool = harness.scheduler, harness.scheduler.kv.pools[0]
    (restoring,) = [seq for seq in scheduler.running if seq.restore is not None]
    lower.cost.memory_bytes_per_s *= 100  # the rest comes in one step
    assert restoring.restore is not None
    elder = scheduler.running[0]
    needed = len(restoring.restore.pending) + (elder.num_computed % 4 == 0)
    others = [pool.acquire() for _ in range(pool.num_free - needed)]
    plan = scheduler.schedule(harness.now)
    assert restoring.num_preemptions == 1
    assert not plan.restores
    for block in others:
        pool.release(block)
    harness.events += scheduler.commit(plan, harness.runner.execute(plan), harness.now)
    harness.run()
    for name, prompt, length in (("again", PROMPT, 4), ("elder", [60, 61, 62], 40)):
        assert harness.outputs()[name, 0] == solo(again(name, prompt, max_tokens=length), info)[name, 0]
