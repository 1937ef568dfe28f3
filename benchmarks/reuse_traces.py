"""Traces with shared prefixes, synthesised from the quantile tables of `data/workload_stats.json`.

    chat     sessions as in the Mooncake conversation trace: its turn counts, gaps, first lengths and growth; every
             prompt starts with the same block
    agents   agents with one of 8 system prompts (Zipf; 2,560 tokens each), 12 steps on average (geometric); a step adds
             the output (Mooncake synthetic) and a tool's result (a quarter of an Azure code input); gaps of Mooncake
             synthetic
    shared   single turns behind one of 64 system prompts (Zipf; 1,536 tokens each): Azure conversation inputs
    mixed    all three, half as many of each

Prompts are lists of block ids, equal where block and prefix are equal, with the tokens of the last, partial block.
"""

from __future__ import annotations

import itertools
import json
import random
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STATISTICS = Path(__file__).parent / "data" / "workload_stats.json"
BLOCK_TOKENS = 512
MEAN_STEPS = 12
LONGEST = 64  # steps of an agent, turns of a chat


@dataclass(frozen=True, slots=True)
class Turn:
    """One request. `segments` are (id, tokens): equal ids in equal places are equal text."""

    time: float
    session: int
    number: int  # 0 for the first of its session
    segments: tuple[tuple[int, int], ...]
    num_output: int

    @property
    def num_tokens(self) -> int:
        return sum(size for _, size in self.segments)


class Table:
    """Sampled by its inverse distribution function, linear between the levels."""

    def __init__(self, levels: list[float], values: list[float]) -> None:
        self._levels, self._values = levels, values

    def draw(self, source: random.Random) -> float:
        level = source.random() * 100
        index = min(max(bisect_right(self._levels, level), 1), len(self._levels) - 1)
        low, high = self._levels[index - 1], self._levels[index]
        part = (level - low) / (high - low)
        return self._values[index - 1] + part * (self._values[index] - self._values[index - 1])


class Statistics:
    def __init__(self, path: Path = STATISTICS) -> None:
        content = json.loads(path.read_text())
        self.levels: list[float] = content["quantile_levels_pct"]
        self.tables: dict[str, Any] = content["tables"]

    def table(self, name: str, *path: str) -> Table:
        found = self.tables[name]
        for step in path:
            found = found[step]
        return Table(found.get("levels_pct", self.levels), found["q"])


Session = Callable[[random.Random, float, int, Iterator[int]], Iterator[Turn]]


def _chat(statistics: Statistics) -> Session:
    name = "mooncake_conversation"
    first, output = statistics.table(name, "input_len"), statistics.table(name, "output_len")
    turns = statistics.tables[name]["prefix"]["turns"]
    gap, growth = (
        statistics.table(name, "prefix", "turns", key) for key in ("continuation_gap_s", "input_growth_tokens")
    )
    shares = turns["p_turn_1_to_10"]

    def session(source: random.Random, time: float, number: int, ids: Iterator[int]) -> Iterator[Turn]:
        segments = [(0, BLOCK_TOKENS), (next(ids), max(int(first.draw(source)) - BLOCK_TOKENS, 1))]
        for turn in range(LONGEST):
            num_output = max(int(output.draw(source)), 1)
            yield Turn(time, number, turn, tuple(segments), num_output)
            goes_on = shares[turn + 1] / shares[turn] if turn + 1 < len(shares) else 0.8
            if source.random() >= goes_on:
                return
            segments.append((next(ids), max(int(growth.draw(source)), 16)))
            time += gap.draw(source)

    return session


def _agents(statistics: Statistics) -> Session:
    task, tool = statistics.table("azure2023_conv", "input_len"), statistics.table("azure2023_code", "input_len")
    output = statistics.table("mooncake_synthetic", "output_len")
    gap = statistics.table("mooncake_synthetic", "prefix", "turns", "continuation_gap_s")

    def session(source: random.Random, time: float, number: int, ids: Iterator[int]) -> Iterator[Turn]:
        segments = [(-1 - _zipf(source, 8), 5 * BLOCK_TOKENS), (next(ids), int(task.draw(source)) + 1)]
        for step in range(LONGEST):
            num_output = max(int(output.draw(source)), 1)
            yield Turn(time, number, step, tuple(segments), num_output)
            if source.random() < 1 / MEAN_STEPS:
                return
            segments.append((next(ids), num_output + int(tool.draw(source) / 4) + 1))
            time += gap.draw(source)

    return session


def _shared(statistics: Statistics) -> Session:
    task, output = statistics.table("azure2023_conv", "input_len"), statistics.table("azure2023_conv", "output_len")

    def session(source: random.Random, time: float, number: int, ids: Iterator[int]) -> Iterator[Turn]:
        segments = ((-100 - _zipf(source, 64), 3 * BLOCK_TOKENS), (next(ids), int(task.draw(source)) + 1))
        yield Turn(time, number, 0, segments, max(int(output.draw(source)), 1))

    return session


def _zipf(source: random.Random, count: int) -> int:
    return source.choices(range(count), [1 / (rank + 1) for rank in range(count)])[0]


SESSIONS = {"chat": (_chat, 3.4 * 0.67), "agents": (_agents, 3.9 / MEAN_STEPS), "shared": (_shared, 5.5)}


def synthesise(kind: str, num_turns: int, seed: int, statistics: Statistics | None = None) -> list[Turn]:
    """Turns in order of time; sessions begin as a Poisson process."""
    statistics = statistics or Statistics()
    kinds = list(SESSIONS) if kind == "mixed" else [kind]
    ids, numbers = itertools.count(1), itertools.count()
    turns: list[Turn] = []
    for name in kinds:
        make, rate = SESSIONS[name]
        session = make(statistics)
        source = random.Random(f"{seed} {name}")
        time, own = 0.0, 0
        while own < num_turns // len(kinds):
            time += source.expovariate(rate)
            made = list(session(source, time, next(numbers), ids))
            own += len(made)
            turns += made
    turns.sort(key=lambda turn: turn.time)
    return turns[:num_turns]


def blocks_of(
    turn: Turn, names: dict[tuple[int, tuple[tuple[int, int], ...]], int], block: int = BLOCK_TOKENS
) -> list[int]:
    """Ids of the full blocks: equal where block and prefix are equal. `names` is kept between calls."""
    found, parent, content, filled = [], -1, [], 0
    for identity, size in turn.segments:
        at = 0
        while at < size:
            taken = min(size - at, block - filled)
            content.append((identity, at))
            filled, at = filled + taken, at + taken
            if filled == block:
                parent = names.setdefault((parent, tuple(content)), len(names))
                found.append(parent)
                content, filled = [], 0
    return found
