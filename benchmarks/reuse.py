"""What KV-cache reuse is worth over HTTP, beside llama.cpp's server, and what it costs where there is nothing to reuse.

    python benchmarks/reuse.py
    python benchmarks/reuse.py --parts first chat --llama-server PATH

first    time to the first token: cold, warm, from host memory, from disk after a restart. `disk, dropped` has the
         files taken out of the page cache before. llama-server: its slot (warm), its cache in host memory (on by
         default), and slots saved to and restored from files; restoring is part of the time. It has one slot: of
         four in one cache it drops idle ones for a prompt that needs their room, and does not save them.
chat, agents
         traces (reuse_traces.py) of a few sessions, lengths divided, one request after the other: token hit rate beside
         the ideal infinite cache, and times to the first token. Both servers have KV memory for --pool-tokens.
unused   prompts that nobody has sent, to servers without tiers, with memory and with disk: bursts in turn, so that
         what is written behind a request weighs on the next one of the burst. Ratios are to no tiers in the same round.

Prompts are token ids, answers have one token (`unused`: several). Medians. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peers import environments, servers
from peers.servers import Answer, Server
from reuse_traces import Turn, synthesise
from setpoint.assemble import load_model, models_directory
from setpoint.loaders.hub import resolve_model

BLOCK = 16
VOCABULARY = 40_000  # token ids of synthetic text
HOST_BYTES = 2 << 30
FULL_HOST_BYTES = 64 << 20  # soon full: what a server that has run for long has
TRACES = {"chat": (24, 32), "agents": (8, 16)}  # sessions, and what their lengths are divided by


def text(source: random.Random, length: int) -> list[int]:
    return [source.randrange(5, VOCABULARY) for _ in range(length)]


def drop_page_cache(folder: Path) -> None:
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def settle(folder: Path) -> None:
    """Until nothing more is written behind."""
    before, quiet_since = -1, time.monotonic()
    while time.monotonic() - quiet_since < 0.5:
        time.sleep(0.05)
        number = sum(1 for _ in folder.rglob("*"))
        if number != before:
            before, quiet_since = number, time.monotonic()


def median(seconds: Sequence[float]) -> float:
    return round(statistics.median(seconds) * 1e3, 2)


class Bench:
    """Both servers of one model, with the same KV memory."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self._llama_server = None if options.no_rival else environments.llama_server(options.llama_server)

    def ours(self, tokens: int, *flags: object) -> Server:
        pool = self.options.token_bytes * tokens
        limits = ("--max-model-len", self.options.context, "--kv-cache-memory-bytes", pool)
        server = servers.setpoint(self.options.path, self.folder / "log", *limits, *flags)
        return warmed_up(server)

    @property
    def has_rival(self) -> bool:
        return self._llama_server is not None

    def theirs(self, tokens: int, *flags: object) -> Server:
        assert self._llama_server is not None
        server = servers.llama_server(
            self._llama_server, self.options.path, self.folder / "log", "--ctx-size", tokens, *flags
        )
        return warmed_up(server)


def warmed_up(server: Server) -> Server:
    """Whatever a first step costs, and the rates by which it is decided what to read."""
    for token in (1, 2):
        server.first_token([token] * 64)
    return server


class States:
    """Times and cached tokens of one prompt length in every state."""

    def __init__(self) -> None:
        self.answers: dict[str, list[Answer]] = {}

    def note(self, state: str, answer: Answer) -> None:
        self.answers.setdefault(state, []).append(answer)

    def row(self) -> dict[str, Any]:
        return {
            "ms": {state: median([answer.seconds for answer in found]) for state, found in self.answers.items()},
            "cached_tokens": {state: [answer.num_cached for answer in found] for state, found in self.answers.items()},
        }


def first_tokens(bench: Bench, length: int) -> dict[str, Any]:
    source = random.Random(length)
    prompts = [text(source, length) for _ in range(bench.options.repeat)]
    fillers = [text(source, bench.options.context - 64) for _ in range(2)]
    rows = {"setpoint": _our_first_tokens(bench, prompts, fillers)}
    if bench.has_rival:
        rows["llama-server"] = _their_first_tokens(bench, prompts, fillers)
    return rows


def _in_memory(states: States, server: Server, prompts: list[list[int]], fillers: list[list[int]]) -> None:
    for prompt in prompts:
        states.note("cold", server.first_token(prompt))
        states.note("warm", server.first_token(prompt))
        for filler in fillers:
            server.first_token(filler)
        states.note("memory", server.first_token(prompt))


