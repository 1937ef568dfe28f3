"""Gaps between tokens at batch 1, alone and beside processes that only burn CPU.

    python benchmarks/neighbour.py [--model smollm2-135m] [--neighbours 0,1] [--threads 1,2] [--repeat 5]

One sequence is decoded in process, no HTTP. Its first --settle-tokens do not count: the engine tries from time to time
whether one thread less is faster, and shall not pay for the case measured before. The neighbours run at the same
priority as we do and are free to move between CPUs. All combinations take turns; percentiles are over all gaps of all
repeats. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import random
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise, product

from setpoint.assemble import build_engine
from setpoint.config import EngineConfig
from setpoint.engine.engine import Engine
from setpoint.engine.events import Event
from setpoint.engine.request import Request
from setpoint.engine.sampling import SamplingParams


class Subject:
    """An engine with some number of threads."""

    def __init__(self, model: str, threads: int, length: int) -> None:
        self.events: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
        config = EngineConfig(
            model=model,
            num_threads=threads,
            max_model_len=length,
            max_num_seqs=1,
            enable_prefix_caching=False,
            speculative_config="off",
        )
        self.engine: Engine = build_engine(config, self.events.put).engine
        self.engine.start()

    def gaps_ms(self, prompt: list[int], num_outputs: int) -> list[float]:
        params = SamplingParams(temperature=0.0, max_tokens=num_outputs, ignore_eos=True)
        self.engine.submit(Request(f"neighbour-{random.getrandbits(60)}", prompt, params))
        times: list[float] = []
        while len(times) < num_outputs:
            for event in self.events.get(timeout=120):
                if event.error is not None:
                    raise event.error
                times += [event.time] * len(event.token_ids)
        return [(after - before) * 1e3 for before, after in pairwise(times)]


@contextmanager
def busy(number: int) -> Iterator[None]:
    spinners = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()


def percentile(values: list[float], percent: float) -> float:
    return statistics.quantiles(values, n=1000, method="inclusive")[int(percent * 10) - 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--neighbours", default="0,1")
    parser.add_argument("--threads", default=f"1,{len(os.sched_getaffinity(0))}")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--settle-tokens", type=int, default=320)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=5)
    given = parser.parse_args()
    prompt = [random.Random(0).randrange(1000) for _ in range(given.prompt_tokens)]
    threads = sorted({int(count) for count in given.threads.split(",")})
    neighbours = [int(count) for count in given.neighbours.split(",")]
    num_outputs = given.settle_tokens + given.output_tokens
    subjects = {count: Subject(given.model, count, len(prompt) + num_outputs) for count in threads}
    gaps: dict[tuple[int, int], list[float]] = {case: [] for case in product(threads, neighbours)}
    for subject in subjects.values():
        subject.gaps_ms(prompt, 16)
    for turn in range(given.repeat):
        order = list(gaps)[:: 1 if turn % 2 else -1]
        for case in order:
            with busy(case[1]):
                gaps[case] += subjects[case[0]].gaps_ms(prompt, num_outputs)[given.settle_tokens :]
    for subject in subjects.values():
        subject.engine.shutdown()
    rows = []
    for (count, number), values in gaps.items():
        row = {"threads": count, "neighbours": number}
        row |= {name: round(percentile(values, percent), 3) for name, percent in (("p50_ms", 50), ("p99_ms", 99))}
        row["tok_s"] = round(1e3 / statistics.fmean(values), 1)
        rows.append(row)
        print(
            "{threads} threads, {neighbours} neighbours: p50 {p50_ms} ms, p99 {p99_ms} ms, {tok_s} tok/s".format(**row)
        )
    print(json.dumps({"model": given.model, "prompt_tokens": given.prompt_tokens, "rows": rows}))


if __name__ == "__main__":
    main()
