"""Searches of settings beside each other, where the truth is known (T5): the same worlds, noise, load and seconds.

    python benchmarks/tuners.py [--seeds 50] [--output FILE]

Ours is what `setpoint tune` does up to its finalists, noise check and search of the load included, with and without a
simulation to start from (predictions that are off by 10 %). The others are policies, emulated on the same engine and
given the load for nothing: random, Halton (the low-discrepancy sequence), hill climbing by one knob, the order of
vLLM's auto_tune.sh (all of max_num_seqs x max_num_batched_tokens), Optuna's TPE and NSGA-II where it is installed
(`pip install optuna`; its Gaussian process needs torch). Runs last 12 s; each policy ends with the setting of the best
mean score. Regret is against the best of all settings. Holm-corrected Wilcoxon tests on pairs of seeds.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from setpoint.tune.search.space import DEFAULT, Setting, scattered, setting_of
from setpoint.tune.search.trial import Ask
from setpoint.tune.search.tuner import SHARES
from setpoint.tune.search.virtual_world import World
from setpoint.tune.statistics import holm, wilcoxon
from tunebench import DIMENSIONS, EVERYTHING, MODEL_ERROR, surface, tune

RUN_S = 12.0
SECONDS = (60.0, 120.0, 240.0, 360.0)  # of searching
WITHIN = 0.03
Scores = dict[Setting, list[float]]
Policy = Callable[[random.Random, Scores], Iterator[Setting]]


def at_random(chance: random.Random, scores: Scores) -> Iterator[Setting]:
    while True:
        yield chance.choice(EVERYTHING)


def halton(chance: random.Random, scores: Scores) -> Iterator[Setting]:
    while True:
        yield from scattered(DIMENSIONS, 60)


def auto_tune(chance: random.Random, scores: Scores) -> Iterator[Setting]:
    """Both batching knobs in nested loops, from the small values on; nothing else."""
    by_name = {dimension.knob: dimension for dimension in DIMENSIONS}
    seqs, tokens = (by_name[name] for name in ("max_num_seqs", "max_num_batched_tokens"))
    while True:
        for one in seqs.values:
            for other in tokens.values:
                chosen = {seqs.knob: one, tokens.knob: other}
                yield setting_of(DIMENSIONS, [chosen.get(d.knob, d.default) for d in DIMENSIONS])


def hill(chance: random.Random, scores: Scores) -> Iterator[Setting]:
    """A neighbouring value of one knob; whatever has the best mean so far is where it stands."""
    while True:
        here = dict(best_of(scores) if scores else DEFAULT)
        values = [here.get(d.knob, d.default) for d in DIMENSIONS]
        place = chance.randrange(len(DIMENSIONS))
        ranks = DIMENSIONS[place].values
        rank = ranks.index(values[place]) + chance.choice((-1, 1))
        values[place] = ranks[min(max(rank, 0), len(ranks) - 1)]
        yield setting_of(DIMENSIONS, values)


def optuna_policy(name: str) -> Policy | None:
    try:
        import optuna
    except ImportError:
        return None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    ranks = {d.knob: optuna.distributions.IntDistribution(0, len(d.values) - 1) for d in DIMENSIONS}

    def policy(chance: random.Random, scores: Scores) -> Iterator[Setting]:
        sampler = getattr(optuna.samplers, name)(seed=chance.randrange(1 << 30))
        study = optuna.create_study(direction="maximize", sampler=sampler)
        while True:
            trial = study.ask(dict(ranks))
            setting = setting_of(DIMENSIONS, [d.values[trial.params[d.knob]] for d in DIMENSIONS])
            before = len(scores.get(setting, ()))
            yield setting
            seen = scores.get(setting, [])
            if len(seen) > before:
                study.tell(trial, seen[-1])
            else:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)

    return policy


def best_of(scores: Scores) -> Setting:
    return max(scores, key=lambda setting: statistics.mean(scores[setting]))


def searched(policy: Policy, world: World, seconds: float) -> Setting:
    chance, scores, spent = random.Random(world.seed), {}, 0.0
    proposals = policy(chance, scores)
    number = 0
    while spent + RUN_S <= seconds:
        setting = DEFAULT if number == 0 else next(proposals)
        seen = world.measure(Ask("rival", setting, world.capacity(DEFAULT), "tune", number, RUN_S))
        spent += seen.cost_s
        number += 1
        if seen.counts:
            scores.setdefault(setting, []).append(seen.score)
    return best_of(scores)


def ours(world: World, seconds: float, predicts: bool) -> Setting:
    """The first finalist of a tuning whose stages up to there last so long."""
    share = sum(SHARES[stage] for stage in ("noise", "load", "race", "refine"))
    found, _ = tune(world, predicts, seconds / share)
    return found.loads[1].setting if len(found.loads) > 1 else DEFAULT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    policies: dict[str, Policy] = {"random": at_random, "Halton": halton, "hill climbing": hill, "auto_tune": auto_tune}
    for name, sampler in (("Optuna TPE", "TPESampler"), ("Optuna NSGA-II", "NSGAIISampler")):
        if (policy := optuna_policy(sampler)) is not None:
            policies[name] = policy
    searches: dict[str, Callable[[World, float], Setting]] = {
        "setpoint": lambda world, seconds: ours(world, seconds, True),
        "setpoint without simulation": lambda world, seconds: ours(world, seconds, False),
    }
    for name, policy in policies.items():
        searches[name] = lambda world, seconds, policy=policy: searched(policy, world, seconds)  # type: ignore[misc]
    began = time.perf_counter()
    worlds = [World(surface(seed), 0.02 + 0.03 * (seed % 4) / 3, seed) for seed in range(given.seeds)]
    regrets = {name: [[regret(search, w, s) for s in SECONDS] for w in worlds] for name, search in searches.items()}
    rows = {name: summary(found) for name, found in regrets.items()}
    rivals = list(policies)
    p_values = [
        one_sided([row[-1] for row in regrets["setpoint"]], [row[-1] for row in regrets[name]]) for name in rivals
    ]
    result = {
        "benchmark": "tuners",
        "seeds": given.seeds,
        "seconds_of_search": SECONDS,
        "model_error": MODEL_ERROR,
        "searches": rows,
        "setpoint_has_less_regret_p_holm": dict(zip(rivals, holm(p_values), strict=True)),
        "took_s": round(time.perf_counter() - began, 1),
    }
    for name, row in rows.items():
        print(name, json.dumps(row))
    if given.output is not None:
        given.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def regret(search: Callable[[World, float], Setting], world: World, seconds: float) -> float:
    best = max(map(world.capacity, EVERYTHING))
    return 1 - world.capacity(search(world, seconds)) / best


def summary(found: Sequence[Sequence[float]]) -> dict[str, object]:
    """By seconds of search; a seed that never comes within 3 % counts as infinite in the median time."""
    firsts = [next((s for s, r in zip(SECONDS, row, strict=True) if r <= WITHIN), float("inf")) for row in found]
    middle = statistics.median_low(firsts)
    columns = list(zip(*found, strict=True))
    return {
        "median_regret": [round(statistics.median(column), 4) for column in columns],
        "within_3_percent": [sum(r <= WITHIN for r in column) for column in columns],
        "median_s_to_within_3_percent": None if middle == float("inf") else middle,
    }


def one_sided(mine: Sequence[float], theirs: Sequence[float]) -> float:
    """Of the two-sided test, for less regret on our side."""
    differences = [other - one for one, other in zip(mine, theirs, strict=True)]
    two_sided = wilcoxon(differences)
    return two_sided / 2 if statistics.mean(differences) > 0 else 1 - two_sided / 2


if __name__ == "__main__":
    main()
