"""What tuning does where the truth is known: false wins (T1), a planted optimum with a crash region (T2).

    python benchmarks/tunebench.py [--decisions 1000] [--seeds 50] [--certificates 200]

T1: all settings are as good as the default; a `certified` verdict is a false win: at most 65 of 1,000. T2: a known
surface over the real search space, 2-5 % noise between runs, predictions that are off by 10 %. Regret against the best
of all settings, of what comes out and of what the search put first (a gain below twice the noise is never shipped);
false certificates name a setting that is not 2 % better than the default. All on `tune.virtual_world`; the figures do
not depend on the machine. Last line: JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
import time
from collections import Counter

from setpoint.config import EngineConfig
from setpoint.tune.search.space import DEFAULT, Setting, setting_of, space, text
from setpoint.tune.search.study import Study
from setpoint.tune.search.tuner import Job, TooNoisyError, Tuner
from setpoint.tune.search.virtual_world import World

DIMENSIONS = space(EngineConfig(model="any"))
EVERYTHING = [setting_of(DIMENSIONS, values) for values in itertools.product(*(d.values for d in DIMENSIONS))]
MODEL_ERROR = 0.10
BUDGET_S = 600.0
ALLOWED_REGRET = 0.03


def surface(seed: int):  # type: ignore[no-untyped-def]
    """A smooth hill over the ranks of the knobs' values, its top somewhere, and a corner that crashes."""
    chance = random.Random(seed)
    tops = [chance.uniform(0, len(d.values) - 1) for d in DIMENSIONS]
    widths = [chance.uniform(0.02, 0.08) for _ in DIMENSIONS]

    def capacity(setting: Setting) -> float:
        chosen = dict(setting)
        ranks = [d.values.index(chosen.get(d.knob, d.default)) for d in DIMENSIONS]
        if chosen.get("max_num_seqs") == 256 and chosen.get("max_num_batched_tokens", 512) >= 1024:
            return 0.0
        distance = sum(w * (r - t) ** 2 for r, t, w in zip(ranks, tops, widths, strict=True))
        return 1.5 * math.exp(-distance)

    return capacity


def tune(world: World, predicts: bool, budget_s: float = BUDGET_S):  # type: ignore[no-untyped-def]
    def predict(setting: Setting) -> float:
        off = random.Random(f"{world.seed}/{text(setting)}").gauss(0, MODEL_ERROR)
        return math.log(max(world.capacity(setting), 0.05)) + off

    start = max(world.capacity(DEFAULT), 0.05)
    job = Job(DIMENSIONS, budget_s, predict if predicts else None, MODEL_ERROR, start)
    study = Study(None, {})
    return Tuner(job, world.measure, study).run(), study


def false_wins(decisions: int) -> dict[str, object]:
    verdicts: Counter[str] = Counter()
    covered = gains = 0
    for seed in range(decisions):
        found, _ = tune(World(lambda setting: 1.0, 0.02 + 0.03 * (seed % 4) / 3, seed), predicts=False)
        verdicts[found.decision.verdict] += 1
        for one in found.finalists[:1]:
            if one.gain is not None:
                gains += 1
                covered += one.gain.low <= 0 <= one.gain.high
    wins = verdicts["certified"]
    return {
        "decisions": decisions,
        "false_wins": wins,
        "passes": wins <= 0.065 * decisions,
        "verdicts": dict(verdicts),
        "gain_interval_covers_0": covered / max(gains, 1),
        "intervals": gains,
    }


def planted(seeds: int, certificates: int) -> dict[str, object]:
    regrets, searched, verdicts, trials, false, refused = [], [], Counter(), [], 0, 0  # type: ignore[var-annotated]
    for seed in range(max(seeds, certificates)):
        capacity = surface(seed)
        noise = 0.02 + 0.03 * (seed % 4) / 3
        try:
            found, study = tune(World(capacity, noise, seed), predicts=True)
        except TooNoisyError:
            refused += 1
            continue
        chosen = found.decision.chosen
        own = capacity(DEFAULT)
        if found.decision.verdict == "certified" and chosen is not None and capacity(chosen.setting) <= own * 1.02:
            false += 1
        if seed < seeds:
            best = max(map(capacity, EVERYTHING))
            verdicts[found.decision.verdict] += 1
            regrets.append(1 - capacity(DEFAULT if chosen is None else chosen.setting) / best)
            first = found.loads[1].setting if len(found.loads) > 1 else DEFAULT
            searched.append(1 - max(capacity(first), own) / best)
            trials.append(len({ask.setting for ask, _ in study.lines}))
    within = sum(regret <= ALLOWED_REGRET for regret in regrets)
    return {
        "seeds": seeds,
        "within_3_percent": within,
        "passes_regret": within >= 0.9 * seeds,
        "search_within_3_percent": sum(regret <= ALLOWED_REGRET for regret in searched),
        "search_regret_p90": sorted(searched)[int(0.9 * (len(searched) - 1))],
        "regret_median": statistics.median(regrets),
        "regret_p90": sorted(regrets)[int(0.9 * (len(regrets) - 1))],
        "settings_tried_median": statistics.median(trials),
        "settings_tried_max": max(trials),
        "verdicts": dict(verdicts),
        "false_certificates": false,
        "of": certificates,
        "refused": refused,
        "passes_certificates": false <= 0.05 * certificates,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decisions", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--certificates", type=int, default=200)
    given = parser.parse_args()
    began = time.perf_counter()
    result = {"t1": false_wins(given.decisions), "t2": planted(given.seeds, given.certificates)}
    print(json.dumps({"benchmark": "tunebench", "seconds": round(time.perf_counter() - began, 1), **result}))


if __name__ == "__main__":
    main()
