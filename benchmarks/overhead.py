"""What the engine and the server add to a decode step, at batch 1.

    python benchmarks/overhead.py [--model smollm2-135m] [--prompt-tokens 128] [--output-tokens 96] [--repeat 5]

One sequence is decoded in turn by: the native step alone; the runner (arrays in, records out); the engine thread
(scheduling, events); a real `setpoint serve` process, read by a raw socket in a process of its own, and by the openai
client. Each level is the median gap between two tokens, and the mean one; the server's own gaps come from its metrics,
which know the mean alone. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import os
import queue
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from setpoint import _native
from setpoint.assemble import load_model
from setpoint.engine.engine import Engine
from setpoint.engine.events import Event
from setpoint.engine.plan import LogitsRow, PlanEntry, RowSampling, StepPlan
from setpoint.engine.request import Request
from setpoint.engine.sampling import SamplingParams
from setpoint.engine.scheduler import Scheduler, SchedulerLimits
from setpoint.runtime.cpu.runner import CpuRunner

Gaps = list[float]  # seconds between tokens


class InProcess:
    """A model without a server: its runner, and an engine around that runner."""

    def __init__(self, model: str, prompt: list[int], num_outputs: int, threads: int) -> None:
        loaded = load_model(model)
        length = len(prompt) + num_outputs
        self.runner = CpuRunner(
            loaded.model,
            loaded.checkpoint,
            num_threads=threads,
            max_model_len=length,
            max_num_seqs=8,
            max_num_batched_tokens=512,
            kv_cache_memory_bytes=256 << 20,
        )
        limits = SchedulerLimits(max_num_seqs=8, max_num_batched_tokens=512)
        scheduler = Scheduler(self.runner.info, limits, enable_prefix_caching=False, seed=0)
        self.events: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
        self.engine = Engine(scheduler, self.runner, self.events.put)
        self.engine.start()
        self.prompt, self.num_outputs = prompt, num_outputs
        blocks = list(range(-(-length // self.runner.info.block_size)))
        self.tables = tuple(blocks for _ in self.runner.info.kv_groups)

    def plan(self, tokens: list[int], start: int) -> StepPlan:
        row = LogitsRow(len(tokens) - 1, RowSampling(temperature=0.0))
        return StepPlan([PlanEntry(0, tokens, start, self.tables, [row])])

    def steps(self, native: bool) -> Gaps:
        """Of the native call alone, or of the runner with it."""
        self.runner.execute(self.plan(self.prompt, 0))
        gaps = []
        for i in range(self.num_outputs - 1):
            plan = self.plan([7 + i % 50], len(self.prompt) + i)
            if native:
                self.runner._arrays.load(plan.entries)
            began = time.perf_counter()
            if native:
                self.runner.program.step(*self.runner._arrays.arguments)
            else:
                self.runner.execute(plan)
            gaps.append(time.perf_counter() - began)
        return gaps

    def through_engine(self) -> Gaps:
        params = SamplingParams(temperature=0.0, max_tokens=self.num_outputs, ignore_eos=True)
        self.engine.submit(Request(f"r{random.getrandbits(60)}", self.prompt, params))
        times: list[float] = []
        while len(times) < self.num_outputs:
            for event in self.events.get(timeout=60):
                if event.error is not None:
                    raise event.error
                times += [event.time] * len(event.token_ids)
        return [after - before for before, after in pairwise(times)]


class Server:
    """`setpoint serve` in a process, and its clients in another."""

    def __init__(self, model: str, prompt: list[int], num_outputs: int, threads: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        flags = ["--port", self.port, "--num-threads", threads, "--max-model-len", len(prompt) + num_outputs]
        flags += ["--max-num-seqs", 8, "--no-enable-prefix-caching"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "setpoint.cli.main", "serve", model, *map(str, flags)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.body = {"model": "m", "prompt": prompt, "max_tokens": num_outputs, "temperature": 0, "stream": True}
        self.body["ignore_eos"] = True
        self._wait()
        self.body["model"] = json.loads(self._get("/v1/models"))["data"][0]["id"]

    def _get(self, path: str) -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request("GET", path)
        body = connection.getresponse().read()
        connection.close()
        return body

    def _wait(self) -> None:
        for _ in range(600):
            try:
                self._get("/health")
                return
            except OSError:
                if self.process.poll() is not None:
                    raise SystemExit("the server did not start") from None
                time.sleep(0.1)
        raise SystemExit("the server did not start")

    def served_gap(self) -> tuple[float, float]:
        """Sum and count of the gaps that the server has seen itself."""
        text = self._get("/metrics").decode()
        found = [
            re.search(rf"^vllm:inter_token_latency_seconds_{part}{{.*}} (\S+)$", text, re.M)
            for part in ("sum", "count")
        ]
        return tuple(float(match[1]) if match else 0.0 for match in found)  # type: ignore[return-value]

    def read(self, client: Callable[[int, dict[str, Any]], list[float]]) -> tuple[Gaps, float]:
        """Gaps between arrivals at the client, and the server's own mean gap meanwhile."""
        before = self.served_gap()
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            times = pool.apply(client, (self.port, self.body))
        total, count = (after - earlier for after, earlier in zip(self.served_gap(), before, strict=True))
        return [after - earlier for earlier, after in pairwise(times)], total / max(count, 1)

    def close(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)


