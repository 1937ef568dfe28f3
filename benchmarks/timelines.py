"""What keeping timelines costs the scheduler: schedule + commit of a step, with them and without, interleaved.

    python benchmarks/timelines.py [--steps 2000] [--rounds 9] [--output FILE]

Decodes of 1, 16 and 64 running sequences with a chunk of a prompt every few steps, on the virtual clock. "Without" is
the same scheduler told to note nothing. Medians of rounds; the last line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

from setpoint.engine.plan import RunnerInfo
from setpoint.engine.request import Request
from setpoint.engine.sampling import SamplingParams
from setpoint.engine.scheduler import Scheduler, SchedulerLimits
from setpoint.engine.timelines import Timelines
from setpoint.runtime.fake import CostModelRunner, VirtualClock, fake_info

PROMPT_EVERY = 8  # steps between two newcomers
PROMPT_TOKENS, OUTPUT_TOKENS = 64, 256


class Silent(Timelines):
    """Notes nothing."""

    def arrive(self, *_: Any) -> None: ...
    def start(self, *_: Any) -> None: ...
    def preempt(self, *_: Any) -> None: ...
    def finish(self, *_: Any) -> None: ...
    def begin(self, *_: Any) -> None: ...
    def planned(self, *_: Any) -> None: ...
    def end(self, *_: Any) -> None: ...
    def step_aside(self, *_: Any) -> None: ...


class FixedCost:
    def seconds(self, plan: Any) -> float:
        return 0.01


class World:
    """One scheduler that keeps `batch` sequences running."""

    def __init__(self, batch: int, timelines: Timelines) -> None:
        info: RunnerInfo = fake_info(num_blocks=batch * 32 + 64, block_size=16, max_model_len=1024)
        self.clock, self.batch, self.number = VirtualClock(), batch, 0
        self.runner = CostModelRunner(info, self.clock, FixedCost())
        limits = SchedulerLimits(max_num_seqs=batch, max_num_batched_tokens=512)
        self.scheduler = Scheduler(info, limits, enable_prefix_caching=False, seed=1)
        self.scheduler.timelines = self.scheduler._roster.timelines = timelines

    def add(self) -> None:
        tokens = [(self.number * 7 + place) % 50 for place in range(PROMPT_TOKENS)]
        params = SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True, seed=0)
        self.scheduler.add(Request(str(self.number), tokens, params), self.clock.seconds)
        self.number += 1

    def microseconds(self, num_steps: int) -> float:
        """Mean of `num_steps` steps, the runner's time not counted."""
        spent = 0.0
        for step in range(num_steps):
            scheduler = self.scheduler
            if len(scheduler.running) + len(scheduler.waiting) < self.batch or step % PROMPT_EVERY == 0:
                while len(scheduler.running) + len(scheduler.waiting) <= self.batch:
                    self.add()
            began = time.perf_counter()
            plan = scheduler.schedule(self.clock.seconds)
            spent += time.perf_counter() - began
            result = self.runner.execute(plan)
            began = time.perf_counter()
            scheduler.commit(plan, result, self.clock.seconds)
            spent += time.perf_counter() - began
        return spent / num_steps * 1e6


def measure(batch: int, num_steps: int, num_rounds: int) -> dict[str, float]:
    worlds = {"without": World(batch, Silent()), "with": World(batch, Timelines())}
    for world in worlds.values():
        world.microseconds(num_steps)
    found: dict[str, list[float]] = {name: [] for name in worlds}
    for number in range(num_rounds):
        for name in sorted(worlds, reverse=bool(number % 2)):
            found[name].append(worlds[name].microseconds(num_steps))
    ratio = statistics.median(after / before for after, before in zip(found["with"], found["without"], strict=True))
    medians = {f"{name}_us": round(statistics.median(values), 2) for name, values in found.items()}
    return {"running": batch, **medians, "ratio": round(ratio, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    gc.disable()
    rows = [measure(batch, max(options.steps // batch, 256), options.rounds) for batch in (1, 16, 64)]
    for row in rows:
        print(row)
    document = json.dumps({"benchmark": "timelines", "rows": rows})
    if options.output is not None:
        options.output.write_text(document + "\n")
    print(document)


if __name__ == "__main__":
    main()
