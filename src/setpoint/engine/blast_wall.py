"""Finding the request behind a failed step, and what a client is told of an unexpected error."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from setpoint.engine.plan import EntryResult, PlanEntry, Runner, StepPlan, StepResult
from setpoint.errors import EngineError, SetpointError

log = logging.getLogger(__name__)

# Raises to inject a failure: faults(point, request_id), points: validate, schedule, allocate, prepare, forward,
# sample, commit, deliver.
Faults = Callable[[str, str], None]


def client_error(error: Exception) -> Exception:
    """`error` itself if it was raised on purpose; else an EngineError that reveals nothing and has it as cause."""
    if isinstance(error, SetpointError):
        return error
    failure = EngineError("the engine failed while serving this request")
    failure.__cause__ = error
    return failure


def execute_isolated(
    runner: Runner, plan: StepPlan, inject: Callable[[str, PlanEntry], None] | None = None
) -> tuple[StepResult, Exception | None]:
    """Execute a plan; if that raises, execute each entry alone, so that only those fail which fail alone.

    Repeating an entry rewrites the same KV bytes (law 1), so the others get the tokens they would have got. Blocks are
    moved once, before: what could not be restored is not computed on. The second value is the error of the step if no
    entry could be executed: then the runner itself may be broken.
    """
    if not (plan.saves or plan.restores):
        return _execute_entries(runner, plan, inject)
    moved, unrestored = StepResult(), frozenset[int]()
    began = time.perf_counter()
    try:
        moved = runner.execute(StepPlan((), plan.saves, plan.restores))
    except Exception as error:
        log.error("moving KV blocks failed (%s)", type(error).__name__)
        unrestored = frozenset(restore.seq_id for restore in plan.restores)
    moving_s = time.perf_counter() - began
    sound = [entry for entry in plan.entries if entry.seq_id not in unrestored]
    result, step_error = _execute_entries(runner, StepPlan(sound), inject) if sound else (StepResult(), None)
    computed = iter(result.entries)
    entries = [EntryResult() if entry.seq_id in unrestored else next(computed) for entry in plan.entries]
    return StepResult(entries, moved.saved, unrestored, moving_s), step_error


def _execute_entries(
    runner: Runner, plan: StepPlan, inject: Callable[[str, PlanEntry], None] | None
) -> tuple[StepResult, Exception | None]:
    try:
        return _execute(runner, plan, inject), None
    except Exception as error:
        log.warning("a step of %d entries failed (%s); trying each alone", len(plan.entries), type(error).__name__)
        step_error = error
    results = []
    num_raised = 0
    for entry in plan.entries:
        try:
            results.append(_execute(runner, StepPlan((entry,)), inject).entries[0])
        except Exception as error:
            num_raised += 1
            results.append(EntryResult(error=error))
    return StepResult(tuple(results)), step_error if num_raised == len(results) else None


def _execute(runner: Runner, plan: StepPlan, inject: Callable[[str, PlanEntry], None] | None) -> StepResult:
    if inject is not None:
        for entry in plan.entries:
            inject("forward", entry)
    result = runner.execute(plan)
    if len(result.entries) != len(plan.entries):
        raise EngineError("the runner returned a wrong number of entries")
    if inject is not None:
        for entry in plan.entries:
            inject("sample", entry)
    return result
