"""`setpoint tune`, without the machine: which runs to ask for, and what follows from them.

Noise check, the default's load, screening by prediction, racing, refinement, capacities, certification; each has its
share of the time. Everything is a function of what `measure` answers, time included (a run says what it cost), so a
study can be resumed, and the whole of it is tested on a virtual world.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from setpoint.errors import ConfigError, SetpointError
from setpoint.tune.search.certify import Decision, probit_slope
from setpoint.tune.search.proof import Proof
from setpoint.tune.search.race import Racer, joined, mean_variance, race
from setpoint.tune.search.space import DEFAULT, Dimension, Setting, candidates, shortlist, text
from setpoint.tune.search.study import Study
from setpoint.tune.search.surrogate import Seen, Surrogate
from setpoint.tune.search.trial import Ask, Observation
from setpoint.tune.search.tuned import Loads, Tuned

SHARES = {"noise": 0.07, "load": 0.10, "race": 0.18, "refine": 0.22, "capacity": 0.12, "certify": 0.31}
WORTH = 0.002  # of a gain that is expected of a run: less is not worth it
MAX_NOISE = 0.10
NOISE_PAIRS = 3
MOST_NOISE_PAIRS = (
    6  # where the first ones differ by more than is allowed: it may have been the beginning, or one queue
)
LOWEST_LOAD, HIGHEST_LOAD = 1 / 64, 256.0
LEAST_RUN_S = 3.0
AGAIN = 2  # times that a run which says nothing is repeated
RACE_AT = 1.25  # of the default's capacity: below it, whatever is better than the default looks alike
BOUNDS, MOST_STEADY = 6.0, 1 / 25  # of the slowest bound, a run shows a queue that grows; at most so much of the budget
Measure = Callable[[Ask], Observation]
Say = Callable[[str], None]


class TooNoisyError(SetpointError):
    """The machine does not give equal answers to equal questions."""

    exit_code = 1


@dataclass(frozen=True)
class Job:
    """What to tune. `predict(setting)` gives a score of the same kind as measured ones, or None if nothing is known
    of this model; `start_load` is where the default's capacity is expected, times the trace's own; `slowest_s` is the
    largest bound on a latency: a queue that grows is seen in a run that is much longer than that."""

    dimensions: tuple[Dimension, ...]
    budget_s: float
    predict: Callable[[Setting], float] | None = None
    model_error: float = 0.1
    start_load: float = 1.0
    accept_noise: bool = False
    most_candidates: int = 24
    slowest_s: float = 0.0


class Tuner:
    def __init__(self, job: Job, measure: Measure, study: Study, say: Say = lambda line: None) -> None:
        self.job, self._measure, self._study, self._say = job, measure, study, say
        self.spent_s = 0.0
        self.best = "default"
        self._repeated = 0
        self._asked_s = 0.0
        self._until_s = 0.0
        self._predicted: dict[Setting, float] = {}
        self.run_s = max(LEAST_RUN_S, job.budget_s / 50)
        self.steady_s = max(self.run_s, min(BOUNDS * job.slowest_s, MOST_STEADY * job.budget_s))

    def run(self) -> Tuned:
        """Raises TooNoisyError, or what `measure` raises; then there is no result."""
        noise = self._noise()
        own = self._loads(DEFAULT, self.job.start_load, "load", self.run_s)
        load = RACE_AT * own.capacity if own.capacity else LOWEST_LOAD
        tuned = Tuned(Decision("invalid", None, ""), noise, load)
        settings = self._screened()
        self._begin("race")
        count = self._fitting(len(settings))
        result = race(
            settings[:count],
            self._ask,
            load=load,
            first_s=self.run_s / 4,
            noise=noise,
            has_time=lambda seconds: self.spent_s + seconds <= self._until_s,
        )
        tuned.rungs = result.rungs
        tuned.racers = self._refined(result.racers, load, noise)
        finalists = self._ranked(tuned.racers, noise)
        self.best = text(finalists[0]) if finalists else "default"
        self._capacities(tuned, own, finalists[:2])
        self._certify(tuned)
        tuned.spent_s = self.spent_s
        if self._repeated:
            tuned.notes.append(f"{self._repeated} runs said nothing and were repeated; the study has their reasons")
        return tuned

    # --- stages --------------------------------------------------------------------------------------------------

    def _noise(self) -> float:
        """The default against itself, in pairs, where no queue makes small differences large."""
        self._begin("noise")
        ratios: list[float] = []
        for pair in range(MOST_NOISE_PAIRS):
            if pair >= NOISE_PAIRS and _noise_of(ratios) <= MAX_NOISE:
                break
            asks = [Ask(f"noise {side}", DEFAULT, self.job.start_load / 2, "tune", pair, self.run_s) for side in "ab"]
            one, other = (self._ask(ask) for ask in asks)
            if one.counts and other.counts and one.token_s > 0 and other.token_s > 0:
                ratios.append(math.log(other.token_s / one.token_s))
            elif not (one.counts and other.counts) and not self.job.accept_noise:
                detail = one.detail if not one.counts else other.detail
                raise TooNoisyError(f"the machine is too noisy to tune on ({detail}); quiet it, or give --accept-noise")
        if not ratios:
            raise TooNoisyError("no two equal runs could be compared; see the study file")
        noise = _noise_of(ratios)
        self._say(f"noise between equal runs: {noise:.1%}")
        if noise > MAX_NOISE and not self.job.accept_noise:
            raise TooNoisyError(
                f"equal runs differ by {noise:.0%} (at most {MAX_NOISE:.0%}): this machine is too noisy to tune on; "
                "quiet it, or give --accept-noise"
            )
        return noise

    def _loads(self, setting: Setting, start: float, stage: str, seconds: float, runs: int = 7) -> Loads:
        """Doubling or halving to both sides of the SLA, then the middle, while there is time."""
        if stage == "load":
            self._begin("load")
        met, failed, load = 0.0, math.inf, start
        points: list[tuple[float, Observation]] = []
        step = 2.0 if stage == "load" else 1.3
        for number in range(runs):
            if number >= 3 and met and math.isfinite(failed) and self.spent_s + seconds > self._until_s:
                break
            seen = self._ask(Ask(stage, setting, load, "tune", 100 + number, seconds))
            if not seen.counts and seen.state != "failed":
                continue  # it says nothing; other arrivals next time
            points.append((load, seen))
            if seen.is_met:
                met = max(met, load)
                failed = failed if failed > met else math.inf
            else:
                failed = min(failed, load)
                met = met if met < failed else 0.0
            if not met:
                load = failed / step
            elif math.isinf(failed):
                load = met * step
            elif failed / met < 1.08:
                break
            else:
                load = math.sqrt(met * failed)
            if not LOWEST_LOAD <= load <= HIGHEST_LOAD:
                break
        found = Loads(setting, met, failed, tuple(points))
        shown = "no load holds the SLA" if not found.capacity else f"holds the SLA up to about {found.capacity:.3g} x"
        self._say(f"{text(setting)}: {shown}")
        return found

    def _screened(self) -> list[Setting]:
        """All settings by prediction; what the prediction does not tell apart stays in, the simplest first."""
        everything = self._everything()
        if self.job.predict is None or not everything:
            return everything[: self.job.most_candidates]
        self._say(f"screening {len(everything)} settings by simulation")
        self._predicted = {setting: self.job.predict(setting) for setting in (DEFAULT, *everything)}
        thought = Surrogate(self.job.dimensions, self._predicted, self.job.model_error).gains(everything)[0]
        return shortlist(
            list(zip(everything, thought.tolist(), strict=True)), self.job.most_candidates, self.job.model_error
        )

    def _everything(self) -> list[Setting]:
        return candidates(self.job.dimensions, self.job.most_candidates * 3)

    def _fitting(self, count: int) -> int:
        """How many can race: half of the race's time is for the first rung."""
        time_s = (self._until_s - self.spent_s) / 2
        return max(2, min(count, int(time_s / (self.run_s / 4) * 3 / 4)))

    def _refined(self, racers: tuple[Racer, ...], load: float, noise: float) -> tuple[Racer, ...]:
        """All racers, after more runs where they are worth most: of the best, and of what may be better.

        Short runs, since what differs between equal runs does so whatever their length.
        """
        self._begin("refine")
        raced = {racer.setting: racer for racer in racers}
        everything = self._everything() if self.job.dimensions else []
        seconds = max(LEAST_RUN_S, self.run_s / 2)
        for number in itertools.count():
            open_ = [s for s in everything if s not in raced or raced[s].pairs]  # what failed is not tried again
            if not open_ or self.spent_s + 3 * seconds > self._until_s:
                break
            pair = self._worth_a_run(open_, list(raced.values()), noise)
            if not pair:
                break
            result = race(
                pair, self._ask, load=load, first_s=seconds, noise=noise, seed=2000 + number, keep=2,
                has_time=lambda needed: self.spent_s + needed <= self._until_s,
            )  # fmt: skip
            if not result.rungs:
                break
            for racer in result.racers:
                raced[racer.setting] = joined(raced.get(racer.setting), racer)
        return tuple(raced.values())

    def _worth_a_run(self, settings: Sequence[Setting], racers: Sequence[Racer], noise: float) -> list[Setting]:
        """Who is thought best, and of whom most is expected beyond that; nothing where that is little."""
        thought = self._thought(racers, noise)
        means = thought.gains(settings)[0]
        first = int(means.argmax())
        hopes = thought.improvement(settings, max(float(means[first]), 0.0))
        hopes[first] = 0.0
        second = int(hopes.argmax())
        if float(hopes[second]) < WORTH:
            return []
        return [settings[first], settings[second]]

    def _thought(self, racers: Sequence[Racer], noise: float) -> Surrogate:
        seen = [Seen(racer.setting, racer.mean, mean_variance(racer, noise)) for racer in racers if racer.pairs]
        return Surrogate(self.job.dimensions, self._predicted, self.job.model_error, seen)

    def _ranked(self, racers: Sequence[Racer], noise: float) -> list[Setting]:
        """Those still in, by what their runs, their neighbours' and the simulation say together."""
        still = [racer.setting for racer in racers if not racer.out and racer.pairs]
        if not still:
            return []
        gains = self._thought(racers, noise).gains(still)[0].tolist()
        ranked = sorted(zip(gains, still, strict=True), key=lambda pair: -pair[0])
        return [setting for _, setting in ranked]

    def _capacities(self, tuned: Tuned, own: Loads, finalists: Sequence[Setting]) -> None:
        self._begin("capacity")
        tuned.loads = [own]
        for number, setting in enumerate(finalists):
            if number and self.spent_s + 4 * self.steady_s > self._until_s:
                tuned.notes.append(f"no time was left for {text(setting)}")
                continue
            tuned.loads.append(self._loads(setting, tuned.load, f"capacity {number}", self.steady_s, runs=6))
        tuned.slope = probit_slope([point for loads in tuned.loads for point in loads.points])

    def _certify(self, tuned: Tuned) -> None:
        self._begin("certify")
        own, *others = tuned.loads
        at = {loads.setting: loads.promising for loads in others if loads.capacity}
        at = dict(sorted(at.items(), key=lambda pair: -pair[1])[:2])
        if own.capacity is None and not at:
            tuned.decision = Decision("not met", None, _nowhere(tuned.loads))
            return
        proof = Proof(
            self._ask,
            lambda: (self.job.budget_s - self.spent_s) / self._overhead,
            least_s=self.run_s,
            slope=tuned.slope,
            noise=tuned.noise,
        )
        found = proof.of(at, own.promising if own.capacity else None)
        tuned.decision, tuned.finalists, tuned.default = found.decision, found.finalists, found.default
        tuned.stressed = found.stressed

    @property
    def _overhead(self) -> float:
        """What a run costs over what was asked for: requests under way end after it."""
        return max(1.0, self.spent_s / self._asked_s) if self._asked_s else 1.0

    # --- runs ----------------------------------------------------------------------------------------------------

    def _begin(self, stage: str) -> None:
        """Time that an earlier stage left over is this one's."""
        ends, total = 0.0, 0.0
        for name, share in SHARES.items():
            total += share
            if name == stage:
                ends = total
        self._until_s = ends * self.job.budget_s

    def _ask(self, ask: Ask) -> Observation:
        """A run that a tripwire made invalid is repeated: it says nothing of the setting, only of the moment."""
        seen = self._ask_once(ask)
        for number in range(1, AGAIN + 1):
            if seen.state != "invalid" or self.spent_s + ask.seconds > self.job.budget_s:
                break
            self._repeated += 1
            seen = self._ask_once(replace(ask, stage=f"{ask.stage} again {number}"))
        return seen

    def _ask_once(self, ask: Ask) -> Observation:
        seen = self._study.find(ask)
        if seen is None:
            seen = self._measure(ask)
            self._study.add(ask, seen)
        self.spent_s += seen.cost_s
        self._asked_s += ask.seconds
        left = max(0.0, self.job.budget_s - self.spent_s)
        state = f"{seen.attainment:.1%} good" if seen.counts else seen.state
        detail = f" ({seen.detail[:160]})" if seen.detail else ""
        self._say(
            f"{ask.stage:<18} {text(ask.setting):<44} load {ask.load:.3g} x: {state}{detail}; best {self.best}, "
            f"{left:.0f} s left"
        )
        return seen


def _noise_of(ratios: Sequence[float]) -> float:
    """Of one run, from the logarithms of the ratios of equal runs: the last few."""
    last = ratios[-NOISE_PAIRS:]
    return math.sqrt(sum(ratio**2 for ratio in last) / len(last) / 2) if last else math.inf


def _nowhere(loads: Sequence[Loads]) -> str:
    """What the lowest load that was tried shows, where none held."""
    tried = min((point for found in loads for point in found.points), key=lambda point: point[0], default=None)
    if tried is None:
        return "nothing ran"
    seen = tried[1]
    told = f"at {seen.rate_rps:.2f} requests/s, the lowest load tried"
    share = seen.shares.get(seen.margin[0])
    if share is None:
        return f"{seen.detail or 'nothing is known'} {told}"
    return f"{seen.margin[0]}: {1 - share.met / share.n:.1%} of requests miss it {told}, {1 - share.level:.1%} may"


def check_budget(budget_s: float) -> None:
    if not 30 <= budget_s <= 7 * 86400:
        raise ConfigError("--budget must be from 30s to 7d")
