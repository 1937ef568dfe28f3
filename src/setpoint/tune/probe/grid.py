"""The steps that a model is measured with: a small grid over batch, context, prompt tokens and drafts.

Made directly as plans, so that every shape is exact. What the steps attend to is real: one prompt is computed and its
blocks are copied to every sequence of the grid.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from setpoint.engine.plan import (
    KVRestore,
    KVSave,
    LogitsRow,
    PlanEntry,
    RowSampling,
    Runner,
    RunnerInfo,
    StepPlan,
    StepResult,
)
from setpoint.errors import ConfigError

GREEDY = RowSampling(temperature=0.0)
SHORT, LONG = 128, 1024  # contexts, in tokens
_POOL_SHARE = 0.5  # of the KV blocks that the grid may use


@dataclass(frozen=True, slots=True)
class Cell:
    """One step: `decodes` sequences behind `context` tokens with `drafts` each, beside a chunk of a prompt."""

    decodes: int = 0
    context: int = 0
    drafts: int = 0
    prompt: int = 0  # tokens of the chunk
    start: int = 0  # of the chunk, in its prompt
    is_last: bool = True  # chunk of its prompt: a token is drawn

    @property
    def tokens(self) -> int:
        return self.decodes * (1 + self.drafts) + self.prompt

    @property
    def sequences(self) -> int:
        return self.decodes + (self.prompt > 0)

    def __str__(self) -> str:
        parts = []
        if self.decodes:
            drafts = f" with {self.drafts} drafts" if self.drafts else ""
            parts.append(f"{self.decodes} x 1 token{drafts} behind {self.context}")
        if self.prompt:
            parts.append(f"{self.prompt} of a prompt from {self.start}")
        return " + ".join(parts)


def grid(max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int) -> list[Cell]:
    """What to measure, the most telling first; all of it within the limits."""
    far = min(LONG, max_model_len - 16)
    near = min(SHORT, far)
    half = max(near, far // 2)
    sizes = [size for size in (1, 2, 4, 8, 16, 32, 64, 3, 6, 12, 24, 48) if size <= max_num_seqs]
    chunks = [size for size in (16, 64, 256, 32, 128, 512, 2, 4, 8, 96, 192, 384) if size <= max_num_batched_tokens]
    while chunks[-1] < max_num_batched_tokens and max(chunks) * 2 <= max_num_batched_tokens:
        chunks.append(max(chunks) * 2)
    if max_num_batched_tokens not in chunks:
        chunks.append(max_num_batched_tokens)
    largest = max(chunks)
    cells = [
        *(Cell(size, near) for size in sizes[:6]),
        *(Cell(prompt=size) for size in chunks[:4]),
        *(Cell(size, context) for size, context in ((1, far), (4, far), (16, half))),
        *(Cell(1, near, drafts) for drafts in (1, 3, 7, 2, 5, 15)),
        *(Cell(prompt=size, start=half) for size in (64, largest // 2, largest)),
        *(Cell(size, near, prompt=chunk) for size, chunk in ((8, 64), (4, largest // 2), (16, largest - 16))),
        *(Cell(size, near, 3) for size in (4, 8, 16)),
        *(Cell(size, near) for size in sizes[6:]),
        *(Cell(prompt=size) for size in chunks[4:]),
        Cell(prompt=largest // 2, is_last=False),
        Cell(prompt=largest, start=near, is_last=False),
        Cell(8, half, 2),
    ]
    fits = [
        cell
        for cell in dict.fromkeys(cells)
        if cell.sequences <= max_num_seqs
        and 0 < cell.tokens <= max_num_batched_tokens
        and cell.start + cell.prompt <= max_model_len
        and cell.context + 1 + cell.drafts <= max_model_len
        and (cell.prompt > 0 or cell.decodes > 0)
    ]
    if not fits:
        raise ConfigError("the engine's limits leave no step to measure; raise --max-num-batched-tokens")
    return fits


class Grid:
    """The cells as plans for one runner, whose KV blocks belong to it while it measures."""

    def __init__(self, runner: Runner, cells: list[Cell], *, max_num_batched_tokens: int, seed: int = 0) -> None:
        self._runner, self._info = runner, runner.info
        self._random = random.Random(seed)
        self._budget = max_num_batched_tokens
        self.cells, lengths = _within(self._info, cells, max_num_batched_tokens)
        self._slots = list(_slots(self._info, lengths, max_num_batched_tokens))
        self._last = [self._random.randrange(self._info.vocab_size) for _ in self._slots]
        self._guessed: list[list[int]] = [[] for _ in self._slots]  # behind it, as the last step with drafts drew them
        self._fill(lengths)

    def execute(self, cell: Cell) -> StepResult:
        """One step of this shape. The tokens drawn are what the next one goes on with, as in a real decode."""
        entries = [
            self._entry(
                slot, cell.context, [self._last[slot], *self._tokens(cell.drafts)], 1 + cell.drafts, cell.drafts
            )
            for slot in range(cell.decodes)
        ]
        if cell.prompt:
            tokens = self._tokens(cell.prompt)
            entries.append(self._entry(len(self._slots) - 1, cell.start, tokens, int(cell.is_last), 0))
        result = self._runner.execute(StepPlan(entries))
        for slot, computed in enumerate(result.entries[: cell.decodes]):
            if computed.error is not None:
                raise computed.error
            drawn = [row.token_id for row in computed.rows]
            if cell.drafts:
                self._guessed[slot] = drawn[: cell.drafts]
            else:
                self._last[slot], self._guessed[slot] = drawn[0], []
        return result

    def plan_shape(self, cell: Cell) -> list[PlanEntry]:
        """The entries of a cell with no tokens that matter: for what depends on the shape alone."""
        row = LogitsRow(0, GREEDY)
        entries = [
            PlanEntry(slot, [0] * (1 + cell.drafts), cell.context, (), [row] * (1 + cell.drafts), cell.drafts)
            for slot in range(cell.decodes)
        ]
        if cell.prompt:
            entries.append(PlanEntry(-1, [0] * cell.prompt, cell.start, (), [row] * int(cell.is_last)))
        return entries

    def _tokens(self, count: int) -> list[int]:
        return [self._random.randrange(self._info.vocab_size) for _ in range(count)]

    def _entry(self, slot: int, start: int, tokens: list[int], num_rows: int, drafts: int) -> PlanEntry:
        rows = [LogitsRow(offset, GREEDY) for offset in range(len(tokens) - num_rows, len(tokens))]
        return PlanEntry(slot, tokens, start, self._tables(slot, start, len(tokens)), rows, drafts)

    def _tables(self, slot: int, start: int, count: int) -> tuple[list[int], ...]:
        size = self._info.block_size
        end = -(-(start + count) // size)
        tables = []
        for group, ring in zip(self._info.kv_groups, self._slots[slot], strict=True):
            first = 0 if group.window is None else max(0, start - group.window + 1) // size
            tables.append([-1] * first + [ring[index % len(ring)] for index in range(first, end)])
        return tuple(tables)

    def _fill(self, lengths: list[int]) -> None:
        """Compute one prompt, and copy its blocks into every sequence."""
        longest = lengths.index(max(lengths))
        size, position = self._info.block_size, 0
        while position < lengths[longest]:
            count = min(self._budget, lengths[longest] - position)
            entry = self._entry(longest, position, self._tokens(count), 0, 0)
            self._runner.execute(StepPlan([entry]))
            position += count
        for group in range(len(self._info.kv_groups)):
            source = self._slots[longest][group][: max(lengths[longest] // size, 1)]
            saves = [KVSave(group, block, b"", b"", b"") for block in source]
            payloads = [payload for payload in self._runner.execute(StepPlan((), saves)).saved if payload is not None]
            if not payloads:
                raise ConfigError("the KV cache gives no block out; raise --kv-cache-memory-bytes")
            for slot, rings in enumerate(self._slots):
                if slot != longest:
                    moves = [
                        KVRestore(slot, group, block, payloads[index % len(payloads)])
                        for index, block in enumerate(rings[group])
                    ]
                    self._runner.execute(StepPlan((), (), moves))


def _lengths(cells: list[Cell]) -> list[int]:
    """Tokens that each sequence of the grid must hold; the last one is the prompt's."""
    decoding = max(cell.decodes for cell in cells)
    lengths = [max(cell.context + 1 + cell.drafts for cell in cells if cell.decodes > slot) for slot in range(decoding)]
    return [*lengths, max((cell.start + cell.prompt for cell in cells if cell.prompt), default=1)]


