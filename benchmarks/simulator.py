"""How far the simulator may be trusted, and how fast it is (T3b of the reference).

    python benchmarks/simulator.py [--model smollm2-135m] [--seconds 8] [--traces chat code turns] [--merge FILE]
    python benchmarks/simulator.py --speed-only

Accuracy: the steps of the model are probed, then three traces that the probe has never seen are run on the real engine
in this process and on the simulated one, under several configurations (sequences, token budget, load). Compared are
the mean TPOT and the 95th percentile of TTFT of each run: median relative error, and the rank correlation over all
configurations of a trace. The same for what is commonly used instead: TPOT = a + b * batch (Little's law gives the
batch), TTFT of an M/D/1 queue, and TTFT = (a + b * input) * (1 + log2(concurrency) / 8). All get the same probe.

Speed: every preset simulated at a load that keeps the engine busy: virtual seconds in one second, microseconds a step,
and whose functions take them. The last line is JSON; `--merge` adds the rows of earlier runs with other traces.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import math
import platform
import pstats
import queue
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from setpoint.assemble import Survey, open_runner
from setpoint.config import EngineConfig
from setpoint.engine.engine import Engine
from setpoint.engine.events import Event
from setpoint.engine.plan import Runner, StepPlan, StepResult
from setpoint.engine.request import Request
from setpoint.engine.sampling import SamplingParams
from setpoint.engine.scheduler import Scheduler
from setpoint.engine.step_cost import ShapeOf, StepCost, StepShape
from setpoint.tune.measure import RequestLog
from setpoint.tune.probe.calibrate import Calibration, calibrate
from setpoint.tune.probe.machine import this_identity
from setpoint.tune.simulate.arrivals import Arrivals
from setpoint.tune.simulate.simulator import EngineSetup, Simulation, simulate
from setpoint.workload.prompts import PromptTokens
from setpoint.workload.synth import PRESETS, from_table, synthesize
from setpoint.workload.trace import Trace
from setpoint.workload.transform import scale_lengths

CONFIGURATIONS = (  # max_num_seqs, max_num_batched_tokens, load: equal loads alone would rank noise
    (64, 512, 0.5),
    (64, 512, 1.0),
    (64, 512, 2.0),
    (4, 512, 1.5),
    (64, 64, 1.5),
    (16, 128, 0.75),
)
BUSY = {  # requests/s, and what lengths are divided by
    "chat": (5.0, 8),
    "code": (3.0, 8),
    "rag": (5.0, 8),
    "agent": (5.0, 20),
    "batch": (5.0, 8),
}


class Borrowed:
    """A runner that an engine does not close, and that notes what its steps took beside what the model says."""

    def __init__(self, runner: Runner, cost: StepCost) -> None:
        self._runner, self.info = runner, runner.info
        self._cost, self._shape_of = cost, ShapeOf(runner.info.kv_groups)
        self.seconds: dict[str, list[tuple[float, float]]] = {"decodes": [], "prompts": []}

    def execute(self, plan: StepPlan) -> StepResult:
        began = time.perf_counter()
        result = self._runner.execute(plan)
        took = time.perf_counter() - began
        shape = self._shape_of(plan.entries)
        kind = "decodes" if shape.tokens == shape.rows else "prompts"
        self.seconds[kind].append((took, self._cost.runner_seconds(shape)))
        return result

    def ratios(self) -> dict[str, float]:
        """Seconds over predicted seconds of all steps of a kind: the error of the cost model alone."""
        return {
            kind: round(sum(took for took, _ in found) / sum(said for _, said in found), 3)
            for kind, found in self.seconds.items()
            if found
        }

    def close(self) -> None:
        pass


def held_out(name: str, seconds: float, load: float) -> Trace:
    """Chat: Azure's conversations; code: its ON/OFF bursts; turns: sessions of agents, whose prompts grow."""
    if name == "chat":
        return scale_lengths(from_table("azure2023_conv", rate=5.0 * load, seconds=seconds, seed=11), 8)
    if name == "code":
        for seed in range(20, 60):  # a short cut of ON/OFF traffic may be all OFF
            trace = from_table("azure2023_code", rate=3.5 * load, seconds=seconds, seed=seed)
            if len(trace.requests) >= 2.0 * load * seconds:
                return scale_lengths(trace, 16)
        raise SystemExit("no burst in forty cuts; give more --seconds")
    return synthesize("agent", rate=4.0 * load, seconds=seconds, seed=13, length_scale=32)


