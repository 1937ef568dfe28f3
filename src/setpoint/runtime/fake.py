"""Runners without a model: `FakeRunner` for tests, `CostModelRunner` for simulation on a virtual clock.

`FakeRunner` is an oracle of the scheduler. Its KV cache is real in everything but the numbers: tokens are stored by
block id and slot, and what it generates is a hash of the whole context read back through the block tables. A wrong
table, a block freed too early or a stale prefix hit therefore changes the output, or raises `KVError` at once.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from setpoint.engine.plan import (
    EntryResult,
    KVGroup,
    LogitsRow,
    PlanEntry,
    RowResult,
    RowSampling,
    RunnerInfo,
    StepPlan,
    StepResult,
)

Ints = npt.NDArray[np.int64]
POISON = -1  # in a slot that was never written, or was wiped by `poison`


class KVError(AssertionError):
    """A plan that a correct scheduler never makes."""


def fake_info(
    *,
    vocab_size: int = 256,
    max_model_len: int = 4096,
    num_blocks: int = 512,
    block_size: int = 16,
    windows: Sequence[int | None] = (None,),
) -> RunnerInfo:
    groups = tuple(KVGroup(num_blocks, window, 3 * 8 * block_size) for window in windows)
    return RunnerInfo(vocab_size, max_model_len, groups, block_size)


def hash_ints(*parts: bytes | int) -> int:
    """64 bits that depend on every part and on their order; equal on every machine."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        packed = part if isinstance(part, bytes) else (part % (1 << 64)).to_bytes(8, "little")
        digest.update(len(packed).to_bytes(4, "little") + packed)
    return int.from_bytes(digest.digest(), "little")