def _after_restarts(folder: Path, restarted: Callable[[str], None]) -> None:
    for state in ("disk", "disk, dropped"):
        if state == "disk, dropped":
            drop_page_cache(folder)
        restarted(state)


def _our_first_tokens(bench: Bench, prompts: list[list[int]], fillers: list[list[int]]) -> dict[str, Any]:
    states, length = States(), len(prompts[0])
    pool = bench.options.context + 64
    with bench.ours(pool, "--kv-host-bytes", HOST_BYTES) as server:
        _in_memory(states, server, prompts, fillers)
    path = bench.folder / f"kv-{length}"
    flags = ("--kv-disk-path", path)
    with bench.ours(2 * pool, *flags) as server:
        for prompt in prompts:
            server.first_token(prompt)
        settle(path)

    def restarted(state: str) -> None:
        with bench.ours(2 * pool, *flags) as server:
            for prompt in prompts:
                states.note(state, server.first_token(prompt))

    _after_restarts(path, restarted)
    return states.row()


def _their_first_tokens(bench: Bench, prompts: list[list[int]], fillers: list[list[int]]) -> dict[str, Any]:
    states, path = States(), bench.folder / f"slots-{len(prompts[0])}"
    path.mkdir()
    flags = ("--parallel", 1, "--slot-save-path", path)
    with bench.theirs(bench.options.context + 64, *flags) as server:
        _in_memory(states, server, prompts, fillers[:1])
        for number, prompt in enumerate(prompts):
            server.first_token(prompt, id_slot=0)
            server.post("/slots/0?action=save", {"filename": f"{number}.bin"})

    def restarted(state: str) -> None:
        with bench.theirs(bench.options.context + 64, *flags) as server:
            for number, prompt in enumerate(prompts):
                began = time.perf_counter()
                server.post("/slots/0?action=restore", {"filename": f"{number}.bin"})
                seconds = time.perf_counter() - began
                answer = server.first_token(prompt, id_slot=0)
                states.note(state, Answer(seconds + answer.seconds, answer.num_prompt, answer.num_cached))

    _after_restarts(path, restarted)
    return states.row()


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


def trace(bench: Bench, kind: str) -> dict[str, Any]:
    sessions, scale = TRACES[kind]
    turns = [turn for turn in synthesise(kind, 4000, seed=1) if turn.session < sessions][: bench.options.turns]
    prompts = [tokens_of(turn, scale, bench.options.context - 8) for turn in turns]
    total, best = sum(map(len, prompts)), ideal_tokens(prompts)
    disk = ("--kv-disk-path", bench.folder / f"kv-{kind}")
    settings: dict[str, Callable[[], Server]] = {
        "no reuse": lambda: bench.ours(bench.options.pool_tokens, "--no-enable-prefix-caching"),
        "pool": lambda: bench.ours(bench.options.pool_tokens),
        "pool and memory": lambda: bench.ours(bench.options.pool_tokens, "--kv-host-bytes", HOST_BYTES),
        "pool and disk": lambda: bench.ours(bench.options.pool_tokens, *disk),
        "the same again after a restart": lambda: bench.ours(bench.options.pool_tokens, *disk),
    }
    if bench.has_rival:
        settings["llama-server"] = lambda: bench.theirs(bench.options.pool_tokens)
        settings["llama-server without host memory"] = lambda: bench.theirs(bench.options.pool_tokens, "--cache-ram", 0)
    rows: dict[str, Any] = {}
    for name, start in settings.items():
        with start() as server:
            rows[name] = row([server.first_token(prompt) for prompt in prompts], total, best)
            if name == "pool and disk":
                settle(disk[1])  # type: ignore[arg-type]
        print(f"  {kind}: {name:34} {rows[name]}", flush=True)
    return {
        "turns": len(turns),
        "sessions": sessions,
        "lengths_divided_by": scale,
        "prompt_tokens": total,
        "ideal_token_hit_rate": round(best / total, 4),
        "rows": rows,
    }