def measured(runner: Borrowed, setup: EngineSetup, trace: Trace, salt: int) -> list[RequestLog]:
    """The trace on the real engine: this thread sends, the engine's thread computes."""
    scheduler = Scheduler(runner.info, setup.limits, enable_prefix_caching=True, seed=0)
    delivered: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
    engine = Engine(scheduler, runner, delivered.put)
    prompts = PromptTokens(trace, runner.info.vocab_size, seed=salt)
    made = [prompts[index] for index in range(len(trace.requests))]
    arrivals, logs = Arrivals(trace), {}
    deliveries: dict[int, list[tuple[float, int]]] = defaultdict(list)
    scheduled: dict[int, float] = {}
    engine.start()
    began = time.monotonic()
    while len(logs) < len(trace.requests):
        now = time.monotonic() - began
        for due, index in arrivals.take(now):
            traced, scheduled[index] = trace.requests[index], due
            params = SamplingParams(temperature=0.0, max_tokens=traced.output_tokens, ignore_eos=True, seed=0)
            engine.submit(Request(str(index), made[index], params, session_id=traced.session or ""))
        next_s = arrivals.next_s
        wait = 60.0 if next_s is None else max(next_s - (time.monotonic() - began), 0.0)
        try:
            events = delivered.get(timeout=wait) if wait > 0 else delivered.get_nowait()
        except queue.Empty:
            continue
        for event in events:
            index, at = int(event.request_id), event.time - began
            if event.error is not None:
                raise event.error
            deliveries[index].append((at, len(event.token_ids)))
            if event.finish_reason is not None:
                count = sum(tokens for _, tokens in deliveries[index])
                logs[index] = RequestLog(
                    index, scheduled[index], scheduled[index], "ok", tuple(deliveries[index]), at, output_tokens=count
                )
                arrivals.over(index, at)
    engine.shutdown()
    return [logs[index] for index in sorted(logs)]


@dataclass(frozen=True)
class Figures:
    tpot_ms: float  # mean over requests
    ttft_ms: float  # 95th percentile


def figures(logs: Sequence[RequestLog]) -> Figures:
    timings = [log.timing for log in logs if log.ok]
    tpot = [timing.tpot_s for timing in timings if timing.tpot_s is not None]
    ttft = sorted(timing.ttft_s for timing in timings)
    return Figures(statistics.fmean(tpot) * 1e3, ttft[math.ceil(0.95 * len(ttft)) - 1] * 1e3)


def baseline(trace: Trace, setup: EngineSetup) -> dict[str, float]:
    """Closed forms from the same probe, with the trace's mean lengths and rate."""
    cost, count = setup.cost, len(trace.requests)
    rate = count / max(trace.seconds, 1e-9)
    num_in = statistics.fmean(r.input_tokens for r in trace.requests)
    num_out = statistics.fmean(r.output_tokens for r in trace.requests)
    one, many = (cost.seconds(StepShape(n, n, n, n * num_in, n * num_in)) for n in (1, 8))
    a, b = one - (many - one) / 7, (many - one) / 7
    prompt_s = cost.seconds(StepShape(1, round(num_in), 1, num_in, num_in * num_in / 2))
    batch, limit = 1.0, setup.limits.max_num_seqs
    for _ in range(100):  # Little: as many run as arrive while one is answered
        batch = min(max(rate * (prompt_s + num_out * (a + b * batch)), 1.0), limit)
    load = min(rate * prompt_s, 0.98)
    tail = prompt_s / (2 * (1 - load)) * math.log(load / 0.05) if load > 0.05 else 0.0
    return {
        "tpot_linear": (a + b * batch) * 1e3,
        "ttft_md1": (prompt_s + tail) * 1e3,
        "ttft_log2": prompt_s * min(1 + math.log2(max(batch, 1.0)) / 8, 2.0) * 1e3,
    }


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    def ranks(values: Sequence[float]) -> list[float]:
        order = sorted(values)
        return [order.index(value) + (order.count(value) - 1) / 2 for value in values]

    return statistics.correlation(ranks(first), ranks(second)) if len(set(first)) > 1 < len(set(second)) else 0.0


def accuracy(
    runner: Runner, surveyed: Survey, cost: StepCost, names: Sequence[str], seconds: float
) -> list[dict[str, Any]]:
    rows = []
    for salt, name in enumerate(names):
        for seqs, budget, load in CONFIGURATIONS:
            limits = replace(surveyed.limits, max_num_seqs=seqs, max_num_batched_tokens=budget, max_drafts=0)
            setup, trace = EngineSetup(surveyed.info, limits, cost), held_out(name, seconds, load)
            borrowed = Borrowed(runner, cost)
            real = figures(measured(borrowed, setup, trace, salt))
            done = simulate(trace, setup)
            row = {
                "trace": name,
                "requests": len(trace.requests),
                "max_num_seqs": seqs,
                "max_num_batched_tokens": budget,
                "load": load,
                "measured": asdict(real),
                "simulated": asdict(figures(done.run.logs)),
                "baseline": baseline(trace, setup),
                "steps_over_model": borrowed.ratios(),
                "speed": round(done.speed),
            }
            rows.append(row)
            print(
                f"{name:<6}{len(trace.requests):>4} requests {seqs:>3} x {budget:<4} load {load:<4}"
                f" TPOT {real.tpot_ms:7.2f} / {row['simulated']['tpot_ms']:7.2f} ms,"
                f" TTFT p95 {real.ttft_ms:7.0f} / {row['simulated']['ttft_ms']:7.0f} ms, "
                f"steps / model {borrowed.ratios()}",
                flush=True,
            )
    return rows