def _within(info: RunnerInfo, cells: list[Cell], budget: int) -> tuple[list[Cell], list[int]]:
    """As many of the cells as the KV blocks allow: those that hold most tokens are left out first."""
    kept = list(cells)
    while kept:
        lengths = [_whole(length, info) for length in _lengths(kept)]
        rings = list(_ring_lengths(info, lengths, budget))
        used = [sum(ring[group] for ring in rings) for group in range(len(info.kv_groups))]
        share = _POOL_SHARE if len(kept) > 1 else 1.0
        if all(count <= group.num_blocks * share for count, group in zip(used, info.kv_groups, strict=True)):
            return kept, lengths
        kept.remove(max(kept, key=lambda cell: cell.decodes * cell.context + cell.start + cell.prompt))
    raise ConfigError("the KV cache is too small to measure a step; raise --kv-cache-memory-bytes")


def _whole(length: int, info: RunnerInfo) -> int:
    """In full blocks, as far as the context goes: only full ones can be copied."""
    size = info.block_size
    return max(length, min(-(-length // size), info.max_model_len // size) * size)


def _ring_lengths(info: RunnerInfo, lengths: list[int], budget: int) -> Iterator[list[int]]:
    size = info.block_size
    for length in lengths:
        whole = -(-length // size)
        yield [
            whole if group.window is None else min(whole, -(-(group.window + budget) // size) + 2)
            for group in info.kv_groups
        ]


def _slots(info: RunnerInfo, lengths: list[int], budget: int) -> Iterator[list[list[int]]]:
    """Block ids for each sequence and group; those of a window are used in turn."""
    next_block = [0] * len(info.kv_groups)
    for ring in _ring_lengths(info, lengths, budget):
        blocks = []
        for group, count in enumerate(ring):
            blocks.append(list(range(next_block[group], next_block[group] + count)))
            next_block[group] += count
        yield blocks