class FakeRunner:
    """Deterministic and batch invariant. `next_token(context)` replaces the hash with a script for other tests: it
    gets the token ids that the drawn token may depend on, and returns the token that greedy sampling would take.

    `step_s` makes every step last that long.
    """

    def __init__(
        self,
        info: RunnerInfo | None = None,
        next_token: Callable[[list[int]], int] | None = None,
        *,
        step_s: float = 0.0,
    ) -> None:
        self.info = info or fake_info()
        self.num_steps = 0
        self.closed = False
        self._next_token = next_token
        self._step_s = step_s
        shapes = [(group.num_blocks, self.info.block_size) for group in self.info.kv_groups]
        self._tokens: list[Ints] = [np.full(shape, POISON, np.int64) for shape in shapes]
        self._positions: list[Ints] = [np.full(shape, POISON, np.int64) for shape in shapes]
        self._marks: list[Ints] = [np.full(shape, POISON, np.int64) for shape in shapes]  # a hash of all before

    def execute(self, plan: StepPlan) -> StepResult:
        if self.closed:
            raise KVError("execute after close")
        self.num_steps += 1
        if self._step_s:
            time.sleep(self._step_s)
        saved = [self._read(save.group, save.block) for save in plan.saves]
        for restore in plan.restores:
            self._restore(restore.group, restore.block, restore.payload)
        self._check_writes(plan)
        _compute_masks(plan)
        return StepResult(tuple(EntryResult(self._execute_entry(entry)) for entry in plan.entries), saved)

    def close(self) -> None:
        self.closed = True

    def poison(self, group: int, block: int) -> None:
        """Wipe a block, as a debug build does with freed ones."""
        self._tokens[group][block] = self._positions[group][block] = self._marks[group][block] = POISON

    def _read(self, group: int, block: int) -> bytes:
        """Everything that the oracle keeps of a block: restored elsewhere, it is as if it had been computed there."""
        if (self._positions[group][block] == POISON).any():
            raise KVError("a block is saved that is not full")
        return b"".join(array[group][block].tobytes() for array in (self._tokens, self._positions, self._marks))

    def _restore(self, group: int, block: int, payload: bytes) -> None:
        if len(payload) != self.info.kv_groups[group].block_bytes:
            raise KVError("a block of another size is restored")
        parts = np.frombuffer(payload, np.int64).reshape(3, self.info.block_size)
        for array, part in zip((self._tokens, self._positions, self._marks), parts, strict=True):
            array[group][block] = part

    def _check_writes(self, plan: StepPlan) -> None:
        """No block that one entry writes is read by another."""
        size = self.info.block_size
        for group in range(len(self.info.kv_groups)):
            readers: dict[int, int] = {}
            for number, entry in enumerate(plan.entries):
                for block in entry.block_tables[group]:
                    if block >= 0 and readers.setdefault(block, number) != number:
                        readers[block] = -1  # shared
            for entry in plan.entries:
                end = entry.start + len(entry.token_ids)
                written = entry.block_tables[group][entry.start // size : (end - 1) // size + 1]
                if any(readers.get(block) == -1 for block in written):
                    raise KVError("an entry writes to a shared block")

    def _execute_entry(self, entry: PlanEntry) -> tuple[RowResult, ...]:
        if not entry.token_ids:
            raise KVError("an entry without tokens")
        if len(entry.block_tables) != len(self.info.kv_groups):
            raise KVError("a block table per KV group is needed")
        if any(not 0 <= token < self.info.vocab_size for token in entry.token_ids):
            raise KVError("a token id outside the vocabulary")
        for offset, token in enumerate(entry.token_ids):
            self._write(entry, entry.start + offset, token)
        offsets = [row.offset for row in entry.rows]
        if offsets != sorted(set(offsets)) or any(not 0 <= offset < len(entry.token_ids) for offset in offsets):
            raise KVError("row offsets must ascend and lie within the entry")
        return tuple(self._row(entry, row) for row in entry.rows)

    def _write(self, entry: PlanEntry, position: int, token: int) -> None:
        if position >= self.info.max_model_len:
            raise KVError("a position beyond the context")
        mark = hash_ints(token, position)
        if position > 0:
            mark = hash_ints(token, position, *(self._mark_before(entry, group, position) for group in self._groups))
        for group in self._groups:
            block, slot = self._slot(entry, group, position)
            self._tokens[group][block, slot] = token
            self._positions[group][block, slot] = position
            self._marks[group][block, slot] = mark >> 1

    @property
    def _groups(self) -> range:
        return range(len(self.info.kv_groups))

    def _mark_before(self, entry: PlanEntry, group: int, position: int) -> int:
        if self.info.kv_groups[group].window == 1:
            return 0
        block, slot = self._slot(entry, group, position - 1)
        if self._positions[group][block, slot] != position - 1:
            raise KVError("the KV of the previous position is missing")
        return int(self._marks[group][block, slot])

    def _slot(self, entry: PlanEntry, group: int, position: int) -> tuple[int, int]:
        index, slot = divmod(position, self.info.block_size)
        table = entry.block_tables[group]
        if index >= len(table) or not 0 <= table[index] < self.info.kv_groups[group].num_blocks:
            raise KVError("a position within the window has no block")
        return table[index], slot

    def _visible(self, entry: PlanEntry, group: int, position: int) -> tuple[Ints, Ints]:
        """Tokens and marks that a query at `position` sees, itself included, read through the block table."""
        window = self.info.kv_groups[group].window
        size = self.info.block_size
        first = 0 if window is None else max(0, position - window + 1)
        blocks = np.asarray(entry.block_tables[group][first // size : position // size + 1], np.int64)
        if len(blocks) != position // size + 1 - first // size or blocks.min() < 0:
            raise KVError("a position within the window has no block")
        if blocks.max() >= self.info.kv_groups[group].num_blocks:
            raise KVError("a block id outside the pool")
        seen = slice(first % size, first % size + position - first + 1)
        if not np.array_equal(self._positions[group][blocks].reshape(-1)[seen], np.arange(first, position + 1)):
            raise KVError("a slot holds another position than the block table says, or was never written")
        return self._tokens[group][blocks].reshape(-1)[seen], self._marks[group][blocks].reshape(-1)[seen]

    def _row(self, entry: PlanEntry, row: LogitsRow) -> RowResult:
        position = entry.start + row.offset
        views = [self._visible(entry, group, position) for group in self._groups]
        state = hash_ints(*(array.tobytes() for view in views for array in view))
        if row.target is not None:
            token = row.target
        elif self._next_token is not None:
            context = max((view[0] for view in views), key=len)
            token = _permitted(self._next_token(context.tolist()), row.sampling, self.info.vocab_size)
        else:
            token = _draw(state, row.sampling, self.info.vocab_size)
        return _scored(token, state, row.num_logprobs, self.info.vocab_size)


def _compute_masks(plan: StepPlan) -> None:
    """Late masks are computed as the real runner does it: in another thread, before anything is drawn."""
    late = [entry.late_masks for entry in plan.entries if entry.late_masks is not None]

    def compute() -> None:
        for masks in late:
            masks.compute()

    if late:
        thread = threading.Thread(target=compute)
        thread.start()
        thread.join()


def _draw(state: int, sampling: RowSampling | None, vocab_size: int) -> int:
    """A token from a hash of everything that may influence it: the context and what the row says."""
    if sampling is None:
        raise KVError("a row needs sampling or a target")
    parts: list[bytes | int] = [state]
    if sampling.temperature > 0:
        parts += [sampling.seed, sampling.position]
        parts.append(repr((sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)).encode())
    penalties = (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty)
    if penalties != (1.0, 0.0, 0.0):
        counts = sorted(zip(sampling.penalty_ids, sampling.penalty_counts, strict=True))
        parts.append(repr((penalties, counts)).encode())
    forced = [token for token, bias in zip(sampling.bias_ids, sampling.bias_values, strict=True) if bias >= 100]
    return _permitted(min(forced) if forced else hash_ints(*parts) % vocab_size, sampling, vocab_size)


def _permitted(token: int, sampling: RowSampling | None, vocab_size: int) -> int:
    """The first token from `token` on, cyclically, that the row permits."""
    if sampling is None:
        return token
    banned = set(sampling.banned_ids)
    allowed = None if sampling.allowed_ids is None else set(sampling.allowed_ids)
    mask = sampling.mask
    if mask is not None and len(mask) != -(-vocab_size // 32) * 4:
        raise KVError("a mask of another vocabulary")
    for step in range(vocab_size):
        candidate = (token + step) % vocab_size
        if mask is not None and not mask[candidate >> 3] >> (candidate & 7) & 1:
            continue
        if candidate not in banned and (allowed is None or candidate in allowed):
            return candidate
    raise KVError("a row permits no token")


def _scored(token: int, state: int, num_logprobs: int | None, vocab_size: int) -> RowResult:
    if num_logprobs is None:
        return RowResult(token)
    top_ids = tuple((token + step) % vocab_size for step in range(min(num_logprobs, vocab_size)))
    logprob = -1.0 - (state % 1024) / 1024
    return RowResult(token, logprob, 1, top_ids, tuple(logprob - step for step in range(len(top_ids))))


@dataclass(slots=True)
class VirtualClock:
    """Seconds that pass only when told to."""

    seconds: float = 0.0

    def __call__(self) -> float:
        return self.seconds

    def advance(self, seconds: float) -> None:
        self.seconds += seconds

    def advance_to(self, seconds: float) -> None:
        self.seconds = max(self.seconds, seconds)


class PlanCost(Protocol):
    """How long a plan takes."""

    def seconds(self, plan: StepPlan) -> float: ...


@dataclass(frozen=True, slots=True)
class LinearCost:
    """Seconds of a step, linear in what it computes: the simplest machine for a test."""

    base_s: float = 1e-3
    per_sequence_s: float = 0.0
    per_token_s: float = 1e-4
    per_context_token_s: float = 0.0  # for every position that a sequence's last query attends to

    def seconds(self, plan: StepPlan) -> float:
        context = sum(entry.start + len(entry.token_ids) for entry in plan.entries)
        return (
            self.base_s
            + self.per_sequence_s * len(plan.entries)
            + self.per_token_s * plan.num_tokens
            + self.per_context_token_s * context
        )


class CostModelRunner:
    """Costs time on a virtual clock and computes nothing. Tokens are a function of their position alone, so lengths
    must come from `max_tokens` with `ignore_eos`, and whoever guesses knows what is right (`token_at`)."""

    def __init__(self, info: RunnerInfo, clock: VirtualClock, cost: PlanCost | None = None) -> None:
        self.info = info
        self._clock = clock
        self._cost = LinearCost() if cost is None else cost
        # Nobody changes a result, and a simulated step should cost little: one object a token serves them all.
        self._rows = [RowResult(token) for token in range(min(info.vocab_size, 4096))]
        self._entries = [EntryResult((row,)) for row in self._rows]

    def token_at(self, position: int) -> int:
        """The token that every sequence has at this position of its output."""
        return (position - 1) % len(self._rows)

    def execute(self, plan: StepPlan) -> StepResult:
        self._clock.advance(self._cost.seconds(plan))
        return StepResult([self._entry(entry) for entry in plan.entries], [None] * len(plan.saves))

    def _entry(self, entry: PlanEntry) -> EntryResult:
        rows = entry.rows
        if not rows:
            return _NO_ROWS
        if len(rows) == 1 and rows[0].target is None and rows[0].num_logprobs is None:
            return self._entries[(entry.start + rows[0].offset) % len(self._rows)]
        return EntryResult([self._row(entry.start + row.offset, row) for row in rows])

    def _row(self, position: int, row: LogitsRow) -> RowResult:
        if row.target is None and row.num_logprobs is None:
            return self._rows[position % len(self._rows)]
        token = position % len(self._rows) if row.target is None else row.target
        return _scored(token, 0, row.num_logprobs, self.info.vocab_size)

    def close(self) -> None:
        pass


_NO_ROWS = EntryResult()
