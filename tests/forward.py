"""Drives a runner without a scheduler: what a sequence's logits are under a given chunking and company."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from setpoint.engine.plan import LogitsRow, PlanEntry, StepPlan
from setpoint.loaders.checkpoint import open_checkpoint
from setpoint.models import build_model
from setpoint.runtime.cpu.runner import CpuRunner

Logits = NDArray[np.float32]


def open_runner(path: Path, **options: Any) -> CpuRunner:
    """A CPU runner over a checkpoint; small limits unless told otherwise."""
    checkpoint = open_checkpoint(path)
    defaults: dict[str, Any] = {
        "dtype": "auto",
        "kv_dtype": "s16",
        "num_threads": 2,
        "isa": "auto",
        "max_model_len": 512,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 512,
        "kv_cache_memory_bytes": 64 << 20,
    }
    return CpuRunner(build_model(checkpoint.config), checkpoint, **(defaults | options))


@dataclass
class Blocks:
    """Hands out block ids of every KV group, in a shuffled order so that nothing relies on neighbours."""

    runner: CpuRunner
    seed: int = 0
    free: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.free = [list(map(int, rng.permutation(group.num_blocks))) for group in self.runner.info.kv_groups]

    def tables(self, num_tokens: int) -> tuple[list[int], ...]:
        count = -(-num_tokens // self.runner.info.block_size)
        return tuple([ids.pop() for _ in range(count)] for ids in self.free)


@dataclass
class Walk:
    """One sequence on its way through a runner: `chunks` tokens at a time (the last size repeats)."""

    tokens: Sequence[int]
    chunks: Sequence[int]
    first_wanted: int = 0  # logits from this position on
    tables: tuple[list[int], ...] = ()
    position: int = 0
    step: int = 0
    rows: list[Logits] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return self.position >= len(self.tokens)

    def entry(self, seq_id: int) -> PlanEntry:
        size = self.chunks[min(self.step, len(self.chunks) - 1)]
        tokens = list(self.tokens[self.position : self.position + size])
        skipped = max(self.first_wanted - self.position, 0)
        rows = [LogitsRow(offset, target=0) for offset in range(skipped, len(tokens))]
        return PlanEntry(seq_id, tokens, self.position, self.tables, rows)


def all_logits(runner: CpuRunner, walks: Sequence[Walk], *, seed: int = 0) -> list[Logits]:
    """Logits at the wanted positions of every walk, [positions, vocabulary]; unfinished walks share each step."""
    blocks = Blocks(runner, seed)
    for walk in walks:
        walk.tables = blocks.tables(len(walk.tokens))
    while active := [(index, walk) for index, walk in enumerate(walks) if not walk.done]:
        entries = [walk.entry(index) for index, walk in active]
        logits = runner.logits(StepPlan(entries))
        start = 0
        for (_, walk), entry in zip(active, entries, strict=True):
            walk.rows.append(logits[start : start + len(entry.rows)].copy())
            start += len(entry.rows)
            walk.position += len(entry.token_ids)
            walk.step += 1
    return [np.concatenate(walk.rows) for walk in walks]


def plain(runner: CpuRunner, tokens: Sequence[int], first_wanted: int = 0) -> Logits:
    """The oracle: the whole prompt in one step, alone."""
    return all_logits(runner, [Walk(tokens, [len(tokens)], first_wanted)])[0]
