"""What the pacer chose and from what, the latest of it: bounded, of nobody in particular, and repeatable offline."""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

from setpoint.engine.pacing import (
    ArrivalChoice,
    ArrivalView,
    BackoffChoice,
    BackoffView,
    StepChoice,
    StepView,
    choose_arrival,
    choose_backoff,
    choose_step,
)

MAX_DECISIONS = 512

View = StepView | ArrivalView | BackoffView
Choice = StepChoice | ArrivalChoice | BackoffChoice


@dataclass(frozen=True, slots=True)
class Decision:
    at_s: float  # of the engine's clock
    view: View
    choice: Choice

    @property
    def kind(self) -> str:
        return {StepView: "step", ArrivalView: "arrival", BackoffView: "backoff"}[type(self.view)]

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
        case BackoffView():
            return choose_backoff(view)


class Decisions:
    """The latest decisions. One thread at a time adds; any may read."""

    def __init__(self) -> None:
        self._kept: deque[Decision] = deque(maxlen=MAX_DECISIONS)

    def add(self, at_s: float, view: View, choice: Choice) -> None:
        self._kept.append(Decision(at_s, view, choice))

    def latest(self, count: int = MAX_DECISIONS) -> list[Decision]:
        while True:
            try:
                kept = list(self._kept)
            except RuntimeError:  # one was added meanwhile
                continue
            return kept[-count:] if count > 0 else []
