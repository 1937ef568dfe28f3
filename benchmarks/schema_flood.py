"""What a flood of hostile schemas does to others: `GET /livez` and a running stream, quiet and flooded in turn.

    python benchmarks/schema_flood.py [--model smollm2-135m] [--seconds 12] [--rounds 2] [--clients 6]

Each client sends schemas, expressions and grammars that nobody has sent before, one after the other: products of
alternatives, nested repeats, bodies of 250 KB, references that never end, thousands of properties. Pings go over one
connection, 50 a second, from a thread of this process: their times are the lag of the server's event loop and whatever
this machine adds. The last line is JSON; times in milliseconds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx


def bombs() -> Any:
    """Endlessly, no two alike."""
    for number in itertools.count():
        name = f"k{number}"
        parts = [{"properties": {f"{name}{i}": {"type": kind}}} for i in range(24) for kind in ("string", "integer")]
        pairs = [{"anyOf": parts[i : i + 2]} for i in range(0, len(parts), 2)]
        yield {"structured_outputs": {"json": {"type": "object", "allOf": pairs}}}
        yield {"structured_outputs": {"regex": f"((((a{{1,{900 + number}}}){{1,999}}){{1,999}}){{1,999}}){{1,999}}"}}
        yield {"structured_outputs": {"regex": f"({name}|b)*a(a|b){{500}}(a|b){{500}}(a|b){{500}}"}}
        yield {"structured_outputs": {"json": {"enum": [f"{name}-{i:06d}" for i in range(15_000)]}}}
        wide = {f"{name}_{i}": {"type": "string"} for i in range(900)}
        yield {"structured_outputs": {"json": {"type": "object", "properties": wide}}}
        yield {
            "structured_outputs": {"json": {"type": "object", "properties": {name: {"$ref": "#/properties/" + name}}}}
        }
        links = {f"{name}{i}": {"$ref": f"#/$defs/{name}{i + 1}"} for i in range(4000)}
        yield {"structured_outputs": {"json": {"$ref": f"#/$defs/{name}0", "$defs": links}}}
        doubling = "\n".join(f"r{i}: r{i + 1} r{i + 1}" for i in range(300))
        yield {"structured_outputs": {"grammar": f'start: r0\nr300: "{name}"\n{doubling}'}}
        yield {"structured_outputs": {"json": {"type": "array", "minItems": 10**8 + number, "items": {"type": "null"}}}}


def start(model: str) -> tuple[subprocess.Popen[str], str]:
    command = [str(Path(sys.executable).with_name("setpoint")), "serve", model, "--port", "0", "--max-num-seqs", "8"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r"serving .* at (http://\S+)", line):
            threading.Thread(target=process.stderr.read, daemon=True).start()
            return process, found[1]
    raise SystemExit("the server did not start")


def flood(url: str, bodies: Any, lock: threading.Lock, stop: threading.Event, answers: Counter[str]) -> None:
    with httpx.Client(base_url=url, timeout=120) as client:
        while not stop.is_set():
            with lock:
                body = next(bodies)
            response = client.post("/v1/completions", json={"prompt": "x", "max_tokens": 4} | body)
            reason = "built" if response.status_code == 200 else response.json()["error"]["reason"]
            answers[reason] += 1


def canaries(url: str, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of pings, and between the events of a stream."""
    times: dict[str, list[float]] = {"ping": [], "stream_gap": []}
    end = time.perf_counter() + seconds

    def stream() -> None:
        body = {"prompt": "Once upon a time", "max_tokens": 4096, "ignore_eos": True, "stream": True}
        with (
            httpx.Client(base_url=url, timeout=120) as client,
            client.stream("POST", "/v1/completions", json=body) as answer,
        ):
            last = None
            for line in answer.iter_lines():
                now = time.perf_counter()
                if now > end:
                    return
                if line.startswith("data: {"):
                    if last is not None:
                        times["stream_gap"].append((now - last) * 1e3)
                    last = now

    reader = threading.Thread(target=stream)
    reader.start()
    with httpx.Client(base_url=url, timeout=120) as client:
        while (began := time.perf_counter()) < end:
            assert client.get("/livez").status_code == 200
            took = time.perf_counter() - began
            times["ping"].append(took * 1e3)
            time.sleep(max(0.0, 0.02 - took))
    reader.join()
    return times


def spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    shown = {"p50": statistics.median(ordered), "p99": p99, "max": ordered[-1]}
    return {name: round(value, 2) for name, value in shown.items()} | {"count": len(ordered)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--clients", type=int, default=6)
    given = parser.parse_args()
    process, url = start(given.model)
    found: dict[str, dict[str, list[float]]] = {"quiet": {}, "flooded": {}}
    answers: Counter[str] = Counter()
    bodies, lock = bombs(), threading.Lock()
    try:
        for name in ["quiet", "flooded"] * given.rounds:
            stop = threading.Event()
            job = (url, bodies, lock, stop, answers)
            threads = [
                threading.Thread(target=flood, args=job) for _ in range(given.clients if name == "flooded" else 0)
            ]
            for thread in threads:
                thread.start()
            for canary, times in canaries(url, given.seconds).items():
                found[name].setdefault(canary, []).extend(times)
            stop.set()
            for thread in threads:
                thread.join()
            print(name, {canary: spread(times) for canary, times in found[name].items()}, flush=True)
    finally:
        process.terminate()
        process.wait(60)
    result = {name: {canary: spread(times) for canary, times in by.items()} for name, by in found.items()}
    print(json.dumps({"model": given.model, "clients": given.clients, "answers": dict(answers)} | result))


if __name__ == "__main__":
    main()
