"""The open-loop client beside an independent one: same server, same messages, same moments of sending.

    python benchmarks/client_crosscheck.py [--model smollm2-135m] [--rate 2] [--requests 40] [--rounds 3]
    python benchmarks/client_crosscheck.py --guidellm VENV/bin/guidellm       GuideLLM 0.8, from PyPI in its own venv

The other client is the official openai package on httpx, with stamps of its own, started at each request's moment. Both
take turns on one `setpoint serve`; other salts in the texts keep either from finding the other's prefixes. Reported are
TTFT and TPOT (median, 95th percentile) of both and the ratio ours / theirs, per round and as the median. Their stamps
come after a client library's own work, so ratios a little below 1 are right; far above 1, ours would add time. The
last line is one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from setpoint.tune.replay.client import ReplayOptions, replay
from setpoint.tune.replay.prompts import Prompts, words
from setpoint.tune.replay.server import Surveyor
from setpoint.workload.trace import Trace, TraceHeader, TraceRequest

FIGURES = {"ttft_p50": ("ttft", 50), "ttft_p95": ("ttft", 95), "tpot_p50": ("tpot", 50), "tpot_p95": ("tpot", 95)}


def traffic(count: int, rate: float, salt: str, is_constant: bool = False) -> Trace:
    """Poisson arrivals, prompts of 50 to 250 words, answers of 16 to 64 tokens; salts change the text alone."""
    rng = np.random.default_rng(1)
    arrivals = np.arange(count) / rate if is_constant else np.cumsum(rng.exponential(1 / rate, count))
    prompts: Prompts[str] = Prompts(words(), 16, salt)
    requests = []
    for index, at in enumerate(arrivals.tolist()):
        length, output = int(rng.integers(50, 250)), int(rng.integers(16, 64))
        text = " ".join(prompts.items(TraceRequest(0.0, length, 1), index))
        messages = ({"role": "user", "content": text},)
        requests.append(TraceRequest(at, length, output, messages=messages))
    return Trace(TraceHeader("cross-check"), requests)


def ours(url: str, trace: Trace, salt: str) -> dict[str, list[float]]:
    with Surveyor(url) as surveyor:
        run = replay(surveyor, surveyor.target(temperature=0.8), trace, ReplayOptions(salt, warm_up=False))
    timings = [timing for timing in run.timings if timing.ok]
    assert len(timings) == len(trace.requests), [log.error for log in run.logs if not log.ok]
    tpots = [timing.tpot_s for timing in timings if timing.tpot_s is not None]
    return {"ttft": [timing.ttft_s for timing in timings], "tpot": tpots}


async def theirs(url: str, model: str, trace: Trace) -> dict[str, list[float]]:
    import openai

    found: dict[str, list[float]] = {"ttft": [], "tpot": []}
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        start = time.perf_counter() + 0.3

        async def one(index: int, request: TraceRequest) -> None:
            await asyncio.sleep(start + request.arrival_s - time.perf_counter())
            sent = time.perf_counter()
            stream = await client.chat.completions.create(
                model=model,
                messages=list(request.messages or ()),  # type: ignore[arg-type]
                max_tokens=request.output_tokens,
                temperature=0.8,
                seed=index,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            )
            first = last = tokens = None
            async for chunk in stream:
                if chunk.choices and chunk.choices[0].delta.content:
                    last = time.perf_counter()
                    first = first or last
                if chunk.usage is not None:
                    tokens = chunk.usage.completion_tokens
            assert first is not None
            assert last is not None
            assert tokens == request.output_tokens
            found["ttft"].append(first - sent)
            found["tpot"].append((last - first) / (tokens - 1))

        await asyncio.gather(*(one(index, request) for index, request in enumerate(trace.requests)))
    return found


def guidellm(program: Path, url: str, model: str, trace: Trace, rate: float) -> dict[str, list[float]]:
    """Its "inter-token latency" is our TPOT: (last token - first token) / (tokens - 1)."""
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder) / "data.jsonl", Path(folder) / "out.json"
        rows = [
            {"prompt": r.messages[0]["content"], "output_tokens_count": r.output_tokens}
            for r in trace.requests
            if r.messages
        ]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        command = [program, "run", "--backend", f"kind=openai_http,target={url},model={model}", "--disable-progress"]
        command += ["--profile", f"kind=constant,rate={rate:g}", "--constraint", f"kind=max_requests,count={len(rows)}"]
        command += ["--data", f"kind=json_file,path={data}", "--output", f"kind=json,path={out}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=300)
        requests = json.loads(out.read_text())["benchmarks"][0]["requests"]["successful"]
    assert len(requests) == len(rows)
    return {
        "ttft": [request["time_to_first_token_ms"] / 1e3 for request in requests],
        "tpot": [request["inter_token_latency_ms"] / 1e3 for request in requests],
    }


def serve(model: str) -> tuple[subprocess.Popen[bytes], str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--port", str(port), "--max-model-len", "1024"]
    command = [sys.executable, "-m", "setpoint.cli.main", "serve", model, *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            if httpx.get(f"{url}/readyz", timeout=5).status_code == 200:
                return process, url
        except httpx.TransportError:
            time.sleep(0.1)
    process.kill()
    raise SystemExit("the server did not start")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rate", type=float, default=2.0)
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--guidellm", type=Path, help="its program; the other client is then GuideLLM")
    parser.add_argument("--output", type=Path, help="where the document goes, besides stdout")
    given = parser.parse_args()
    process, url = serve(given.model)
    rounds: list[dict[str, Any]] = []
    try:
        model = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
        asyncio.run(theirs(url, model, traffic(4, 4.0, "warm-up")))
        for number in range(given.rounds):
            order = ("ours", "theirs") if number % 2 == 0 else ("theirs", "ours")
            found: dict[str, dict[str, list[float]]] = {}
            for client in order:
                trace = traffic(given.requests, given.rate, f"{client}{number}", given.guidellm is not None)
                if client == "ours":
                    found[client] = ours(url, trace, client)
                elif given.guidellm is not None:
                    found[client] = guidellm(given.guidellm, url, model, trace, given.rate)
                else:
                    found[client] = asyncio.run(theirs(url, model, trace))
            row: dict[str, Any] = {}
            for name, (metric, level) in FIGURES.items():
                pair = [float(np.percentile(found[client][metric], level) * 1e3) for client in ("ours", "theirs")]
                row[name] = {"ours_ms": pair[0], "theirs_ms": pair[1], "ratio": pair[0] / pair[1]}
            rounds.append(row)
            shown = ", ".join(f"{n} {r['ours_ms']:.2f}/{r['theirs_ms']:.2f} ms" for n, r in row.items())
            print(f"round {number + 1}, ours/theirs: {shown}", flush=True)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    ratios = {name: round(statistics.median(row[name]["ratio"] for row in rounds), 3) for name in FIGURES}
    print(", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items()))
    other = "openai-python on httpx" if given.guidellm is None else "GuideLLM 0.8"
    options = {name: value for name, value in vars(given).items() if name not in ("output", "guidellm")}
    document = json.dumps({**options, "other": other, "ratios": ratios, "rounds": rounds})
    if given.output is not None:
        given.output.write_text(document + "\n")
    print(document)


if __name__ == "__main__":
    main()