def judged(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Median relative errors over all runs, rank correlations by trace."""

    def errors(of: str, key: str, metric: str) -> float:
        return statistics.median(abs(row[of][key] / row["measured"][metric] - 1) for row in rows)

    def ranks(of: str, key: str, metric: str) -> dict[str, float]:
        found = {}
        for name in dict.fromkeys(row["trace"] for row in rows):
            mine = [row for row in rows if row["trace"] == name]
            found[name] = round(spearman([r[of][key] for r in mine], [r["measured"][metric] for r in mine]), 3)
        return found

    kinds = {
        "simulator_tpot": ("simulated", "tpot_ms", "tpot_ms"),
        "simulator_ttft_p95": ("simulated", "ttft_ms", "ttft_ms"),
        "linear_tpot": ("baseline", "tpot_linear", "tpot_ms"),
        "md1_ttft_p95": ("baseline", "ttft_md1", "ttft_ms"),
        "log2_ttft_p95": ("baseline", "ttft_log2", "ttft_ms"),
    }
    return {name: {"median_error": round(errors(*kind), 4), "spearman": ranks(*kind)} for name, kind in kinds.items()}


def speed(surveyed: Survey, cost: StepCost) -> list[dict[str, Any]]:
    rows = []
    for preset in PRESETS:
        rate, scale = BUSY[preset]
        trace = synthesize(preset, rate=rate, seconds=200, seed=3, length_scale=scale)
        limits = replace(surveyed.limits, max_drafts=0)
        setup = EngineSetup(surveyed.info, limits, cost)
        runs = [simulate(trace, setup) for _ in range(3)]
        done = sorted(runs, key=lambda run: run.wall_s)[1]
        busy_s = sum(cost.seconds(step.shape) for step in done.steps)
        row = {
            "preset": preset,
            "requests": len(trace.requests),
            "steps": len(done.steps),
            "mean_batch": round(statistics.fmean(step.shape.entries for step in done.steps), 1),
            "busy": round(busy_s / done.virtual_s, 2),
            "speed": round(done.speed),
            "us_per_step": round(1e6 * done.wall_s / len(done.steps), 1),
        }
        rows.append(row)
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    return rows


def profile(surveyed: Survey, cost: StepCost) -> list[dict[str, Any]]:
    """Own time by module, of a chat that keeps some sequences running."""
    trace = synthesize("chat", rate=5.0, seconds=100, seed=3, length_scale=8)
    setup = EngineSetup(surveyed.info, replace(surveyed.limits, max_drafts=0), cost)
    profiler = cProfile.Profile()
    done: Simulation = profiler.runcall(simulate, trace, setup)
    by_module: dict[str, float] = defaultdict(float)
    for (path, _, _), (_, _, own, _, _) in pstats.Stats(profiler).stats.items():  # type: ignore[attr-defined]
        by_module[Path(path).stem if path.startswith("/") else "built-in"] += own
    total = sum(by_module.values())
    ranked = sorted(by_module.items(), key=lambda item: -item[1])[:12]
    for name, own in ranked:
        print(f"  {name:<16}{own / total:6.1%}  {1e6 * own / len(done.steps):6.1f} us a step under the profiler")
    return [{"module": name, "share": round(own / total, 3)} for name, own in ranked]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each trace")
    parser.add_argument("--probe-seconds", type=float, default=30.0)
    parser.add_argument("--traces", nargs="*", default=["chat", "code", "turns"])
    parser.add_argument("--speed-only", action="store_true")
    parser.add_argument("--merge", type=Path, help="a result whose other traces are added to this one's")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    config = EngineConfig(arguments.model, speculative_config="off", max_model_len=4096)
    runner, surveyed = open_runner(config)
    found: Calibration = calibrate(
        runner,
        machine=this_identity(),
        model=arguments.model,
        fingerprint=surveyed.fingerprint,
        max_num_seqs=64,
        max_num_batched_tokens=512,
        seconds=arguments.probe_seconds,
    )
    print(f"probe: left-out error median {found.left_out_median:.1%}, rounds differ by {found.noise:.1%}", flush=True)
    document: dict[str, Any] = {
        "model": arguments.model,
        "machine": f"{platform.machine()}, {surveyed.config.num_threads} threads",
        "probe": {
            "noise": round(found.noise, 4),
            "left_out_median": round(found.left_out_median, 4),
            "left_out_p90": round(found.left_out_p90, 4),
        },
    }
    if not arguments.speed_only:
        rows = accuracy(runner, surveyed, found.cost, arguments.traces, arguments.seconds)
        if arguments.merge is not None and arguments.merge.exists():
            earlier = json.loads(arguments.merge.read_text())["rows"]
            rows = [row for row in earlier if row["trace"] not in arguments.traces] + rows
        document |= {"rows": rows, "judged": judged(rows)}
        for name, verdict in document["judged"].items():
            print(f"{name:<20} median error {verdict['median_error']:.1%}, rank correlation {verdict['spearman']}")
    if arguments.speed_only or arguments.merge is None:
        document |= {"speed": speed(surveyed, found.cost), "profile": profile(surveyed, found.cost)}
    runner.close()
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
