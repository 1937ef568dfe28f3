"""The slow loop: which of a recipe's certified settings is in force, and whether its certificate still speaks of this.

A recipe's envelope says up to which load each setting was certified. The load chooses the row, with hysteresis; beyond
the last one the last stays, and it is told that no certificate holds there. Where the agreement is missed although the
load is inside, traffic is not what was certified: another row is tried, and is given up if it does no better. Nothing
but certified rows is ever tried on users, and none is left before it was in force for half a minute.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from setpoint.engine.limits import SchedulerLimits
from setpoint.engine.pacing_counters import Attainment

DWELL_S = 30.0  # that a row is in force at least
DOWN = 0.8  # of a lower row's load: where one goes back to it
ENOUGH = 20  # answers that say how a row does
SHORT = 0.05  # below the level: missed, and not by chance
BARRED_S = 600.0  # for a row that did no better
RATE_MEMORY_S = 15.0
Why = Literal["stays", "load", "missed", "better", "worse"]


@dataclass(frozen=True, slots=True)
class EnvelopeRow:
    """Limits that were certified up to a rate of requests."""

    up_to_rps: float
    limits: SchedulerLimits


@dataclass(frozen=True, slots=True)
class Traffic:
    """Mean and deviation of the logarithms of lengths that a recipe was certified on."""

    input_mean: float
    input_deviation: float
    output_mean: float
    output_deviation: float


@dataclass(frozen=True, slots=True)
class RowView:
    """What a row is chosen from. `band` is the row that the load asks for; `left` is the one that was in force before
    a trial, and what its attainment was."""

    rate_rps: float
    up_to_rps: tuple[float, ...]  # ascending
    band: int
    row: int
    for_s: float  # that it is in force
    attainment: float  # of requests that came since
    num_answers: int
    level: float
    left: int | None
    left_attainment: float
    barred: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RowChoice:
    row: int
    band: int
    why: Why
    outside: bool  # the load is beyond every certificate


def choose_row(view: RowView) -> RowChoice:
    """The row that is in force from now on."""
    last = len(view.up_to_rps) - 1
    outside = view.rate_rps > view.up_to_rps[last]
    if view.for_s < DWELL_S:
        return RowChoice(view.row, view.band, "stays", outside)
    band = view.band
    while band < last and view.rate_rps > view.up_to_rps[band]:
        band += 1
    while band > 0 and view.rate_rps < DOWN * view.up_to_rps[band - 1]:
        band -= 1
    if band != view.band:
        return RowChoice(band, band, "stays" if band == view.row else "load", outside)
    if view.num_answers < ENOUGH:
        return RowChoice(view.row, band, "stays", outside)
    if view.left is not None:
        if view.attainment <= view.left_attainment:
            return RowChoice(view.left, band, "worse", outside)
        return RowChoice(view.row, band, "better", outside)
    if not outside and view.attainment < view.level - SHORT:
        others = [row for row in range(last + 1) if row != view.row and row not in view.barred]
        if others:  # the one for the next higher load first
            nearest = min(others, key=lambda row: (row < view.row, abs(row - view.row)))
            return RowChoice(nearest, band, "missed", outside)
    return RowChoice(view.row, band, "stays", outside)


class Drift:
    """Two-sided CUSUM (Page 1954) of a standardized value: True from a shift of its mean on, until it is gone."""

    SLACK, ALARM, CALM, MOST = 0.5, 10.0, 2.0, 20.0

    def __init__(self, mean: float, deviation: float) -> None:
        self._mean, self._deviation = mean, max(deviation, 0.1)
        self._up = self._down = 0.0
        self.found = False

    def note(self, value: float) -> None:
        z = min(max((value - self._mean) / self._deviation, -3.0), 3.0)
        self._up = min(max(0.0, self._up + z - self.SLACK), self.MOST)
        self._down = min(max(0.0, self._down - z - self.SLACK), self.MOST)
        most = max(self._up, self._down)
        self.found = most > self.ALARM or (self.found and most > self.CALM)


class Envelope:
    """What the choice is made from, and the row in force. Whoever holds it guards it where threads meet."""

    def __init__(self, rows: tuple[EnvelopeRow, ...], level: float, traffic: Traffic | None) -> None:
        """`rows` by ascending load; the last one is in force first."""
        self.rows = rows
        self.row = self._band = len(rows) - 1
        self.num_switches = 0
        self._level = level
        self._rate, self._arrivals = 0.0, 0
        self._tick_s: float | None = None
        self._since_s = 0.0
        self._seen = Attainment()
        self._left: tuple[int, float] | None = None
        self._barred: dict[int, float] = {}  # until when
        self._outside = False
        self._input = self._output = None
        if traffic is not None:
            self._input = Drift(traffic.input_mean, traffic.input_deviation)
            self._output = Drift(traffic.output_mean, traffic.output_deviation)

    @property
    def limits(self) -> SchedulerLimits:
        return self.rows[self.row].limits

    @property
    def outside(self) -> dict[str, bool]:
        """What of the traffic no certificate speaks of."""
        lengths = {"input": self._input, "output": self._output}
        return {"rate": self._outside} | {name: drift.found for name, drift in lengths.items() if drift is not None}

    def arrived(self) -> None:
        self._arrivals += 1

    def refused(self) -> None:
        """A miss of the row in force."""
        self._seen.note(False, False)

    def answered(self, arrived_s: float, ttft: bool, tpot: bool, num_prompt: int, num_output: int) -> None:
        """Who came before the row did says nothing of it."""
        if arrived_s >= self._since_s:
            self._seen.note(ttft, tpot)
        if self._input is not None:
            self._input.note(math.log(max(num_prompt, 1)))
        if self._output is not None:
            self._output.note(math.log(max(num_output, 1)))

    def view(self, now: float) -> RowView:
        """Counts the time since the last look into the rate."""
        if self._tick_s is None:
            self._tick_s = self._since_s = now
        passed_s, self._tick_s = now - self._tick_s, now
        if passed_s > 0.0:
            arrivals, self._arrivals = self._arrivals, 0
            self._rate += (1.0 - math.exp(-passed_s / RATE_MEMORY_S)) * (arrivals / passed_s - self._rate)
        left, left_attainment = self._left or (None, 0.0)
        return RowView(
            rate_rps=self._rate,
            up_to_rps=tuple(row.up_to_rps for row in self.rows),
            band=self._band,
            row=self.row,
            for_s=now - self._since_s,
            attainment=self._seen.good,
            num_answers=self._seen.num,
            level=self._level,
            left=left,
            left_attainment=left_attainment,
            barred=tuple(row for row, until_s in self._barred.items() if until_s > now),
        )

    def follow(self, choice: RowChoice, now: float) -> None:
        if choice.why == "missed":
            self._left = (self.row, self._seen.good)
        elif choice.why == "worse":
            self._barred[self.row] = now + BARRED_S
        if choice.why not in ("stays", "missed") or choice.band != self._band:
            self._left = None
        self._band, self._outside = choice.band, choice.outside
        if choice.row != self.row:
            self.row, self._since_s, self._seen = choice.row, now, Attainment()
            self.num_switches += 1
