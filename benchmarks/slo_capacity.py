"""How much load each server carries within an SLA: Setpoint tuned and at its defaults, llama.cpp's at both too.

    python benchmarks/slo_capacity.py --out FILE [--workloads chat agent rag code] [--budget 600] [--runs 6]

Four kinds of traffic from the statistics of public workloads, lengths divided for a small model. The first 70 % of each
trace tunes: `setpoint tune` for `--budget` seconds, and for as long a greedy search over llama-server's flags, restarts
included. The rest measures: all servers are up at once, idle ones cost nothing, and take turns in runs of `--point`
seconds, each searching its own capacity by the same probit rule (`bench serve --find-capacity`); the order turns round
every time. Invalid runs (tripwires) are counted, shown and not used. FILE grows with every run; what is in it is not
measured again. Needs two CPUs and nothing else running.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import slo_rival
from peers import environments, servers
from setpoint.assemble import models_directory
from setpoint.cli.bench_serve import point_trace
from setpoint.loaders.hub import resolve_model
from setpoint.tune.metrics import Targets
from setpoint.tune.replay.capacity import CapacitySearch, capacity_document, point_of
from setpoint.tune.replay.client import ReplayOptions, replay
from setpoint.tune.replay.server import Surveyor
from setpoint.tune.search.trial import observe
from setpoint.tune.sla import Sla
from setpoint.workload.synth import synthesize
from setpoint.workload.trace import Trace, TraceError, write_trace
from setpoint.workload.transform import split

# An SLA that llama-server can hold at a low load: it reads some 300 tokens a second here, so prompts of the 95th
# percentile take it two seconds alone; a tighter one would make every ratio infinite and say nothing.
SLA = "ttft.p95<3s,tpot.p95<100ms"
LENGTHS = {"chat": 8.0, "agent": 16.0, "rag": 8.0, "code": 8.0}
TRACE_S, RATE, HOLDOUT = 1200.0, 1.0, 0.3
TIMEOUT_S = 20.0
RESTART_S = 2.0
SYSTEMS = ("tuned", "default", "llama.cpp best", "llama.cpp default")


@dataclass
class Entrant:
    name: str
    server: servers.Server
    search: CapacitySearch
    invalid: list[str] = field(default_factory=list)
    runs: int = 0

    @property
    def is_done(self) -> bool:
        return len(self.invalid) >= 4 or self.search.next_factor() is None


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.sla = Sla.parse(options.slo)
        self.targets = Targets.parse([options.slo])
        self.model = resolve_model(options.model, models_directory())
        self.program = environments.llama_server(options.llama_server)
        self.document: dict[str, Any] = {"sla": options.slo, "model": options.model, "workloads": {}}
        if options.out.exists():
            self.document = json.loads(options.out.read_text())

    def workload(self, name: str) -> None:
        rows = self.document["workloads"]
        if rows.get(name, {}).get("done"):
            return
        with tempfile.TemporaryDirectory() as text:
            folder = Path(text)
            trace = synthesize(name, rate=RATE, seconds=TRACE_S, seed=7, length_scale=LENGTHS[name])
            tune_on, held_out = split(trace, 1 - HOLDOUT)
            row = rows.setdefault(name, {"lengths_divided_by": LENGTHS[name], "requests": len(trace.requests)})
            if "recipe" not in row:
                row["recipe"] = self._recipe(trace, folder, name)
                self._save()
            if "flags" not in row:
                flags, trials = self._flags(tune_on, folder)
                row |= {"flags": list(flags), "flag_trials": trials}
                self._save()
            self._capacities(row, held_out, folder)
            row["done"] = True
            self._save()

    def _recipe(self, trace: Trace, folder: Path, name: str) -> dict[str, Any]:
        """`setpoint tune` as a user runs it; it holds out the same 30 %."""
        write_trace(trace, folder / "trace.jsonl")
        command = [sys.executable, "-m", "setpoint.cli.main", "tune", self.options.model, "--trace", "trace.jsonl"]
        command += ["--slo", self.options.slo, "--budget", f"{self.options.budget}s", "--json"]
        began = time.monotonic()
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        seconds = time.monotonic() - began
        say(f"{name}: setpoint tune ended with {done.returncode} after {seconds:.0f} s")
        say("\n".join(done.stderr.splitlines()[-6:]))
        path = folder / "recipe.toml"
        found = json.loads(done.stdout) if done.stdout.startswith("{") else {}
        for key in ("capacities", "race"):
            found.pop(key, None)
        text = path.read_text() if path.exists() else None
        return {"exit_code": done.returncode, "seconds": seconds, "toml": text, "outcome": found}

    def _flags(self, trace: Trace, folder: Path) -> tuple[slo_rival.Flags, list[dict[str, object]]]:
        """At the load where its defaults are near their limit; for as long as ours."""
        load = [1 / 4]
        until = time.monotonic() + self.options.budget
        with slo_rival.start(self.program, self.model, folder) as server:
            while time.monotonic() < until - 0.7 * self.options.budget and load[-1] < 64:
                if not observe(self._run(server, trace, load[-1], 20, 0), self.sla, 0.0).is_met:
                    break
                load.append(load[-1] * 1.6)
        say(f"llama-server's flags are compared at {load[-1]:.2f} x")

        left = until - time.monotonic()
        seconds = max(10.0, left / (slo_rival.NUM_TRIALS + 1) - RESTART_S)

        def score(server: servers.Server) -> float:
            for _ in range(3):
                seen = observe(self._run(server, trace, load[-1], seconds, 1), self.sla, 0.0)
                if seen.counts:
                    return seen.score
            raise servers.ServerFailed(f"no valid run: {seen.detail}")

        return slo_rival.best_flags(self.program, self.model, folder, score, left, say)

    def _run(
        self, server: servers.Server, trace: Trace, load: float, seconds: float, seed: int, *, warm: bool = False
    ) -> Any:
        part = None
        while part is None:
            try:
                part = point_trace(trace, load, seconds, seed)
            except TraceError:  # nobody arrives in this part of it
                seed += 1000
        options = ReplayOptions(f"slo {seed} {load:.4f}", timeout_s=TIMEOUT_S, warm_up=warm)
        with Surveyor(f"http://127.0.0.1:{server.port}") as surveyor:
            target = surveyor.target(temperature=0.8)
            return replay(surveyor, target, part, options, slas=self.targets.all)

    def _capacities(self, row: dict[str, Any], trace: Trace, folder: Path) -> None:
        recipe = row["recipe"]["toml"]
        row["tuned_is_default"] = recipe is None or not row["recipe"]["outcome"].get("knobs")
        with ExitStack() as stack:
            found: dict[str, servers.Server] = {}
            if not row["tuned_is_default"]:
                (folder / "recipe.toml").write_text(recipe)
                flags = ("--recipe", folder / "recipe.toml")
                found["tuned"] = stack.enter_context(self._ours(folder / "tuned.log", *flags))
            found["default"] = stack.enter_context(self._ours(folder / "default.log"))
            found["llama.cpp default"] = stack.enter_context(slo_rival.start(self.program, self.model, folder))
            if row["flags"]:
                best = slo_rival.start(self.program, self.model, folder, tuple(row["flags"]))
                found["llama.cpp best"] = stack.enter_context(best)
            starts = {name: 1 / 2 if "llama" in name else 4.0 for name in found}
            entrants = [
                Entrant(name, server, CapacitySearch(start=starts[name], max_points=self.options.runs))
                for name, server in found.items()
            ]
            self._interleave(row, entrants, trace)
        row["capacity_ratios"] = ratios(row)

    def _ours(self, log: Path, *flags: object) -> servers.Server:
        command = [sys.executable, "-m", "setpoint.cli.main", "serve", self.options.model]
        return servers.Server([*command, *map(str, flags)], "/readyz", log)

    def _interleave(self, row: dict[str, Any], entrants: list[Entrant], trace: Trace) -> None:
        base_rate = len(trace.requests) / trace.seconds
        number = 0
        while any(not entrant.is_done for entrant in entrants):
            number += 1
            for entrant in entrants if number % 2 else entrants[::-1]:
                factor = entrant.search.next_factor()
                if entrant.is_done or factor is None:
                    continue
                run = self._run(entrant.server, trace, factor, self.options.point, 100 + number, warm=entrant.runs == 0)
                entrant.runs += 1
                if run.is_valid:
                    entrant.search.add(point_of(run, factor, self.targets))
                    last = entrant.search.points[-1]
                    told = f"{last.attainment:.1%} good, {'met' if last.is_met else 'not met'}"
                else:
                    told = "; ".join(f"{v.tripwire}: {v.detail}" for v in run.verdicts if v.outcome == "invalid")
                    entrant.invalid.append(told)
                say(f"{entrant.name}: {factor * base_rate:.2f} requests/s: {told}")
                capacity = capacity_document(entrant.search.result(), base_rate)
                row.setdefault("capacity", {})[entrant.name] = capacity | {"invalid_runs": entrant.invalid}
                self._save()

    def _save(self) -> None:
        self.options.out.write_text(json.dumps(self.document, indent=1, default=str) + "\n")


def ratios(row: dict[str, Any]) -> dict[str, Any]:
    """Of capacities, with 95 % intervals from those of the two; a system without a capacity gives none."""
    found = row["capacity"]
    tuned = "default" if row["tuned_is_default"] else "tuned"
    best = "llama.cpp best" if row["flags"] else "llama.cpp default"
    pairs = {
        "tuned / default": (tuned, "default"),
        "tuned / llama.cpp best": (tuned, best),
        "tuned / llama.cpp default": (tuned, "llama.cpp default"),
    }
    return {name: _ratio(found[one], found[other]) for name, (one, other) in pairs.items()}


def _ratio(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any] | None:
    rates = [side["rate_rps"] for side in (one, other)]
    if any(rate is None for rate in rates):
        return None
    if one is other:
        return {"estimate": 1.0, "ci95": [1.0, 1.0]}
    estimate = rates[0]["estimate"] / rates[1]["estimate"]
    if any(rate["ci95"][1] is None or rate["ci95"][0] <= 0 for rate in rates):
        return {"estimate": estimate, "ci95": None}
    half = math.hypot(*(math.log(rate["ci95"][1] / rate["ci95"][0]) / 2 for rate in rates))
    return {"estimate": estimate, "ci95": [estimate * math.exp(-half), estimate * math.exp(half)]}


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def table(document: dict[str, Any]) -> str:
    lines = ["| workload | " + " | ".join(SYSTEMS) + " | tuned / default | tuned / llama.cpp best |"]
    lines.append("|---" * (len(SYSTEMS) + 3) + "|")
    for name, row in document["workloads"].items():
        rates = [(row.get("capacity", {}).get(system) or {}).get("rate_rps") for system in SYSTEMS]
        cells = ["-" if rate is None else f"{rate['estimate']:.2f}/s" for rate in rates]
        for pair in ("tuned / default", "tuned / llama.cpp best"):
            ratio = row.get("capacity_ratios", {}).get(pair)
            interval = "" if not ratio or not ratio["ci95"] else " [{:.2f}, {:.2f}]".format(*ratio["ci95"])
            cells.append("-" if ratio is None else f"{ratio['estimate']:.2f}{interval}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--slo", default=SLA)
    parser.add_argument("--workloads", nargs="+", choices=list(LENGTHS), default=list(LENGTHS))
    parser.add_argument("--budget", type=int, default=600, help="seconds of tuning, for each side")
    parser.add_argument("--runs", type=int, default=6, help="of a capacity search")
    parser.add_argument("--point", type=float, default=25.0, help="seconds of a run")
    parser.add_argument("--llama-server", type=Path, help="one that is built already")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    bench = Bench(options)
    for name in options.workloads:
        bench.workload(name)
    print(table(bench.document))


if __name__ == "__main__":
    main()
