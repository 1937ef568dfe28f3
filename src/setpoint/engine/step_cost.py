"""What a step costs: seconds as a function of its plan, with coefficients that measured steps gave.

    host + host_per_entry * entries                     planning, results, delivery
    + body(tokens) + head(rows)                         weights read once, arithmetic that grows with tokens
    + per_context * context + per_pair * pairs          attention: KV read, and queries times keys

`body` and `head` are piecewise linear and never fall. That is the smooth maximum of a memory and an arithmetic term in
whatever shape this machine gives it, tile steps included. `context` counts the positions that an entry reads, `pairs`
those that its tokens attend to, so one token of decoding, a chunk of a prompt and a chain of drafts are the same thing.
Form after slo-loop section 5; the pure-token part alone is what `speculation/verify_cost.py` learns while it runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from setpoint.engine.plan import KVGroup, PlanEntry

MAX_TABLE = 1 << 16  # sizes that are looked up; what is larger is computed


@dataclass(frozen=True, slots=True)
class StepShape:
    """What of a plan its time depends on."""

    entries: int
    tokens: int
    rows: int  # of logits
    context: float  # positions read, over all entries; a layer with a window counts as its share of the KV bytes
    pairs: float  # (query, key) pairs, in the same way


class ShapeOf:
    """Reads shapes off plans, for one division of the layers into KV groups."""

    def __init__(self, groups: Sequence[KVGroup]) -> None:
        total = sum(group.block_bytes for group in groups) or len(groups)
        shares = [(group.block_bytes or 1) / total for group in groups]
        self._full = sum(share for group, share in zip(groups, shares, strict=True) if group.window is None)
        self._windows = [(g.window, share) for g, share in zip(groups, shares, strict=True) if g.window is not None]

    def __call__(self, entries: Sequence[PlanEntry]) -> StepShape:
        tokens = rows = context = pairs = 0
        for entry in entries:
            count, start = len(entry.token_ids), entry.start
            tokens += count
            rows += len(entry.rows)
            context += start + count
            pairs += count * start + count * (count + 1) // 2
        if not self._windows:
            return StepShape(len(entries), tokens, rows, context, pairs)
        spans = [(entry.start, len(entry.token_ids)) for entry in entries]
        weighted_context, weighted_pairs = self._full * context, self._full * pairs
        for window, share in self._windows:
            weighted_context += share * sum(min(start + count, window + count - 1) for start, count in spans)
            weighted_pairs += share * sum(_windowed_pairs(start, count, window) for start, count in spans)
        return StepShape(len(entries), tokens, rows, weighted_context, weighted_pairs)


def _windowed_pairs(start: int, count: int, window: int) -> int:
    """Pairs of `count` queries from position `start` on, each of which sees `window` positions at most."""
    whole = min(max(window - start, 0), count)  # queries that still see everything
    return whole * start + whole * (whole + 1) // 2 + (count - whole) * window


@dataclass(frozen=True)
class Rising:
    """A piecewise linear function of a count that never falls: `seconds[i]` at `sizes[i]`, both ascending."""

    sizes: tuple[int, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.sizes or len(self.sizes) != len(self.seconds) or self.sizes[0] < 0:
            raise ValueError("a size and its seconds must stand for each other")
        if list(self.sizes) != sorted(set(self.sizes)) or list(self.seconds) != sorted(self.seconds):
            raise ValueError("sizes must ascend, and seconds may not fall")

    def __call__(self, count: int) -> float:
        table = self._table
        return table[count] if count < len(table) else table[-1] + (count - len(table) + 1) * self._slope

    @cached_property
    def _table(self) -> list[float]:
        """From 0 to the largest size: below the first one it is flat."""
        import numpy as np

        end = min(self.sizes[-1], MAX_TABLE) + 1
        values: list[float] = np.interp(np.arange(end), self.sizes, self.seconds).tolist()
        return values

    @cached_property
    def _slope(self) -> float:
        """Beyond the largest size: as steep as the last part, and at least as the upper half on average."""
        last, middle = len(self.sizes) - 1, len(self.sizes) // 2

        def rise(low: int) -> float:
            return (self.seconds[last] - self.seconds[low]) / (self.sizes[last] - self.sizes[low]) if low < last else 0

        return max(rise(last - 1), rise(min(middle, last - 1))) if last > 0 else 0.0


@dataclass(frozen=True)
class StepCost:
    """Seconds of steps. Rises with every argument."""

    body: Rising  # by tokens
    head: Rising  # by rows of logits
    per_entry_s: float
    per_context_s: float
    per_pair_s: float
    host_s: float = 0.0
    host_per_entry_s: float = 0.0

    def __post_init__(self) -> None:
        numbers = (self.per_entry_s, self.per_context_s, self.per_pair_s, self.host_s, self.host_per_entry_s)
        if min(*numbers, self.body.seconds[0], self.head.seconds[0]) < 0:
            raise ValueError("a coefficient is negative")

    def seconds(self, shape: StepShape) -> float:
        """Of a whole step, from one plan to the next."""
        return self.runner_seconds(shape) + self.host_s + self.host_per_entry_s * shape.entries

    def runner_seconds(self, shape: StepShape) -> float:
        """Of `Runner.execute` alone."""
        return (
            self.body(shape.tokens)
            + self.head(shape.rows)
            + self.per_entry_s * shape.entries
            + self.per_context_s * shape.context
            + self.per_pair_s * shape.pairs
        )

    def parts(self, shape: StepShape) -> dict[str, float]:
        """Seconds by what takes them: they add up to `seconds`."""
        one = self.body(min(shape.tokens, 1)) + self.head(min(shape.rows, 1))
        attention = self.per_context_s * shape.context + self.per_pair_s * shape.pairs
        host = self.host_s + self.host_per_entry_s * shape.entries
        return {
            "weights": one,  # one pass over them, whatever the number of tokens
            "arithmetic": self.body(shape.tokens) + self.head(shape.rows) - one + self.per_entry_s * shape.entries,
            "attention": attention,
            "host": host,
        }


PARTS = ("weights", "arithmetic", "attention", "host")

_CELL_WEIGHT = 0.1  # of a new reading
_TRUST = 8.0  # readings of a cell that weigh as much as the level of all cells
_MOST = 4.0  # a reading further off than this many times counts as this


class Residuals:
    """How far measured steps lie from the model now: factors by cell of (rows, prompt tokens), moving averages.

    The level of all cells says how the machine drifts; a cell says where the model's form is wrong.
    """

    def __init__(self) -> None:
        self.level = 1.0
        self._cells: dict[tuple[int, int], tuple[float, int]] = {}

    def observe(self, shape: StepShape, predicted_s: float, measured_s: float) -> None:
        if predicted_s <= 0.0 or measured_s <= 0.0:
            return
        ratio = min(max(measured_s / predicted_s, 1.0 / _MOST), _MOST)
        cell = _cell(shape)
        value, count = self._cells.get(cell, (self.level, 0))
        self._cells[cell] = (value + max(_CELL_WEIGHT, 1.0 / (count + 1)) * (ratio - value), count + 1)
        self.level += _CELL_WEIGHT * (ratio - self.level)

    def factor(self, shape: StepShape) -> float:
        """What to multiply a prediction with."""
        value, count = self._cells.get(_cell(shape), (self.level, 0))
        return (count * value + _TRUST * self.level) / (count + _TRUST)


def _cell(shape: StepShape) -> tuple[int, int]:
    return shape.rows.bit_length(), max(shape.tokens - shape.rows, 0).bit_length()


def total(shapes: Iterable[StepShape], cost: StepCost) -> dict[str, float]:
    """Seconds of many steps by what took them."""
    sums = dict.fromkeys(PARTS, 0.0)
    for shape in shapes:
        for name, seconds in cost.parts(shape).items():
            sums[name] += seconds
    return sums
