"""What the pacer counts: shares of answers in time, what it refused, and its last step. For the metrics page."""

from __future__ import annotations

from dataclasses import dataclass, field

_ANSWERS = 50  # that the shares look back on


@dataclass(slots=True)
class Attainment:
    """Shares of answers in time: moving averages over the last fifty."""

    num: int = 0
    good: float = 1.0
    ttft: float = 1.0
    tpot: float = 1.0

    def note(self, ttft: bool, tpot: bool) -> None:
        self.num += 1
        weight = 1.0 / min(self.num, _ANSWERS)
        self.good += weight * ((ttft and tpot) - self.good)
        self.ttft += weight * (ttft - self.ttft)
        self.tpot += weight * (tpot - self.tpot)


@dataclass(slots=True)
class PacingCounters:
    """Classes are the requests' priorities."""

    classes: dict[int, Attainment] = field(default_factory=dict)
    shed: dict[int, int] = field(default_factory=dict)
    budget: int = 0  # tokens of the last step that had prompts to compute
    least_slack_s: float = 0.0  # of its running sequences and prompts; 0 while nothing is due
    num_bound_steps: int = 0  # whose budget a deadline set
    num_late: int = 0  # prompts that were thought late, as of the last step
    max_running: int = 0
    row: int = 0  # of a recipe's envelope, that is in force
    num_switches: int = 0  # between such rows
    outside: dict[str, bool] = field(default_factory=dict)  # what of the traffic no certificate speaks of
