"""Finding the request behind a failed step, and what a client is told of an unexpected error."""

from __future__ import annotations

import logging
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

    Repeating an entry rewrites the same KV bytes (law 1), so the others get the tokens they would have got. The
    second value is the error of the step if no entry could be executed: then the runner itself may be broken.
    """
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