def row(answers: Sequence[Answer], total: int, best: int) -> dict[str, float]:
    seconds = sorted(answer.seconds for answer in answers)
    hits = sum(answer.num_cached for answer in answers)
    return {
        "token_hit_rate": round(hits / total, 4),
        "share_of_ideal": round(hits / best, 4),
        "ttft_ms_median": median(seconds),
        "ttft_ms_p95": round(seconds[min(int(len(seconds) * 0.95), len(seconds) - 1)] * 1e3, 2),
        "ttft_ms_mean": round(statistics.mean(seconds) * 1e3, 2),
    }


def unused(bench: Bench) -> dict[str, Any]:
    """Tiers that never help: seconds of a burst of unknown prompts with them, over those without."""
    options = bench.options
    settings: dict[str, tuple[object, ...]] = {
        "off": (),
        "off, again": (),
        "memory": ("--kv-host-bytes", FULL_HOST_BYTES),
        "disk": ("--kv-disk-path", bench.folder / "kv-unused"),
    }
    open_servers = {name: bench.ours(options.context + 64, *flags) for name, flags in settings.items()}
    source = random.Random(3)
    seconds: dict[str, list[float]] = {name: [] for name in settings}
    first: dict[str, list[float]] = {name: [] for name in settings}
    order = list(settings)
    try:
        for round_number in range(-1, options.rounds):  # the first fills the pools
            prompts = [text(source, options.unused_tokens) for _ in range(options.burst)]
            source.shuffle(order)
            for name in order:
                began = time.perf_counter()
                answers = [open_servers[name].first_token(prompt, max_tokens=8) for prompt in prompts]
                if round_number >= 0:
                    seconds[name].append(time.perf_counter() - began)
                    first[name].append(statistics.median(answer.seconds for answer in answers))
                assert not any(answer.num_cached for answer in answers)
                time.sleep(options.pause_s)  # what is left to write behind is not to weigh on the others
    finally:
        for server in open_servers.values():
            server.close()
    return {
        "rounds": options.rounds,
        "prompts": options.burst,
        "prompt_tokens": options.unused_tokens,
        "rows": {name: _over(seconds[name], seconds["off"]) | _first(first[name]) for name in settings},
    }


def _first(seconds: Sequence[float]) -> dict[str, Any]:
    return {"ttft_ms_median": median(seconds)}


def _over(with_it: Sequence[float], without: Sequence[float]) -> dict[str, Any]:
    ratios = sorted(mine / plain for mine, plain in zip(with_it, without, strict=True))
    quarter = len(ratios) // 4
    return {
        "over_off": round(statistics.median(ratios), 4),
        "quartiles": [round(ratios[quarter], 4), round(ratios[-1 - quarter], 4)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--llama-server", type=Path, help="one that is built already")
    parser.add_argument("--no-rival", action="store_true", help="without llama.cpp")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--lengths", type=int, nargs="*", default=[256, 1024, 3072])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--turns", type=int, default=80)
    parser.add_argument("--pool-tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--burst", type=int, default=6, help="prompts of a burst of `unused`")
    parser.add_argument("--unused-tokens", type=int, default=512)
    parser.add_argument("--pause-s", type=float, default=0.3)
    parser.add_argument("--parts", nargs="*", default=["first", "chat", "agents", "unused"])
    options = parser.parse_args()
    options.path = resolve_model(options.model, models_directory())
    options.token_bytes = kv_token_bytes(options.model)
    result: dict[str, Any] = {"question": "KV-cache reuse", "date": time.strftime("%Y-%m-%d"), "model": options.model}
    result["token_bytes"] = options.token_bytes
    for part in options.parts:
        with tempfile.TemporaryDirectory(dir=models_directory().parent) as name:
            bench = Bench(options, Path(name))
            if part == "first":
                for length in options.lengths:
                    found = result.setdefault("first", {})[str(length)] = first_tokens(bench, length)
                    print(f"{length} tokens, ms to the first token: {found}", flush=True)
            elif part == "unused":
                result["unused"] = unused(bench)
                print(f"unused: {result['unused']['rows']}", flush=True)
            else:
                result[part] = trace(bench, part)
                print(f"{part}: ideal {result[part]['ideal_token_hit_rate']}", flush=True)
    print(json.dumps(result))


def kv_token_bytes(model: str) -> int:
    """Of keys and values of 16 bits with a scale for each vector."""
    loaded = load_model(model)
    loaded.checkpoint.close()
    layers = loaded.model.layers.layers
    return sum(2 * layer.attention.kv_heads * (2 * layer.attention.head_dim + 4) for layer in layers)


if __name__ == "__main__":
    main()
