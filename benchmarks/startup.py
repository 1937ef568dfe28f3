"""How long a start takes: from the process's begin to the first token, and from an unseen file to ready.

    python benchmarks/startup.py
    python benchmarks/startup.py --models random-1.5b.gguf --rounds 7 --rival-python rival/bin/python

Every row is a whole process: imports, config, tokenizer, chat template, weights, first step. States of a start:
    cached   weights packed by an earlier start, files in the page cache
    evicted  the same, the weight files dropped from the page cache: they come from the disk
    unseen   nothing packed yet, file in the page cache; packing is part of the time
    unread   nothing packed yet, file dropped from the page cache
Reading the model file front to back in the same state is the yardstick beside `unseen` and `unread`. States alternate
within a round; a fixed piece of Python work is timed beside every start, because the machine's speed swings.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from setpoint.assemble import models_directory
from setpoint.loaders.checkpoint import open_checkpoint
from setpoint.loaders.hub import resolve_model

PROMPT = "The capital of France is"
LIMIT_S = 120.0
STATES = ("cached", "evicted", "unseen", "unread")
NEW = ("unseen", "unread")
DROPPED = ("evicted", "unread")
LLAMA_CPP = Path(__file__).parent / "workers" / "llama_cpp_first_token.py"


def python_work() -> float:
    """Seconds of a fixed loop: what the interpreter's speed is just now."""
    began, x = time.perf_counter(), 0
    for i in range(500_000):
        x += i
    return time.perf_counter() - began


def drop(path: Path) -> None:
    """Take a file out of the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(path: Path) -> float:
    """Seconds to read a file front to back into a buffer."""
    buffer, began = bytearray(4 << 20), time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - began


class Starts:
    """Starts of one model, with a weight cache of their own in `directory`."""

    def __init__(self, model: Path, directory: Path) -> None:
        self.model, self.packed = model, directory / "packed"
        self.environment = os.environ | {"SETPOINT_CACHE_DIR": str(directory), "SETPOINT_LOG_LEVEL": "error"}
        self.environment.pop("PYTHONDONTWRITEBYTECODE", None)
        checkpoint = open_checkpoint(model)
        self.has_template = checkpoint.chat_template is not None
        checkpoint.close()
        self.generate("cached")  # leaves the packed weights behind

    def prepare(self, state: str) -> None:
        for path in (self.model, *self.packed.glob("*.packed")):
            drop(path) if state in DROPPED else read(path)

    def command(self, name: str, state: str, *more: str) -> list[str]:
        keep = ["--weight-cache-bytes", "0"] if state in NEW else []  # neither found nor kept
        return [sys.executable, "-m", "setpoint.cli.main", name, str(self.model), *keep, *more]

    def generate(self, state: str) -> float:
        """`setpoint generate` to its first byte of output."""
        return first_byte(self.command("generate", state, PROMPT, "--max-tokens", "1"), self.environment)

    def serve(self, state: str) -> tuple[float, float]:
        """`setpoint serve` to ready, and to the answer of one token that a client asks for at once."""
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        command, quiet = self.command("serve", state, "--port", str(port)), subprocess.DEVNULL
        body: dict[str, object] = {"max_tokens": 1, "temperature": 0}
        body |= {"messages": [{"role": "user", "content": PROMPT}]} if self.has_template else {"prompt": PROMPT}
        path = "/v1/chat/completions" if self.has_template else "/v1/completions"
        began = time.perf_counter()
        process = subprocess.Popen(command, env=self.environment, stdout=quiet, stderr=quiet)
        try:
            while ask(port, "GET", "/readyz", None) != 200:
                if process.poll() is not None or time.perf_counter() - began > LIMIT_S:
                    raise SystemExit(f"{' '.join(command)} did not become ready")
                time.sleep(0.002)
            ready = time.perf_counter() - began
            if ask(port, "POST", path, json.dumps(body)) != 200:
                raise SystemExit("the server gave no token")
            return ready, time.perf_counter() - began
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(LIMIT_S)


def first_byte(command: list[str], environment: dict[str, str]) -> float:
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        seconds = time.perf_counter() - began
        process.stdout.read()
    if not first or process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with {process.returncode}")
    return seconds


def ask(port: int, method: str, path: str, body: str | None) -> int:
    """The status of the answer; 0 when nobody listens."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        return answer.status
    except OSError:
        return 0
    finally:
        connection.close()


def measure(model: Path, args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    starts = Starts(model, directory)
    seconds: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        seconds.setdefault(name, []).append(value)

    for _ in range(args.rounds):
        for state in args.states:
            note("python work", python_work())
            starts.prepare(state)
            note(f"generate {state}", starts.generate(state))
            starts.prepare(state)
            ready, token = starts.serve(state)
            note(f"serve {state}, ready", ready)
            note(f"serve {state}", token)
            if state in NEW:
                starts.prepare(state)
                note(f"read {state}", read(model))
            if args.rival_python:
                starts.prepare(state)
                note(
                    f"llama.cpp {state}",
                    first_byte([args.rival_python, str(LLAMA_CPP), str(model), PROMPT], {**os.environ}),
                )
    return {
        "model": model.name,
        "bytes": model.stat().st_size,
        "packed_bytes": sum(path.stat().st_size for path in starts.packed.glob("*.packed")),
        "rounds": args.rounds,
        "median_s": {name: round(statistics.median(values), 4) for name, values in seconds.items()},
        "best_s": {name: round(min(values), 4) for name, values in seconds.items()},
        "worst_s": {name: round(max(values), 4) for name, values in seconds.items()},
    }


def table(row: dict[str, Any]) -> None:
    print(f"\n{row['model']}: {row['bytes'] / 1e6:.0f} MB, packed {row['packed_bytes'] / 1e6:.0f} MB")
    for name, median in row["median_s"].items():
        print(f"  {name:<26}{median:7.3f} s   {row['best_s'][name]:.3f} .. {row['worst_s'][name]:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2-135m", "gemma3-270m"])
    parser.add_argument("--states", nargs="+", choices=STATES, default=STATES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rival-python", help="a Python with llama-cpp-python")
    args = parser.parse_args()
    rows = []
    for name in args.models:
        with tempfile.TemporaryDirectory(dir=models_directory().parent) as directory:
            rows.append(measure(resolve_model(name, models_directory()), args, Path(directory)))
        table(rows[-1])
    print(json.dumps({"cpus": len(os.sched_getaffinity(0)), "models": rows}))


if __name__ == "__main__":
    main()
