"""What the pacer chose and from what, the latest of it: bounded, of nobody in particular, and repeatable offline."""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

from setpoint.engine.envelope import RowChoice, RowView, choose_row
from setpoint.engine.pacing import (
    ArrivalChoice,
    ArrivalView,
    StepChoice,
    StepView,
    choose_arrival,
    choose_step,
)

MAX_DECISIONS, MAX_SWITCHES = 512, 64

View = StepView | ArrivalView | RowView
Choice = StepChoice | ArrivalChoice | RowChoice


@dataclass(frozen=True, slots=True)
class Decision:
    at_s: float  # of the engine's clock
    view: View
    choice: Choice

    @property
    def kind(self) -> str:
        return {StepView: "step", ArrivalView: "arrival", RowView: "row"}[type(self.view)]

    def document(self) -> dict[str, Any]:
        """Lengths and times only: nothing says whose requests they were."""
        return {"at_s": self.at_s, "kind": self.kind, "view": asdict(self.view), "choice": asdict(self.choice)}


def choose(view: View) -> Choice:
    """The choice that a view leads to: what repeats a decision."""
    match view:
        case StepView():
            return choose_step(view)
        case ArrivalView():
            return choose_arrival(view)
        case RowView():
            return choose_row(view)


class Decisions:
    """The latest decisions, and the latest switches of rows, which thousands of steps may follow.

    One thread at a time adds; any may read.
    """

    def __init__(self) -> None:
        self._kept: deque[Decision] = deque(maxlen=MAX_DECISIONS)
        self._switches: deque[Decision] = deque(maxlen=MAX_SWITCHES)

    def add(self, at_s: float, view: View, choice: Choice) -> None:
        is_switch = isinstance(choice, RowChoice) and choice.why != "stays"
        (self._switches if is_switch else self._kept).append(Decision(at_s, view, choice))

    def latest(self, count: int = MAX_DECISIONS + MAX_SWITCHES) -> list[Decision]:
        while True:
            try:
                kept, switches = list(self._kept), list(self._switches)
            except RuntimeError:  # one was added meanwhile
                continue
            latest = sorted([*kept, *switches], key=lambda decision: decision.at_s)
            return latest[-count:] if count > 0 else []