def raw_client(port: int, body: dict[str, Any]) -> list[float]:
    """When each event arrived, read with next to no work."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    times = []
    while line := response.readline():
        if line.startswith(b"data: {"):
            times.append(time.perf_counter())
    return times


def openai_client(port: int, body: dict[str, Any]) -> list[float]:
    from openai import OpenAI

    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    extra = {"ignore_eos": body["ignore_eos"]}
    fields = {name: body[name] for name in ("model", "prompt", "max_tokens", "temperature", "stream")}
    return [time.perf_counter() for _ in client.completions.create(**fields, extra_body=extra)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=96)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    given = parser.parse_args()
    prompt = [random.Random(0).randrange(1000) for _ in range(given.prompt_tokens)]
    inside = InProcess(given.model, prompt, given.output_tokens, given.threads)
    server = Server(given.model, prompt, given.output_tokens, given.threads)
    probe = _native.Probe()
    medians: dict[str, Gaps] = {}
    means: dict[str, Gaps] = {}
    probes = []
    try:
        for turn in range(given.repeat + 1):  # the first is a warm-up
            rows = {"native": inside.steps(native=True), "runner": inside.steps(native=False)}
            rows["engine"] = inside.through_engine()
            rows["raw client"], seen_by_server = server.read(raw_client)
            rows["openai client"], _ = server.read(openai_client)
            if turn > 0:
                for name, gaps in rows.items():
                    medians.setdefault(name, []).append(statistics.median(gaps) * 1e3)
                    means.setdefault(name, []).append(statistics.mean(gaps) * 1e3)
                means.setdefault("server, raw client", []).append(seen_by_server * 1e3)
                probes.append(probe.dram(given.threads, 0.05))
    finally:
        server.close()
        inside.engine.shutdown()
    for kind, values in (("median", medians), ("mean", means)):
        for name in values:
            print(f"{kind:8}{name:24} {middle(values[name]):7.3f} ms  {over_native(values, name):+7.1%}")
    document = {
        "model": given.model,
        "threads": given.threads,
        "prompt_tokens": given.prompt_tokens,
        "gap_ms": {name: middle(values) for name, values in medians.items()},
        "over_native": {name: over_native(medians, name) for name in medians},
        "mean_gap_ms": {name: middle(values) for name, values in means.items()},
        "mean_over_native": {name: over_native(means, name) for name in means},
        "dram_gb_s": round(statistics.median(probes), 1),
    }
    print(json.dumps(document))


def middle(values: Gaps) -> float:
    return round(statistics.median(values), 4)


def over_native(values: dict[str, Gaps], name: str) -> float:
    """The median of the turns, of what this level took beyond the native step of the same turn, as a part of it."""
    parts = [here / native - 1 for here, native in zip(values[name], values["native"], strict=True)]
    return round(statistics.median(parts), 4)


if __name__ == "__main__":
    main()
