"""The runs that certify, in the time that is left: the finalists in pairs with the default, then lower loads.

A capacity is a guess, so whoever has a shown gain, or else the default, may miss the SLA at the first load; it runs
again at 0.87 of it, and at 0.87 of that, alone, on fresh seeds. All looks at an SLA share the five per cent of error
that one would have. What time is left then goes to what a recipe also tells: where the default holds, and how the
chosen setting does under traffic that it was not tuned for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from setpoint.tune.search.certify import Certificate, Decision, adjusted, certificate, decide
from setpoint.tune.search.space import DEFAULT, Setting
from setpoint.tune.search.trial import Ask, Observation, Part

SEEDS, LOWER_SEED, ROW_SEED, STRESS_SEED = 9000, 9100, 9200, 9300
NUM_SEEDS = 5
FIRST_LOOK = 0.6  # of the time left
CONFIDENCES = (0.97, 0.985, 0.995)  # of the SLA in each look; every one after the first is at so much less load
LOWER = 0.87
MOST = 5.0  # times the least length of a run
STRESSES: tuple[tuple[str, Part, float], ...] = (
    ("rate +20 %", "holdout", 1.2),
    ("lengths +20 %", "longer", 1.0),
    ("bursts of twice the variation", "burstier", 1.0),
)
Measure = Callable[[Ask], Observation]


@dataclass(frozen=True)
class Stressed:
    """One run of the chosen setting under other traffic than it was certified for."""

    what: str
    seen: Observation


@dataclass
class Proven:
    decision: Decision
    finalists: list[Certificate]
    default: Certificate | None = None
    stressed: tuple[Stressed, ...] = ()


class Proof:
    """`left_s()` is the time left; no run is shorter than `least_s`."""

    def __init__(
        self, measure: Measure, left_s: Callable[[], float], *, least_s: float, slope: float, noise: float
    ) -> None:
        self._measure, self._left_s, self._least_s = measure, left_s, least_s
        self._slope, self._noise = slope, noise

    def of(self, finalists: Mapping[Setting, float], default_load: float | None) -> Proven:
        """`finalists` gives the load of each, the best first; `default_load`: None where the default holds nowhere."""
        proven = self._in_pairs(finalists) if finalists else Proven(Decision("invalid", None, ""), [])
        if proven.decision.verdict != "certified":
            gained = [one for one in proven.finalists if one.is_gain and not one.invalid]
            if gained:
                self._lower(proven, max(gained, key=lambda one: one.gain.estimate if one.gain is not None else 0.0))
            elif default_load is not None and proven.decision.verdict != "default":
                self._of_default(proven, default_load)
        elif default_load is not None:
            self._row_of_default(proven, default_load)
        if proven.decision.chosen is not None:
            proven.stressed = self._under_stress(proven.decision.chosen)
        return proven

    def _in_pairs(self, finalists: Mapping[Setting, float]) -> Proven:
        """Each at its load beside the default; the best alone where there is no time for long runs of both."""
        sides = 2 * NUM_SEEDS
        at = dict(finalists)
        while len(at) > 1 and self._left_s() * FIRST_LOOK / (sides * len(at)) < self._least_s:
            at.popitem()
        seconds = self._each_s(sides * len(at), FIRST_LOOK)
        mine: dict[Setting, list[Observation]] = {setting: [] for setting in at}
        theirs: dict[Setting, list[Observation]] = {setting: [] for setting in at}
        for number in range(NUM_SEEDS):
            for place, (setting, load) in enumerate(at.items()):
                pair = [("certify", setting, mine), (f"certify beside {place}", DEFAULT, theirs)]
                for name, side, log in pair if number % 2 == 0 else pair[::-1]:  # ABBA
                    log[setting].append(self._measure(Ask(name, side, load, "holdout", SEEDS + number, seconds)))
        found = [
            certificate(
                setting, load, mine[setting], theirs[setting],
                slope=self._slope, noise=self._noise, confidence=CONFIDENCES[0],
            )
            for setting, load in at.items()
        ]  # fmt: skip
        lowest = min(at, key=lambda setting: at[setting])
        beside = certificate(DEFAULT, at[lowest], theirs[lowest], slope=self._slope, confidence=CONFIDENCES[0])
        return Proven(decide(found, beside), adjusted(found), beside)

    def _lower(self, proven: Proven, best: Certificate) -> None:
        found = self._looks(best.setting, best.load * LOWER, CONFIDENCES[1:], "certify lower")
        if found is not None and found.holds:
            shown = replace(found, gain=best.gain, p_value=best.p_value, noise=best.noise)
            why = f"holds the SLA on held-out traffic; the gain is beyond the noise, and was shown at {best.load:.3g} x"
            proven.decision = Decision("certified", shown, why)

    def _of_default(self, proven: Proven, load: float) -> None:
        """Whether it holds the SLA at all; beside the finalists it was one look already."""
        confidences: Sequence[float] = CONFIDENCES
        if proven.default is not None:
            load, confidences = min(load, proven.default.load * LOWER), CONFIDENCES[1:]
        found = self._looks(DEFAULT, load, confidences, "certify default")
        if found is not None:
            proven.default = found
            proven.decision = decide(proven.finalists, found)

    def _looks(self, setting: Setting, load: float, confidences: Sequence[float], name: str) -> Certificate | None:
        """The first that holds, or else the last."""
        found = None
        for number, confidence in enumerate(confidences):
            seconds = self._each_s(NUM_SEEDS, 0.95 / (len(confidences) - number))
            if self._left_s() < NUM_SEEDS * seconds:
                break
            seeds = range(LOWER_SEED + 10 * number, LOWER_SEED + 10 * number + NUM_SEEDS)
            seen = [self._measure(Ask(name, setting, load, "holdout", seed, seconds)) for seed in seeds]
            found = certificate(setting, load, seen, slope=self._slope, confidence=confidence)
            if found.holds:
                break
            load *= LOWER
        return found

    def _row_of_default(self, proven: Proven, load: float) -> None:
        """Up to which load the default would do as well."""
        proven.default = None
        seconds = self._each_s(NUM_SEEDS, 0.6)
        if self._left_s() >= NUM_SEEDS * seconds:
            seeds = range(ROW_SEED, ROW_SEED + NUM_SEEDS)
            seen = [self._measure(Ask("certify default", DEFAULT, load, "holdout", seed, seconds)) for seed in seeds]
            proven.default = certificate(DEFAULT, load, seen, slope=self._slope)

    def _under_stress(self, chosen: Certificate) -> tuple[Stressed, ...]:
        found = []
        for number, (what, part, factor) in enumerate(STRESSES):
            seconds = round(min(0.95 * self._left_s() / (len(STRESSES) - number), MOST * self._least_s), 1)
            if seconds < self._least_s / 2:  # an outlook may be shorter than a proof
                break
            ask = Ask("stress", chosen.setting, chosen.load * factor, part, STRESS_SEED, seconds)
            found.append(Stressed(what, self._measure(ask)))
        return tuple(found)

    def _each_s(self, runs: int, share: float) -> float:
        """So that all of them take this share of the time left, unless they would be too short."""
        return round(min(max(self._left_s() * share / runs, self._least_s), MOST * self._least_s), 1)
