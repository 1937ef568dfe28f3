"""What a tuning came to: `outcome.py` says it, `page.py` draws it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from setpoint.tune.search.certify import BELOW, Certificate, Decision
from setpoint.tune.search.proof import Stressed
from setpoint.tune.search.race import Racer
from setpoint.tune.search.space import DEFAULT, Setting
from setpoint.tune.search.trial import Observation


@dataclass(frozen=True)
class Loads:
    """The load of a setting's capacity, between one that met the SLA and one that did not."""

    setting: Setting
    met: float  # 0: none was found
    failed: float  # inf: none was found
    points: tuple[tuple[float, Observation], ...]

    @property
    def capacity(self) -> float | None:
        if not self.met:
            return None
        return math.sqrt(self.met * self.failed) if math.isfinite(self.failed) else self.met

    @property
    def promising(self) -> float:
        """Where a certificate can be had: somewhat below the highest load that held."""
        return BELOW * self.met


@dataclass
class Tuned:
    decision: Decision
    noise: float
    load: float  # of the race
    racers: tuple[Racer, ...] = ()
    rungs: int = 0
    loads: list[Loads] = field(default_factory=list)
    finalists: list[Certificate] = field(default_factory=list)
    default: Certificate | None = None
    stressed: tuple[Stressed, ...] = ()
    slope: float = 0.0
    spent_s: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def shrinkage(self) -> float | None:
        """How much of the gain seen while tuning the held-out runs took away, as a share of the capacity."""
        chosen = self.decision.chosen
        if chosen is None or chosen.gain is None:
            return None
        found = {loads.setting: loads.capacity for loads in self.loads}
        mine, theirs = found.get(chosen.setting), found.get(DEFAULT)
        return None if not mine or not theirs else mine / theirs - 1 - chosen.gain.estimate
