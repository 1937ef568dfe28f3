"""A known surface to tune on: what a tuner finds there can be compared with the truth, hundreds of times a minute.

Each setting has a true capacity; shares of requests follow a probit in the logarithm of the load. A run is disturbed
by noise that pairs share (arrivals) and noise of its own (the machine).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from setpoint.tune.search.space import Setting, text
from setpoint.tune.search.trial import BATCHES, CLIP, Ask, Observation, Share
from setpoint.tune.statistics import NORMAL


@dataclass(frozen=True)
class World:
    """`capacity(setting)` in times the trace's load; 0 = it crashes. `noise` is the deviation of a run's logarithm."""

    capacity: Callable[[Setting], float]
    noise: float
    seed: int
    rate_rps: float = 20.0  # at load 1
    slope: float = 6.0
    level: float = 0.95
    common_noise: float = 0.05

    def measure(self, ask: Ask) -> Observation:
        truth = self.capacity(ask.setting)
        own = random.Random(f"{self.seed}/{ask.stage}/{text(ask.setting)}/{ask.load:.6f}/{ask.seed}/{ask.part}")
        if truth <= 0:
            return Observation("failed", 1.0, "crashed")
        shared = random.Random(f"{self.seed}/{ask.part}/{ask.seed}").gauss(0, self.common_noise)
        disturbed = own.gauss(0, self.noise)
        distance = math.log(truth / ask.load) + shared + disturbed
        n = max(8, round(self.rate_rps * ask.load * ask.seconds))
        share = NORMAL.cdf(NORMAL.inv_cdf(self.level) + self.slope * distance)
        spread = math.sqrt(share * (1 - share) * n)
        met = float(sum(own.random() < share for _ in range(n))) if n < 400 else round(own.gauss(share * n, spread))
        met = min(max(met, 0.0), float(n))
        scores = tuple(
            min(CLIP, max(-CLIP, distance + own.gauss(0, 0.3 / math.sqrt(n / BATCHES)))) for _ in range(BATCHES)
        )
        return Observation(
            "ok",
            ask.seconds,
            requests=n,
            rate_rps=self.rate_rps * ask.load,
            attainment=met / n,
            token_s=math.exp(0.01 - disturbed),
            scores=scores,
            shares={"ttft.p95<1ms": Share(met, n, n, self.level)},
        )
