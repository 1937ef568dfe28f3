"""Engines take turns on one model: prepare, choose the rival's best settings, sample with probes on either side."""

from __future__ import annotations

import contextlib
import os
import random
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peers.rows import Row
from peers.samples import Pair, Probe, Sample
from peers.worker import Worker, WorkerDied

SETTLE_S = 0.02  # a thread pool may spin that long after its last answer
MAX_ATTEMPTS = 3  # turns of a row, in units of the repeats asked for
TUNING_ROUNDS, TUNING_STEPS, TUNING_S = 3, 8, 10.0  # of one dial of one row; the slowest models get one round
Settings = dict[str, Any]


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True)
class Prompts:
    """The token ids of a row: the same for every engine; a prefill takes other ones each turn."""

    row: Row
    vocabulary: int

    def of_turn(self, turn: int) -> list[list[int]]:
        stays = self.row.phase == "decode"
        source = random.Random(f"{self.row.name} {0 if stays else turn}")
        count = self.row.prompt_tokens
        return [[source.randrange(self.vocabulary) for _ in range(count)] for _ in range(self.row.batch)]

    def copies(self) -> list[list[int]]:
        return [self.of_turn(0)[0]] * self.row.batch


@dataclass(slots=True)
class Machine:
    """The probe worker, and what /proc/stat says about everybody else."""

    probe_worker: Worker
    ticks_a_second: int = field(default_factory=lambda: os.sysconf("SC_CLK_TCK"))

    def probe(self) -> Probe:
        time.sleep(SETTLE_S)
        answer = self.probe_worker.ask("probe")
        return Probe(answer["vnni_gops"], answer["dram_gb_s"])

    def cpu_seconds(self) -> dict[str, float]:
        """Of all CPUs since boot: given to other guests, used by processes, and all of it."""
        fields = [int(x) / self.ticks_a_second for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        user, nice, system, idle, waiting, interrupts, soft, steal = fields
        busy = user + nice + system + interrupts + soft
        return {"steal": steal, "busy": busy, "all": busy + idle + waiting + steal}


@dataclass(slots=True)
class Engine:
    """A worker under test, with the settings it is measured with, row by row."""

    name: str
    worker: Worker
    required: bool = True  # its death ends the run
    candidates: list[tuple[str, list[Any]]] = field(default_factory=list)  # dial -> values, tried one after the other
    defaults: Settings = field(default_factory=dict)
    best: dict[str, Settings] = field(default_factory=dict)  # row -> settings
    failures: dict[str, str] = field(default_factory=dict)  # row -> why it has no numbers

    def run(self, row: Row, prompts: list[list[int]], settings: Settings, *, copies: bool = False) -> dict[str, Any]:
        if row.phase == "prefill":
            return self.worker.ask("prefill", prompt=prompts[0], settings=settings)
        return self.worker.ask("decode", prompts=prompts, steps=row.steps, copies=copies, settings=settings)

    def settings(self, row: Row) -> Settings:
        return self.best.get(row.name, self.defaults)

    def tune(self, row: Row, prompts: list[list[int]]) -> None:
        """One dial after the other, each value timed a few times in turn; the shortest time wins."""
        best = dict(self.defaults)
        short = replace(row, steps=min(row.steps, TUNING_STEPS))
        for dial, values in self.candidates:
            if len(values) < 2 or (row.phase == "decode" and dial == "ubatch"):
                continue
            for value in values:
                self.run(short, prompts, best | {dial: value}, copies=True)  # opens a context, fills its KV cache
            times: dict[Any, list[float]] = {value: [] for value in values}
            began = time.monotonic()
            while len(times[values[0]]) < TUNING_ROUNDS and time.monotonic() - began < TUNING_S:
                for value in values:
                    times[value].append(self.run(short, prompts, best | {dial: value}, copies=True)["seconds"])
            best[dial] = min(times, key=lambda value: min(times[value]))
        self.best[row.name] = best
        if self.candidates:
            say(f"  {row.name}: {self.name} is fastest with {best}")


def sample(engine: Engine, row: Row, prompts: list[list[int]], machine: Machine, before: Probe) -> Sample:
    """Its `after` is the next one's `before`."""
    start = machine.cpu_seconds()
    answer = engine.run(row, prompts, engine.settings(row))
    end = machine.cpu_seconds()
    used = {name: end[name] - start[name] for name in end}
    total = max(used["all"], 1e-9)
    return Sample(
        seconds=answer["seconds"],
        tokens=answer["tokens"],
        before=before,
        after=machine.probe(),
        steal=used["steal"] / total,
        others=max(used["busy"] - answer["cpu_s"], 0.0) / total,
    )


@dataclass(slots=True)
class Measured:
    """Everything known about one row: the samples of each engine, turn by turn (None: it failed in that turn)."""

    row: Row
    samples: dict[str, list[Sample]] = field(default_factory=dict)

    def pairs(self, rival: str) -> list[Pair]:
        return [Pair(*both) for both in zip(self.samples["setpoint"], self.samples.get(rival, []), strict=False)]

    def clean(self, rival: str) -> int:
        return sum(not pair.doubts(self.row.resources) for pair in self.pairs(rival))


def measure_rows(
    rows: list[Row], engines: list[Engine], machine: Machine, vocabulary: int, repeat: int, deadline: float
) -> list[Measured]:
    """Turns over all rows, so that a drift of the machine meets all; a row rests once it has enough clean pairs.

    `engines[0]` is ours, `engines[1]` the rival that the goals name. After `deadline` no row gets more than `repeat`.
    """
    found = [Measured(row) for row in rows]
    for turn in range(MAX_ATTEMPTS * repeat):
        news = []
        for measured in found:
            row = measured.row
            done = turn >= repeat and (measured.clean(engines[1].name) >= repeat or time.monotonic() > deadline)
            if done:
                continue
            prompts = Prompts(row, vocabulary).of_turn(turn)
            able = [engine for engine in engines if row.name not in engine.failures and serves(engine, row)]
            for name, one in _one_turn(row, able if turn % 2 == 0 else able[::-1], prompts, machine):
                measured.samples.setdefault(name, []).append(one)
            news.append(f"{row.name.removeprefix(row.model).strip()} {_ratios(measured, engines)}")
        if not news:
            break
        say(f"  turn {turn + 1}: " + ", ".join(news))
    return found


def _one_turn(
    row: Row, engines: list[Engine], prompts: list[list[int]], machine: Machine
) -> Iterator[tuple[str, Sample]]:
    """One sample of each engine, side by side. A rival that dies is noted and left out from then on."""
    # A prompt of the same length first, for all of them alike: it wakes an engine that waited while others worked.
    # Decode fills its KV cache with it.
    first = prompts if row.phase == "decode" else [prompt[::-1] for prompt in prompts]
    for engine in engines:
        with noting_failure(engine, row):
            engine.run(replace(row, steps=1), first, engine.settings(row))
    before = machine.probe()
    for engine in engines:
        if row.name not in engine.failures:
            with noting_failure(engine, row):
                one = sample(engine, row, prompts, machine, before)
                before = one.after
                yield engine.name, one


@contextlib.contextmanager
def noting_failure(engine: Engine, row: Row) -> Iterator[None]:
    try:
        yield
    except WorkerDied as error:
        if engine.required:
            raise
        engine.failures[row.name] = str(error)
        say(f"  {row.name}: {engine.name} failed: {error}")


def serves(engine: Engine, row: Row) -> bool:
    return engine.required or row.other_rivals


def _ratios(measured: Measured, engines: list[Engine]) -> str:
    rivals = [engine.name for engine in engines[1:] if measured.pairs(engine.name)]
    return "/".join(f"{measured.pairs(name)[-1].ratio:.2f}" for name in rivals) or "-"


def agreement(
    ours: Engine, rival: Engine, prompts: list[list[int]], steps: int, settings: Mapping[str, Any]
) -> list[int]:
    """For each prompt, how many greedy tokens are equal before the first difference."""
    row = Row("greedy", "decode", 1, 0, steps)
    lengths = []
    for prompt in prompts:
        left = ours.run(row, [prompt], {})["output"][0]
        right = rival.run(row, [prompt], dict(settings))["output"][0]
        equal = [a == b for a, b in zip(left, right, strict=False)]
        lengths.append(equal.index(False) if False in equal else len(equal))
    return lengths


def next_token_agreement(
    ours: Engine, rival: Engine, prompts: list[list[int]], settings: Mapping[str, Any]
) -> float | None:
    """The fraction of prompts after which both take the same token; None when the rival died."""
    row, same = Row("greedy", "prefill", 1, 0), 0
    try:
        for prompt in prompts:
            left, right = ours.run(row, [prompt], {}), rival.run(row, [prompt], dict(settings))
            same += left["output"][0][0] == right["output"][0][0]
    except WorkerDied:
        if rival.required:
            raise
        return None
    return round(same / len(prompts), 3)
