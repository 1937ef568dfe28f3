"""The thread pool: everybody runs, barriers order memory, a failure reaches the caller and harms nothing later."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from setpoint._native import ThreadPool, rehearse_team_size

SIZES = [1, 2, 3, 5]  # more threads than CPUs among them: then waiting sleeps instead of spinning


@pytest.mark.parametrize("size", SIZES)
def test_every_thread_sees_the_writes_before_a_barrier(size: int) -> None:
    pool = ThreadPool(size)
    for rounds in (0, 1, 2, 300):
        assert pool.rehearse(rounds) == rounds


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("round", [0, 1, 7])
def test_a_failure_frees_the_others_and_the_pool_lives_on(size: int, round: int) -> None:
    pool = ThreadPool(size)
    for _ in range(20):
        with pytest.raises(RuntimeError, match="failed as asked"):
            pool.rehearse(10, failing_round=round)
        assert pool.rehearse(10) == 10


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("patient", [False, True])
def test_stages_are_run_once_by_every_member_of_the_team(size: int, patient: bool) -> None:
    pool = ThreadPool(size)
    pool.set_patient(patient)
    for stages in [0, 1, 2, 40] * 20:
        complete, team = pool.rehearse_stages(stages)
        assert complete == stages
        assert team <= size
        assert not patient or stages == 0 or team == size


@pytest.mark.parametrize("size", SIZES)
def test_threads_that_come_late_join_between_stages(size: int) -> None:
    pool = ThreadPool(size)
    assert pool.rehearse_stages(4_000, slow=True) == (4_000, size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("patient", [False, True])
def test_a_failing_stage_frees_the_team(size: int, patient: bool) -> None:
    pool = ThreadPool(size)
    pool.set_patient(patient)
    for stage in [0, 1, 7] * 10:
        with pytest.raises(RuntimeError, match="failed as asked"):
            pool.rehearse_stages(10, failing_stage=stage)
        assert pool.rehearse_stages(10)[0] == 10
        assert pool.rehearse(3) == 3


def test_runs_from_different_threads_one_after_another() -> None:
    pool, seen = ThreadPool(2), []
    for _ in range(5):
        caller = threading.Thread(target=lambda: seen.append(pool.rehearse(3)))
        caller.start()
        caller.join()
    assert seen == [3] * 5


def test_threads_start_with_the_first_run_and_end_with_the_pool() -> None:
    def num_threads() -> int:
        return len(os.listdir("/proc/self/task"))

    before = num_threads()
    pool = ThreadPool(4)
    assert num_threads() == before
    pool.rehearse(1)
    assert num_threads() == before + 3
    del pool
    assert num_threads() == before


def test_the_callers_affinity_is_left_alone() -> None:
    before = os.sched_getaffinity(0)
    ThreadPool(len(before)).rehearse(1)
    assert os.sched_getaffinity(0) == before


def test_a_forked_child_is_told_that_its_threads_are_gone() -> None:
    pool = ThreadPool(2)
    pool.rehearse(1)
    child = os.fork()
    if child == 0:
        signal.alarm(10)  # a child that hangs dies
        try:
            pool.rehearse(1)
        except RuntimeError as error:
            os._exit(0 if "fork" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert pool.rehearse(3) == 3


@pytest.mark.parametrize("size", [0, -1, 1 << 20])
def test_absurd_sizes_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="num_threads"):
        ThreadPool(size)


def test_a_team_shrinks_by_one_while_its_threads_wait_too_long_for_each_other() -> None:
    assert rehearse_team_size(2, [0.3] * 1000) == [2] * 1000  # one thread would be slower still
    sizes = rehearse_team_size(2, [0.6] * 5000)
    assert set(sizes) == {1, 2}
    assert sizes.count(2) < 0.1 * len(sizes)  # it is tried again, ever less often
    assert sizes[-300:].count(2) > 0
    assert rehearse_team_size(4, [0.3] * 12)[-1] == 3
    assert rehearse_team_size(2, ([0.9] + [0.0] * 3) * 300) == [2] * 1200  # now and then something is slow
    assert rehearse_team_size(1, [1.0] * 100) == [1] * 100


def test_a_team_is_whole_again_when_the_neighbour_has_gone() -> None:
    sizes = rehearse_team_size(2, [0.6] * 100 + [0.0] * 400)
    assert sizes[40] == 1
    assert sizes[-1] == 2
