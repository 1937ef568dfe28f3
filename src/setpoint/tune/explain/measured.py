"""What was measured about a recipe: pairs of runs in the study beside it, and the gain that its evidence certifies.

Two runs are a pair when they had the same arrivals for the same time: equal load, part, seed and seconds. What is
compared is the score (`tune/search/trial.py`), which says how far requests stay from the SLA; its sign is what counts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from setpoint.tune.recipe import Recipe, RecipeError
from setpoint.tune.search.race import paired_interval
from setpoint.tune.search.space import DEFAULT, Setting
from setpoint.tune.search.study import StudyError, read_study
from setpoint.tune.search.trial import Ask, Observation

Runs = Sequence[tuple[Ask, Observation]]


@dataclass(frozen=True)
class Measured:
    """How one setting compares with another, above 0 better, with a 95 % interval."""

    source: str  # where the runs are written down
    unit: Literal["capacity", "score"]
    change: float
    low: float
    high: float
    pairs: int

    @property
    def sign(self) -> int:
        """0 where the interval does not tell."""
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


@dataclass(frozen=True)
class Tried:
    """A setting that ran and was not chosen."""

    setting: Setting
    to_default: Measured | None
    to_chosen: Measured | None
    reason: str


def study_of(recipe: Recipe, path: Path) -> tuple[Runs, str]:
    """The runs beside the recipe, or none and why they do not count."""
    if not path.exists():
        return (), f"there is no {path.name} beside the recipe: what was rejected is not known"
    try:
        head, runs = read_study(path)
    except StudyError as error:
        return (), str(error)
    trace = recipe.provenance.get("trace")
    wanted = {
        "sla": recipe.sla,
        "model": recipe.model["sha256"],
        "machine": recipe.machine["fingerprint"],
        "trace": trace.get("sha256") if isinstance(trace, Mapping) else None,
        "given": recipe.provenance.get("given"),
    }
    other = [name for name, value in wanted.items() if head.get(name) != value]
    return ((), f"{path.name} is of another tuning ({', '.join(other)} differ)") if other else (runs, "")


def chosen_of(recipe: Recipe) -> Setting:
    return tuple(recipe.knobs.items())


def compared(runs: Runs, one: Setting, other: Setting, noise: float) -> Measured | None:
    """`one` against `other` by the pairs of their races; each run with the last one of the other before it."""
    mine, theirs = ([(line, *run) for line, run in enumerate(runs, 2) if _raced(run, s)] for s in (one, other))
    differences: list[float] = []
    lines: set[int] = set()
    pairs = 0
    for line, ask, seen in mine:
        beside = [
            found for found in theirs if _same_traffic(found[1], ask) and len(found[2].scores) == len(seen.scores)
        ]
        if not beside or not seen.scores:
            continue
        nearest = min(beside, key=lambda found: abs(found[0] - line))
        differences += [a - b for a, b in zip(seen.scores, nearest[2].scores, strict=True)]
        lines |= {line, nearest[0]}
        pairs += 1
    if not pairs:
        return None
    found = paired_interval(differences, pairs, noise)
    return Measured("study:" + ",".join(map(str, sorted(lines))), "score", found.estimate, found.low, found.high, pairs)


def flipped(recipe: Recipe, knob: str, runs: Runs, noise: float) -> Measured | None:
    """The recipe with one knob back at its default, against the recipe."""
    chosen = chosen_of(recipe)
    setting = tuple((name, value) for name, value in chosen if name != knob)
    if setting == DEFAULT and (certified := _certified(recipe)) is not None:
        return certified
    return compared(runs, setting, chosen, noise)


def rejected(recipe: Recipe, runs: Runs, noise: float) -> list[Tried]:
    """Those that ran and were not chosen: what ran most first."""
    chosen = chosen_of(recipe)
    counts = Counter(ask.setting for ask, _ in runs if ask.setting not in (DEFAULT, chosen))
    return [_tried(setting, chosen, runs, noise) for setting, _ in counts.most_common()]


def race_load(runs: Runs) -> float | None:
    """Where settings were compared, times the trace's own load."""
    return next((ask.load for ask, _ in runs if ask.stage.startswith("race")), None)


def noise_of(recipe: Recipe) -> float:
    found = recipe.evidence.get("noise")
    if type(found) not in (int, float) or not 0 <= float(str(found)) < math.inf:
        raise RecipeError("the recipe's evidence.noise must be a number; write it again with `setpoint tune`")
    return float(str(found))


def _tried(setting: Setting, chosen: Setting, runs: Runs, noise: float) -> Tried:
    to_default = compared(runs, setting, DEFAULT, noise)
    to_chosen = None if chosen == DEFAULT else compared(runs, setting, chosen, noise)
    own = [(line, seen) for line, (ask, seen) in enumerate(runs, 2) if ask.setting == setting]
    bad = next(((line, seen) for line, seen in own if seen.state in ("failed", "saturated")), None)
    if bad is not None and bad[1].state == "failed":
        reason = f"failed: {bad[1].detail[:120]} (study:{bad[0]})"
    elif to_default is not None and to_default.high <= 0:
        reason = "not better than the default"
    elif to_chosen is not None and to_chosen.high < 0:
        reason = "worse than the chosen one"
    elif bad is not None:
        reason = f"requests piled up (study:{bad[0]})"
    elif to_default is None:
        reason = "no run of it could be paired"
    else:
        reason = (
            "no gain was shown beyond the noise" if chosen == DEFAULT else "not shown to be better than the chosen one"
        )
    return Tried(setting, to_default, to_chosen, reason)


def _raced(run: tuple[Ask, Observation], setting: Setting) -> bool:
    ask, seen = run
    return ask.setting == setting and ask.stage.startswith("race") and seen.counts


def _same_traffic(one: Ask, other: Ask) -> bool:
    return (one.load, one.part, one.seed, one.seconds) == (other.load, other.part, other.seed, other.seconds)


def _certified(recipe: Recipe) -> Measured | None:
    """The certified gain of the recipe over the default, seen from the recipe."""
    gain: Any = recipe.evidence.get("gain")
    try:
        estimate, (low, high) = float(gain["estimate"]), map(float, gain["ci95"])
        back = [1 / (1 + value) - 1 for value in (estimate, high, low)]
        return Measured("recipe:evidence.gain", "capacity", back[0], back[1], back[2], int(recipe.evidence["runs"]))
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
