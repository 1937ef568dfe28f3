"""Setpoint beside llama.cpp on the same file, in turn, as ratios.

    python benchmarks/against_llama_cpp.py --rival-python PATH [--model smollm2-135m] [--requantize]

PATH is a Python with llama-cpp-python built for this machine (`CMAKE_ARGS=-DGGML_NATIVE=ON pip install
--no-binary llama-cpp-python llama-cpp-python`). --requantize lets llama.cpp write its favourite Q4_0 first.
The engines run one after the other for every row and repeat, the order alternating; the rival runs with flash
attention on and off and its better median counts. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from setpoint.assemble import models_directory
from setpoint.loaders.hub import resolve_model

WORKERS = Path(__file__).parent / "workers"


class Worker:
    """A process that answers one JSON line with one JSON line."""

    def __init__(self, python: str, script: str, arguments: list[str]) -> None:
        self.process = subprocess.Popen(
            [python, str(WORKERS / script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.about = self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a worker died; run it by hand to see why")
        return dict(json.loads(line))

    def ask(self, **question: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(json.dumps(question), file=self.process.stdin, flush=True)
        return self._read()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rival-python", required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--requantize", action="store_true")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--batch", default="1,8,32")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    given = parser.parse_args()
    batches = [int(size) for size in given.batch.split(",")]
    with tempfile.TemporaryDirectory() as directory:
        path = resolve_model(given.model, models_directory())
        if given.requantize:
            target = Path(directory) / (path.stem + ".Q4_0.gguf")
            command = [
                given.rival_python,
                str(WORKERS / "llama_cpp_worker.py"),
                str(target),
                "--quantize-from",
                str(path),
            ]
            limits = ["--context", "1", "--batch", "1", "--threads", "1"]
            subprocess.run([*command, *limits], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            path = target
        limits = ["--context", str(given.prompt_tokens + given.output_tokens + 16), "--batch", str(max(batches))]
        limits += ["--threads", str(given.threads)]
        workers = {
            "setpoint": Worker(sys.executable, "setpoint_worker.py", [str(path), *limits]),
            "llama.cpp": Worker(given.rival_python, "llama_cpp_worker.py", [str(path), *limits]),
            "llama.cpp fa": Worker(
                given.rival_python, "llama_cpp_worker.py", [str(path), *limits, "--flash-attention"]
            ),
        }
        rows = [measure(workers, batch, given) for batch in batches]
        about = {name: worker.about for name, worker in workers.items()}
        for worker in workers.values():
            worker.close()
    print(f"{path.name}, {given.threads} threads, medians of {given.repeat}")
    print("batch  phase     setpoint  llama.cpp  ratio (median of pairs)")
    for row in rows:
        for phase in ("prefill", "decode"):
            print(
                f"{row['batch']:>5}  {phase:<8} {row[phase]['setpoint']:>9.1f} {row[phase]['llama.cpp']:>10.1f} "
                f"{row[phase]['ratio']:>6.2f}"
            )
    print(json.dumps({"question": "setpoint beside llama.cpp", "model": path.name, "about": about, "rows": rows}))


def measure(workers: dict[str, Worker], batch: int, given: argparse.Namespace) -> dict[str, Any]:
    question = {"batch": batch, "prompt_tokens": given.prompt_tokens, "output_tokens": given.output_tokens}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    for turn in range(given.repeat):
        order = list(workers) if turn % 2 == 0 else list(reversed(workers))
        for name in order:
            runs[name].append(workers[name].ask(**question))
        print(f"batch {batch}, turn {turn + 1} of {given.repeat}", file=sys.stderr, flush=True)
    row: dict[str, Any] = {"batch": batch, "prompt_tokens": given.prompt_tokens, "output_tokens": given.output_tokens}
    for phase in ("prefill", "decode"):
        key = f"{phase}_tok_s"
        medians = {name: statistics.median(run[key] for run in of_one) for name, of_one in runs.items()}
        best = max((name for name in workers if name != "setpoint"), key=lambda name: medians[name])
        pairs = [ours[key] / theirs[key] for ours, theirs in zip(runs["setpoint"], runs[best], strict=True)]
        row[phase] = {
            "setpoint": round(medians["setpoint"], 1),
            "llama.cpp": round(medians[best], 1),
            "best_rival": best,
            "ratio": round(statistics.median(pairs), 3),
        }
    return row


if __name__ == "__main__":
    main()
