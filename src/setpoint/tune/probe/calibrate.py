"""`setpoint probe MODEL`: what steps of this model cost on this machine, measured in a minute and kept.

Two rounds over the grid, so that a drift of the machine shows as a difference between them; their means are fitted.
The host's share (planning, results, the engine's loop) is measured apart, with the engine itself running.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from setpoint.engine.engine import Engine
from setpoint.engine.events import Event
from setpoint.engine.plan import Runner, StepPlan, StepResult
from setpoint.engine.request import Request
from setpoint.engine.sampling import SamplingParams
from setpoint.engine.scheduler import Scheduler, SchedulerLimits
from setpoint.engine.step_cost import ShapeOf, StepCost, StepShape
from setpoint.engine.step_fit import StepSample, fit_step_cost, leave_one_out, nonnegative_least_squares
from setpoint.errors import ConfigError, EngineError
from setpoint.tune.probe.grid import Cell, Grid, grid
from setpoint.tune.probe.machine import MachineIdentity

SCHEMA = 1
MOST_NOISE = 0.1  # median distance of the two rounds, as a share
_LEAST_REPEATS, _MOST_REPEATS, _CELL_S = 3, 15, 0.12  # of a cell in a round: so many steps, or so long
_FIRST_ROUND_SHARE = 0.5  # of the time; cells that it does not reach are left out
_HOST_TOKENS = 24
_PATIENCE_S = 120.0


@dataclass(frozen=True)
class MeasuredCell:
    """Seconds of `Runner.execute`, in either round."""

    cell: Cell
    shape: StepShape
    first_s: float
    second_s: float

    @property
    def seconds(self) -> float:
        return (self.first_s + self.second_s) / 2

    @property
    def difference(self) -> float:
        """Of the rounds, as a share."""
        return abs(self.first_s - self.second_s) / self.seconds


@dataclass(frozen=True)
class Calibration:
    """What one probe found; errors are shares of the measured time."""

    schema: int
    machine: MachineIdentity
    model: str  # name it was asked for by
    fingerprint: str  # of weights, shapes, number formats, threads and instruction set
    measured_at_unix_s: float
    seconds: float
    cells: tuple[MeasuredCell, ...]
    cost: StepCost
    noise: float
    left_out_median: float  # error at a cell of a fit to all others
    left_out_p90: float

    @property
    def age_s(self) -> float:
        return max(time.time() - self.measured_at_unix_s, 0.0)


def check_noise(calibration: Calibration) -> None:
    """Raises ConfigError when equal steps took too different times."""
    if calibration.noise > MOST_NOISE:
        raise ConfigError(
            f"this machine is too noisy to model: equal steps differ by {calibration.noise:.0%} (at most "
            f"{MOST_NOISE:.0%}); measure again when it is quiet, or give --accept-noise"
        )


def calibrate(
    runner: Runner,
    *,
    machine: MachineIdentity,
    model: str,
    fingerprint: str,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    seconds: float,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Calibration:
    """Measure for `seconds` at most, or as long as the smallest grid takes. `report(done, total)` counts cells."""
    info = runner.info
    cells = grid(max_num_seqs, max_num_batched_tokens, info.max_model_len)
    began = time.perf_counter()
    steps = Grid(runner, cells, max_num_batched_tokens=max_num_batched_tokens)
    total = 2 * len(steps.cells) + 1
    first: dict[Cell, float] = {}
    for cell in steps.cells:
        if first and time.perf_counter() - began > _FIRST_ROUND_SHARE * seconds:
            break
        first[cell] = _mean_s(steps, cell)
        report(len(first), total)
    second: dict[Cell, float] = {}
    for cell in first:
        second[cell] = _mean_s(steps, cell)
        report(total - 1 - len(first) + len(second), total)
    host_s, host_per_entry_s = measure_host(runner, [size for size in (1, 8, 32) if size <= max_num_seqs])
    report(total, total)
    shape_of = ShapeOf(info.kv_groups)
    shapes = {cell: shape_of(steps.plan_shape(cell)) for cell in first}
    measured = tuple(MeasuredCell(cell, shapes[cell], first[cell], second[cell]) for cell in first)
    samples = [StepSample(cell.shape, cell.seconds) for cell in measured]
    errors = sorted(abs(error) for error in leave_one_out(samples)) or [0.0]
    return Calibration(
        schema=SCHEMA,
        machine=machine,
        model=model[:200],
        fingerprint=fingerprint,
        measured_at_unix_s=time.time(),
        seconds=time.perf_counter() - began,
        cells=measured,
        cost=fit_step_cost(samples, host_s=host_s, host_per_entry_s=host_per_entry_s),
        noise=statistics.median(cell.difference for cell in measured),
        left_out_median=statistics.median(errors),
        left_out_p90=errors[round(0.9 * (len(errors) - 1))],
    )


def _mean_s(steps: Grid, cell: Cell) -> float:
    """Of equal steps, after one that warms caches and touches memory. A stall counts as two steps, not as what it took.

    Means and not medians: what users see of a step that is late now and then is the mean.
    """
    steps.execute(cell)
    times: list[float] = []
    while len(times) < _LEAST_REPEATS or (len(times) < _MOST_REPEATS and sum(times) < _CELL_S):
        began = time.perf_counter()
        steps.execute(cell)
        times.append(time.perf_counter() - began)
    most = 2.0 * statistics.median(times)
    return statistics.fmean(min(seconds, most) for seconds in times)


class _TimedRunner:
    """A runner that notes when its steps begin and end."""

    def __init__(self, runner: Runner) -> None:
        self._runner, self.info = runner, runner.info
        self.spans: list[tuple[int, float, float]] = []  # entries, began, ended

    def execute(self, plan: StepPlan) -> StepResult:
        began = time.perf_counter()
        result = self._runner.execute(plan)
        self.spans.append((len(plan.entries), began, time.perf_counter()))
        return result

    def close(self) -> None:
        pass  # it is borrowed


def measure_host(runner: Runner, sizes: Sequence[int]) -> tuple[float, float]:
    """Seconds of a step that are not the runner's: for any step, and for each sequence in it."""
    rows, targets = [], []
    for size in sizes:
        rows.append([1.0, float(size)])
        targets.append(_host_s(runner, size))
    solved = nonnegative_least_squares(np.asarray(rows), np.asarray(targets) * 1e3) / 1e3
    return float(solved[0]), float(solved[1])


def _host_s(runner: Runner, size: int) -> float:
    """Median time between two steps of so many decodes, with the engine's thread as it runs for users."""
    timed, open_answers = _TimedRunner(runner), {str(number) for number in range(size)}
    limits = SchedulerLimits(max_num_seqs=size, max_num_batched_tokens=max(64, size))
    scheduler = Scheduler(runner.info, limits, enable_prefix_caching=True, seed=0)

    def deliver(events: list[Event]) -> None:
        open_answers.difference_update(event.request_id for event in events if event.finish_reason is not None)

    engine = Engine(scheduler, timed, deliver)
    params = SamplingParams(temperature=0.0, max_tokens=_HOST_TOKENS, ignore_eos=True, seed=0)
    for name in list(open_answers):
        engine.submit(Request(name, [1 + int(name) % (runner.info.vocab_size - 1)], params))
    engine.start()
    if not engine.drain(_PATIENCE_S) or open_answers:
        raise EngineError("the engine did not answer while it was measured")
    engine.shutdown()
    gaps = [after[1] - before[2] for before, after in pairwise(timed.spans) if before[0] == after[0] == size]
    return statistics.median(gaps) if gaps else 0.0
