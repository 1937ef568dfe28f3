"""What a step of so many tokens costs on this machine just now: t(M), learned from the steps themselves.

Kept as a shape (how much longer a step of M tokens is than one of one token) and a level (how long that one is now):
the level follows the machine and the context within some ten steps, the shape is a property of kernels and model and
moves slowly. Between measured sizes it is interpolated; beyond them a row costs what a pessimist would expect.
"""

from __future__ import annotations

from bisect import bisect_left, insort

_SIZES: tuple[int, ...] = (
    *range(1, 17),
    20,
    24,
    28,
    32,
    40,
    48,
    56,
    64,
    80,
    96,
    128,
    160,
    192,
    256,
    320,
    384,
    512,
    768,
    1024,
)
_FAR = 4  # times as many tokens
_SIZES_ABOVE = 8  # so many larger sizes are compared with
_UNKNOWN_ROW = 0.12  # a further row, as a share of a step of one row: measured 0.05 to 0.14 on CPUs
_LEVEL_STEP, _SHAPE_STEP = 0.15, 0.06
_OUTLIER = 2.0  # a step that took longer than this against the prediction counts as this
_FIRST = 3  # of so many first measurements of a size the least counts: too high a cost would never be measured again
_FIRST_SURPRISE = 1.5  # by how much the first one may exceed what was expected


class VerifyCost:
    """Seconds; all sizes in tokens, of all sequences together."""

    def __init__(self) -> None:
        self._level: float | None = None
        self._known: list[int] = []  # sizes that were measured, in order
        self._shape: dict[int, float] = {}
        self._counts: dict[int, int] = {}

    @property
    def is_known(self) -> bool:
        return self._level is not None

    def learn(self, num_tokens: int, seconds: float) -> None:
        """A step without surprises took so long."""
        if seconds <= 0.0 or num_tokens < 1:
            return
        size = _size(num_tokens)
        if self._level is None:
            self._level = seconds / (1.0 + _UNKNOWN_ROW * (size - 1))
        ratio = seconds / self.seconds(num_tokens)
        count = self._counts[size] = self._counts.get(size, 0) + 1
        if count == 1:
            self._shape[size] = self._shape_at(size) * min(ratio, _FIRST_SURPRISE)
            insort(self._known, size)
        elif count <= _FIRST:
            self._shape[size] *= min(ratio, 1.0)
        else:
            surprise = min(ratio, _OUTLIER) - 1.0
            self._level *= 1.0 + _LEVEL_STEP * surprise
            self._shape[size] *= 1.0 + max(_SHAPE_STEP, 1.0 / count) * surprise

    def seconds(self, num_tokens: int) -> float:
        assert self._level is not None
        return self._level * self._shape_at(num_tokens)

    def _shape_at(self, num_tokens: int) -> float:
        """Never falls with the number of tokens: a size that seems dearer than a larger one was disturbed."""
        known, shape = self._known, self._shape
        at = bisect_left(known, num_tokens)
        above = min((shape[size] for size in known[at : at + _SIZES_ABOVE]), default=0.0)
        if at < len(known) and known[at] == num_tokens:
            return above
        if not known:
            return 1.0 + _UNKNOWN_ROW * (num_tokens - 1)
        if at == 0:
            return max(above - self._unknown_row() * (known[0] - num_tokens), above * num_tokens / known[0])
        left = known[at - 1]
        beyond = shape[left] + self._unknown_row(left) * (num_tokens - left)
        if at == len(known):
            return beyond
        if known[at] > _FAR * left:  # prompts tell little of small steps
            return min(beyond, above)
        below = min(shape[left], above)
        return below + (num_tokens - left) / (known[at] - left) * (above - below)

    def _unknown_row(self, size: int = 1) -> float:
        """What a row more is expected to add to a step of `size`: as rows did up to there, or a share of one row."""
        first = self._known[0]
        one_row = self._shape[first] / (1.0 + _UNKNOWN_ROW * (first - 1))
        so_far = (self._shape[size] - self._shape[first]) / (size - first) if size > first else 0.0
        return max(_UNKNOWN_ROW * one_row, so_far)


def _size(num_tokens: int) -> int:
    """The measured size that stands for this number."""
    return _SIZES[min(bisect_left(_SIZES, num_tokens), len(_SIZES) - 1)]
