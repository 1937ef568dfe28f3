"""What KV-cache reuse is worth: first tokens cold, warm, from memory, from disk after a restart; hit rates on traces.

    python benchmarks/reuse.py
    python benchmarks/reuse.py --rival-python rival/bin/python --turns 60

1. A prompt's time to the first token, in processes of their own where a restart is in between. `disk, dropped` has the
   files taken out of the page cache before. llama.cpp: its slot (warm), LlamaRAMCache (its server's prompt cache, in
   process) and its state files.
2. Multi-turn chat and agent traces (reuse_traces.py, lengths divided by --length-scale), one request after the other:
   token hit rate beside the ideal infinite cache, and times to the first token. The pool is as small as --pool-tokens.
3. Isolation (AT-4): the same for prompts that another tenant has sent and prompts that nobody has, with the distance of
   the two distributions (Kolmogorov-Smirnov) and its probability; the negative control lets both share.

Medians. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import queue
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peers.worker import Worker
from reuse_traces import Turn, synthesise
from setpoint.assemble import Assembly, build_engine, models_directory
from setpoint.config import EngineConfig
from setpoint.engine.events import Event
from setpoint.engine.request import Request
from setpoint.engine.sampling import SamplingParams
from setpoint.loaders.hub import resolve_model

BLOCK = 16
VOCABULARY = 40_000  # token ids of synthetic text
PATIENCE_S = 120.0


class Ours:
    """The engine, driven one request at a time."""

    def __init__(self, model: str, context: int, kv_bytes: int, **knobs: Any) -> None:
        self._events: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
        config = EngineConfig(
            model, max_model_len=context, max_num_seqs=4, kv_cache_memory_bytes=kv_bytes, seed=0, **knobs
        )
        self.assembly: Assembly = build_engine(config, self._events.put, chats=False)
        self.engine = self.assembly.engine
        self.engine.start()
        self._number = 0
        self.first_token([1] * 64)  # whatever a first step costs

    def first_token(self, prompt: Sequence[int], tenant: str = "") -> tuple[float, int]:
        """(seconds to the first token, cached tokens)."""
        self._number += 1
        name = f"r{self._number}"
        params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
        self.engine.submit(Request(name, list(prompt), params, tenant=tenant))
        first: Event | None = None
        while True:
            for event in self._events.get(timeout=PATIENCE_S):
                if event.error is not None:
                    raise event.error
                first = first or event
                if event.finish_reason is not None:
                    return first.time - first.arrival_time, first.num_cached_tokens

    def settle(self) -> None:
        """Until what is written behind is written."""
        scheduler = self.engine._scheduler
        end = time.monotonic() + 30
        lower = scheduler.kv.lower
        disk: Any = None if lower is None else lower.disk
        while disk is not None and time.monotonic() < end and (scheduler.num_unsaved or disk._queued_bytes):
            time.sleep(0.02)

    def close(self) -> None:
        self.engine.shutdown()


def text(source: random.Random, length: int) -> list[int]:
    return [source.randrange(5, VOCABULARY) for _ in range(length)]


def drop_page_cache(folder: Path) -> None:
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def median(values: Sequence[float]) -> float:
    return round(statistics.median(values) * 1e3, 2)


def first_tokens(options: argparse.Namespace, folder: Path, length: int) -> dict[str, float]:
    """Milliseconds for one prompt length, in every state."""
    source = random.Random(length)
    prompts = [text(source, length) for _ in range(options.repeat)]
    fillers = [text(source, options.context - 64) for _ in range(2)]
    kv_bytes = options.token_bytes * (options.context + 64)
    times: dict[str, list[float]] = {}

    def note(state: str, measured: tuple[float, int], cached: int) -> None:
        assert measured[1] >= cached, f"{state}: {measured[1]} cached tokens of {length}"
        times.setdefault(state, []).append(measured[0])

    whole = (length - 1) // BLOCK * BLOCK
    ours = Ours(options.model, options.context, kv_bytes, kv_host_bytes=4 << 30)
    for prompt in prompts:
        note("cold", ours.first_token(prompt), 0)
        note("warm", ours.first_token(prompt), whole)
        for filler in fillers:
            ours.first_token(filler)
        note("memory", ours.first_token(prompt), whole)
    ours.close()
    path = folder / f"kv-{length}"
    written = Ours(options.model, options.context, kv_bytes * 2, kv_disk_path=str(path))
    for prompt in prompts:
        written.first_token(prompt)
    written.settle()
    written.close()
    for state in ("disk", "disk, dropped"):
        if state == "disk, dropped":
            drop_page_cache(path)
        restarted = Ours(options.model, options.context, kv_bytes * 2, kv_disk_path=str(path))
        restarted.engine._scheduler.kv.lower.disk.wait_until_scanned(30)  # type: ignore[union-attr]
        for prompt in prompts:
            note(state, restarted.first_token(prompt), whole)
        restarted.close()
    return {state: median(values) for state, values in times.items()}


def rival(options: argparse.Namespace, folder: Path, ram_bytes: int) -> Worker:
    arguments = [str(options.path), "--context", str(options.context), "--threads", str(options.threads)]
    return Worker(
        Path(options.rival_python),
        "llama_cpp_reuse.py",
        [*arguments, "--ram-bytes", str(ram_bytes)],
        folder / "rival.log",
    )


def rival_first_tokens(options: argparse.Namespace, folder: Path, length: int) -> dict[str, float]:
    source = random.Random(length)
    prompts = [text(source, length) for _ in range(options.repeat)]
    fillers = [text(source, options.context - 64) for _ in range(2)]
    times: dict[str, list[float]] = {}

    def ask(worker: Worker, state: str, prompt: list[int], **settings: Any) -> None:
        answer = worker.ask("first_token", prompt=prompt, settings=settings)
        times.setdefault(state, []).append(answer["seconds"])

    plain = rival(options, folder, 0)
    for prompt in prompts:
        ask(plain, "cold", prompt, cold=True)
        ask(plain, "warm", prompt)
    for number, prompt in enumerate(prompts):
        plain.ask("first_token", prompt=prompt, settings={"cold": True})
        plain.ask("save", path=str(folder / f"state-{number}"))
    plain.close()
    cached = rival(options, folder, 4 << 30)
    for prompt in prompts:
        cached.ask("first_token", prompt=prompt, settings={"cold": True})
        for filler in fillers:
            cached.ask("first_token", prompt=filler, settings={})
        ask(cached, "memory", prompt)
    cached.close()
    for state in ("disk", "disk, dropped"):
        if state == "disk, dropped":
            drop_page_cache(folder)
        restarted = rival(options, folder, 0)
        restarted.ask("first_token", prompt=[1] * 64, settings={"cold": True})
        for number, prompt in enumerate(prompts):
            loading = restarted.ask("load", path=str(folder / f"state-{number}"))
            assert loading["loaded"]
            answer = restarted.ask("first_token", prompt=prompt, settings={})
            times.setdefault(state, []).append(loading["seconds"] + answer["seconds"])
        restarted.close()
    return {state: median(values) for state, values in times.items()}


def tokens_of(turn: Turn, scale: int, longest: int) -> list[int]:
    ids: list[int] = []
    for identity, size in turn.segments:
        source = random.Random(identity)
        ids += text(source, max(size // scale, 1))
    return ids[:longest]


def ideal_tokens(prompts: Sequence[list[int]]) -> int:
    """What an infinite cache finds: full blocks computed before, never a prompt's last token."""
    seen: set[int] = set()
    found = 0
    for prompt in prompts:
        keys, key = [], 0
        for start in range(0, len(prompt) // BLOCK * BLOCK, BLOCK):
            key = hash((key, tuple(prompt[start : start + BLOCK])))
            keys.append(key)
        usable = keys[: (len(prompt) - 1) // BLOCK]
        found += BLOCK * next((index for index, key in enumerate(usable) if key not in seen), len(usable))
        seen.update(keys)
    return found


def trace(options: argparse.Namespace, folder: Path, kind: str) -> dict[str, Any]:
    turns = synthesise(kind, options.turns, seed=1)
    prompts = [tokens_of(turn, options.length_scale, options.context - 8) for turn in turns]
    total, best = sum(map(len, prompts)), ideal_tokens(prompts)
    pool = options.token_bytes * options.pool_tokens
    settings: dict[str, dict[str, Any]] = {
        "no reuse": {"enable_prefix_caching": False},
        "pool": {},
        "pool and memory": {"kv_host_bytes": 4 << 30},
        "pool and disk": {"kv_disk_path": str(folder / f"kv-{kind}")},
    }
    rows: dict[str, Any] = {}
    for name, knobs in settings.items():
        ours = Ours(options.model, options.context, pool, **knobs)
        measured = [ours.first_token(prompt) for prompt in prompts]
        ours.settle()
        ours.close()
        rows[name] = row(measured, total, best)
    ours = Ours(options.model, options.context, pool, **settings["pool and disk"])
    rows["the same again after a restart"] = row([ours.first_token(prompt) for prompt in prompts], total, total)
    ours.close()
    if options.rival_python:
        for name, ram_bytes in (("llama.cpp, slot", 0), ("llama.cpp, LlamaRAMCache", 4 << 30)):
            worker = rival(options, folder, ram_bytes)
            worker.ask("first_token", prompt=[1] * 64, settings={"cold": True})
            answers = [worker.ask("first_token", prompt=prompt, settings={}) for prompt in prompts]
            worker.close()
            rows[name] = row([(answer["seconds"], answer["cached"]) for answer in answers], total, best)
    return {
        "turns": len(turns),
        "prompt_tokens": total,
        "ideal_token_hit_rate": round(best / total, 4),
        "rows": rows,
    }


def row(measured: Sequence[tuple[float, int]], total: int, best: int) -> dict[str, float]:
    seconds = sorted(seconds for seconds, _ in measured)
    hits = sum(cached for _, cached in measured)
    return {
        "token_hit_rate": round(hits / total, 4),
        "share_of_ideal": round(hits / best, 4),
        "ttft_ms_median": median(seconds),
        "ttft_ms_p95": round(seconds[min(int(len(seconds) * 0.95), len(seconds) - 1)] * 1e3, 2),
        "ttft_ms_mean": round(statistics.mean(seconds) * 1e3, 2),
    }


def isolation(options: argparse.Namespace) -> dict[str, Any]:
    """Times of prompts that the other tenant has sent and of unknown ones, in turn."""
    rows: dict[str, Any] = {}
    for name, attacker in (("separate tenants", "b"), ("negative control: shared", "a")):
        source = random.Random(5)
        ours = Ours(options.model, options.context, options.token_bytes * options.context * 2)
        known, fresh = [], []
        for _ in range(options.pairs):
            secret, other = text(source, 48), text(source, 48)
            ours.first_token(secret, "a")
            pair = [(known, secret), (fresh, other)]
            source.shuffle(pair)
            for times, prompt in pair:
                times.append(ours.first_token(prompt, attacker)[0])
        ours.close()
        distance, probability = kolmogorov_smirnov(known, fresh)
        rows[name] = {
            "known_ms": median(known),
            "unknown_ms": median(fresh),
            "ks_distance": round(distance, 4),
            "ks_p": float(f"{probability:.3g}"),
        }
    return {"pairs": options.pairs, "rows": rows}


def kolmogorov_smirnov(left: Sequence[float], right: Sequence[float]) -> tuple[float, float]:
    """Largest distance of two empirical distributions, and the probability of it in samples of one distribution."""
    merged = sorted([(value, 1 / len(left)) for value in left] + [(value, -1 / len(right)) for value in right])
    height = distance = 0.0
    for index, (value, step) in enumerate(merged):
        height += step
        if index + 1 == len(merged) or merged[index + 1][0] != value:
            distance = max(distance, abs(height))
    root = math.sqrt(len(left) * len(right) / (len(left) + len(right)))
    argument = (root + 0.12 + 0.11 / root) * distance
    if argument < 0.2:
        return distance, 1.0
    terms = (2 * (-1) ** (k - 1) * math.exp(-2 * (k * argument) ** 2) for k in range(1, 101))
    return distance, min(max(sum(terms), 0.0), 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rival-python", help="Python of an environment with llama-cpp-python")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--lengths", type=int, nargs="*", default=[256, 1024, 3072])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--turns", type=int, default=60)
    parser.add_argument("--length-scale", type=int, default=16)
    parser.add_argument("--pool-tokens", type=int, default=8192)
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--parts", nargs="*", default=["first", "chat", "agents", "isolation"])
    options = parser.parse_args()
    options.path = resolve_model(options.model, models_directory())
    probe = Ours(options.model, options.context, 1 << 30)
    layers = probe.assembly.model.layers.layers
    options.token_bytes = sum(2 * layer.attention.kv_heads * (2 * layer.attention.head_dim + 4) for layer in layers)
    probe.close()
    result: dict[str, Any] = {"question": "KV-cache reuse", "date": time.strftime("%Y-%m-%d"), "model": options.model}
    result["token_bytes"] = options.token_bytes
    for part in options.parts:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if part == "first":
                for length in options.lengths:
                    found = {"setpoint": first_tokens(options, folder, length)}
                    if options.rival_python:
                        found["llama.cpp"] = rival_first_tokens(options, folder, length)
                    result.setdefault("ttft_ms", {})[str(length)] = found
                    print(f"{length} tokens, ms to the first token: {found}", flush=True)
            elif part == "isolation":
                result["isolation"] = isolation(options)
                print(f"isolation: {result['isolation']}", flush=True)
            else:
                result[part] = trace(options, folder, part)
                print(f"{part}: ideal {result[part]['ideal_token_hit_rate']}", flush=True)
                for setting, values in result[part]["rows"].items():
                    print(f"  {setting:32} {values}", flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
