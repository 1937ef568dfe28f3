"""What holding a recipe's SLA is worth while traffic changes, over HTTP: attainment of the default, the recipe, and the
recipe held.

    python benchmarks/hold_live.py --recipe recipe.toml --trace trace.jsonl --output FILE [--seeds 2] [--part 20]

Each run is three parts of `--part` seconds: traffic at `--load` times the certified rate; in the middle part twice as
many requests, or prompts four times as long; as before again. All three servers are up at once and take turns on the
same arrivals; an idle one costs nothing. The trace is the one that was tuned on: its held-out part is used. Refusals,
errors and timeouts are misses. Invalid runs (tripwires) are in FILE and in no figure. Needs two CPUs and nothing else
running.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from peers import servers
from setpoint.assemble import survey
from setpoint.cli.bench_serve import point_trace
from setpoint.cli.tune import HOLDOUT
from setpoint.config import EngineConfig
from setpoint.tune.metrics import Targets, summarize
from setpoint.tune.recipe import read_recipe
from setpoint.tune.replay.client import ReplayOptions, replay
from setpoint.tune.replay.server import Surveyor
from setpoint.workload.trace import Trace, read_trace
from setpoint.workload.transform import split

TIMEOUT_S = 20.0
MAX_PROMPT = 1500
SCENARIOS = ("rate x2", "prompts x4")
BLOCKS, SESSIONS = 1 << 44, "~part"  # so that the parts share what sessions of a trace share by nothing but chance


def traffic(trace: Trace, scenario: str, load: float, part_s: float, seed: int) -> Trace:
    """Three parts; the middle one is changed."""
    requests = []
    for number in range(3):
        changed = number == 1
        factor = load * (2 if changed and scenario == "rate x2" else 1)
        for request in point_trace(trace, factor, part_s, seed + 10 * number).requests:
            tokens = request.input_tokens
            if changed and scenario == "prompts x4":
                tokens = max(tokens, min(4 * tokens, MAX_PROMPT))
            requests.append(
                replace(
                    request,
                    arrival_s=request.arrival_s + number * part_s,
                    input_tokens=tokens,
                    session=None if request.session is None else f"{request.session}{SESSIONS}{number}",
                    hash_ids=tuple(block + number * BLOCKS for block in request.hash_ids),
                )
            )
    return Trace(trace.header, requests)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--part", type=float, default=20.0)
    parser.add_argument("--load", type=float, default=0.8, help="of the rate that the recipe is certified for")
    given = parser.parse_args()
    recipe = read_recipe(given.recipe)
    targets = Targets.parse([recipe.sla])
    _, held_out = split(read_trace(given.trace), 1 - HOLDOUT)
    load = given.load * float(recipe.evidence["rate_rps"]) / (len(held_out.requests) / held_out.seconds)
    runs: list[dict[str, Any]] = []

    def figures() -> dict[str, Any]:
        found: dict[str, Any] = {}
        for scenario in SCENARIOS:
            of = {row["system"]: [] for row in runs}  # type: dict[str, list[float]]
            for row in runs:
                if row["scenario"] == scenario and not row["invalid"]:
                    of[row["system"]].append(row["attainment"])
            found[scenario] = {name: round(statistics.mean(values), 4) for name, values in of.items() if values}
        return found

    with tempfile.TemporaryDirectory() as text, ExitStack() as stack:
        folder = Path(text)
        serve = [sys.executable, "-m", "setpoint.cli.main", "serve", given.model]
        knobs = [word for name, value in recipe.knobs.items() for word in (f"--{name.replace('_', '-')}", value)]
        memory = survey(EngineConfig(model=given.model)).config.kv_cache_memory_bytes  # as the trials had
        commands = {
            "default": [],
            "recipe": [*knobs, "--kv-cache-memory-bytes", memory],
            "recipe, held": ["--recipe", given.recipe.resolve()],
        }
        found = {
            name: stack.enter_context(servers.Server([*serve, *map(str, words)], "/readyz", folder / f"{at}.log"))
            for at, (name, words) in enumerate(commands.items())
        }
        number = 0
        for seed in range(given.seeds):
            for scenario in SCENARIOS:
                part = traffic(held_out, scenario, load, given.part, 500 + seed)
                for name in list(found)[:: 1 if number % 2 else -1]:
                    options = ReplayOptions(f"hold {scenario} {seed}", timeout_s=TIMEOUT_S, warm_up=number == 0)
                    with Surveyor(f"http://127.0.0.1:{found[name].port}") as surveyor:
                        run = replay(surveyor, surveyor.target(temperature=0.8), part, options, slas=targets.all)
                    seen = summarize(run, targets)
                    runs.append(
                        {
                            "system": name,
                            "scenario": scenario,
                            "seed": seed,
                            "attainment": seen.attainment,
                            "token_deadlines": seen.deadline_attainment,
                            "statuses": dict(Counter(log.status for log in run.arrivals)),
                            "by_part": by_part(run, given.part, targets),
                            "invalid": [v.detail for v in run.verdicts if v.outcome == "invalid"],
                        }
                    )
                    print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
                    document = {"sla": recipe.sla, "knobs": dict(recipe.knobs), "load": given.load}
                    document |= {"rate_rps": load * len(held_out.requests) / held_out.seconds, "part_s": given.part}
                    document |= {"attainment": figures(), "runs": runs}
                    given.output.write_text(json.dumps(document, indent=1) + "\n")
                number += 1
    print(json.dumps(figures()))


def by_part(run: Any, part_s: float, targets: Targets) -> list[float]:
    """Attainment of what arrived in each part."""
    sla = targets.all[0]
    found = []
    for number in range(3):
        timings = [log.timing for log in run.arrivals if number <= log.scheduled_s / part_s < number + 1]
        found.append(round(sla.attainment(timings), 4) if timings else 1.0)
    return found


if __name__ == "__main__":
    main()
