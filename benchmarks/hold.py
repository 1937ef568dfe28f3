"""What holding an SLA is worth while load changes: the engine with and without its pacer, on the virtual clock.

    python benchmarks/hold.py [--seeds 5] [--seconds 90] [--output FILE]

Real scheduler, simulated steps (a probe's cost of SmolLM2-135M on two CPUs). Two scenarios change in the middle third
of the run: requests come twice as often; prompts are four times as long. Two are hard throughout: guesses that are
mostly wrong, and a KV cache with room for about five answers. Both engines see the same arrivals. All figures are over
all arrivals of the run: who is refused or late is a miss. Token-deadline attainment counts every token asked for.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections import Counter
from pathlib import Path

from setpoint.engine.plan import KVGroup, RunnerInfo
from setpoint.engine.scheduler import SchedulerLimits
from setpoint.engine.slo import HeldSla
from setpoint.engine.step_cost import Rising, StepCost
from setpoint.tune.metrics import Targets, summarize
from setpoint.tune.simulate.simulator import EngineSetup, simulate
from setpoint.workload.trace import Trace, TraceHeader, TraceRequest

SLA = "ttft.p95<500ms,tpot.p95<40ms"
COST = StepCost(
    Rising(
        (1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
        (3.25e-3, 3.25e-3, 3.74e-3, 5.94e-3, 9.11e-3, 17.5e-3, 34.6e-3, 76.5e-3, 126.9e-3, 237.4e-3),
    ),
    Rising((0, 1, 2, 8, 16, 32, 64), (0.0, 0.0, 0.18e-3, 0.54e-3, 3.38e-3, 6.69e-3, 16.0e-3)),
    1.49e-5,
    6.2e-7,
    3.0e-7,
    1.43e-4,
    1.03e-5,
)
SCENARIOS = ("rate x2", "prompts x4", "wrong guesses", "KV pressure")
RATE = 3.2  # requests a second before the change: the engine alone keeps the SLA


def traffic(scenario: str, seconds: float, seed: int) -> Trace:
    """Poisson arrivals of chats: about 200 tokens in, 60 out, both spread widely."""
    rng, at, requests = random.Random(seed), 0.0, []
    while True:
        changed = seconds / 3 <= at < 2 * seconds / 3
        at += rng.expovariate(RATE * (2 if scenario == "rate x2" and changed else 1))
        if at >= seconds:
            break
        changed = seconds / 3 <= at < 2 * seconds / 3
        length = min(max(round(rng.lognormvariate(5.1, 0.6)), 8), 900)
        if scenario == "prompts x4" and changed:
            length = min(4 * length, 1800)
        requests.append(TraceRequest(at, length, min(max(round(rng.lognormvariate(3.9, 0.6)), 2), 240)))
    return Trace(TraceHeader(scenario), requests)


def setup(scenario: str) -> EngineSetup:
    blocks = 80 if scenario == "KV pressure" else 2000
    limits = SchedulerLimits(max_num_seqs=64, max_num_batched_tokens=512, max_drafts=4)
    survival = (0.15, 0.03, 0.01, 0.0) if scenario == "wrong guesses" else ()
    return EngineSetup(RunnerInfo(4096, 2048, (KVGroup(blocks, None, 1 << 15),), 16), limits, COST, survival=survival)


def figures(trace: Trace, engine: EngineSetup, seed: int) -> dict[str, float]:
    done = simulate(trace, engine, seed=seed, patience_s=30.0)
    summary = summarize(done.run, Targets.parse([SLA]))
    statuses = Counter(log.status for log in done.run.arrivals)
    return {
        "attainment": summary.attainment or 0.0,
        "goodput": summary.goodput or 0.0,
        "token_deadlines": summary.deadline_attainment or 0.0,
        "refused": statuses["rejected"] / max(summary.arrivals, 1),
        "preemptions": done.preemptions,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    held, report = HeldSla.parse(SLA), {}
    for scenario in ("steady", *SCENARIOS):
        rows: dict[str, list[dict[str, float]]] = {"static": [], "held": [], "held, no probe": []}
        for seed in range(arguments.seeds):
            trace, engine = traffic(scenario, arguments.seconds, seed), setup(scenario)
            for name in rows:
                fields = dict(vars(engine)) | {"held": None if name == "static" else held, "probed": name == "held"}
                rows[name].append(figures(trace, EngineSetup(**fields), seed))
        report[scenario] = {
            name: {key: round(statistics.mean(run[key] for run in runs), 4) for key in runs[0]}
            for name, runs in rows.items()
        }
        gains = [
            100 * (held_run["attainment"] - static["attainment"])
            for static, held_run in zip(rows["static"], rows["held"], strict=True)
        ]
        report[scenario]["gain_points"] = {"mean": round(statistics.mean(gains), 1), "least": round(min(gains), 1)}
        print(scenario, json.dumps(report[scenario]), flush=True)
    result = {"sla": SLA, "rate": RATE, "seeds": arguments.seeds, "seconds": arguments.seconds, "scenarios": report}
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
