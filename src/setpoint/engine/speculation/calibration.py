"""How far steps keep what the choice of drafts expected of them: drafted ones and plain ones, by size of batch.

Whoever takes the best of many noisy estimates takes, on average, one that is too high (the winner's curse); costs and
acceptances that are each nearly right still promise gains that do not come. So expectations are multiplied by what
earlier ones came to.
"""

from __future__ import annotations

from dataclasses import dataclass

_CLASSES = 12  # of batch sizes, by powers of two
_WEIGHT = 8.0  # steps that count as if they had come to just what was expected
_MEMORY = 0.98
_MOST, _LEAST = 1.0, 0.5  # a promise is never believed to be too low
_PLAIN_MOST, _PLAIN_LEAST = 1.25, 0.8
_OUTLIER = 2.0  # a single step counts at most as this much longer than expected


@dataclass(slots=True)
class _Sums:
    """Of ratios to what was expected, fading."""

    steps: float = _WEIGHT
    tokens: float = _WEIGHT
    seconds: float = _WEIGHT

    def add(self, tokens: float, seconds: float) -> None:
        self.steps = self.steps * _MEMORY + 1.0
        self.tokens = self.tokens * _MEMORY + tokens
        self.seconds = self.seconds * _MEMORY + min(seconds, _OUTLIER)


class Calibration:
    def __init__(self) -> None:
        self._drafted = [_Sums() for _ in range(_CLASSES)]
        self._plain = [_Sums() for _ in range(_CLASSES)]

    def drafted(self, num_decodes: int) -> float:
        """What a promised rate of tokens is worth, 1 at most."""
        sums = self._drafted[_class(num_decodes)]
        return min(max(sums.tokens / sums.seconds, _LEAST), _MOST)

    def plain(self, num_decodes: int) -> float:
        """Seconds of a step without drafts, over what was expected."""
        sums = self._plain[_class(num_decodes)]
        return min(max(sums.seconds / sums.steps, _PLAIN_LEAST), _PLAIN_MOST)

    def learn_drafted(self, num_decodes: int, tokens: float, seconds: float) -> None:
        """A step with drafts made so many times the tokens expected, in so many times the time."""
        self._drafted[_class(num_decodes)].add(tokens, seconds)

    def learn_plain(self, num_decodes: int, seconds: float) -> None:
        """A step without drafts took so many times the time expected, which `plain` is part of."""
        sums = self._plain[_class(num_decodes)]
        sums.add(1.0, seconds * sums.seconds / sums.steps)


def _class(num_decodes: int) -> int:
    return min(num_decodes.bit_length(), _CLASSES) - 1
