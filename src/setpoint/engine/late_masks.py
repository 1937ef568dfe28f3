"""Masks that are computed while the model runs: a row's depends on tokens alone that are known before the step.

From the plan's making to the end of its execution the constraint belongs to whoever computes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from setpoint.engine.constraint import Constraint
from setpoint.engine.plan import RowSampling
from setpoint.errors import RequestError


class LateMasks:
    """Of the rows of one entry that draw: one after the known tokens, and one after each of `drafts`.

    `mask_of(banned_ids)` says what may come where the constraint stands.
    """

    def __init__(
        self,
        constraint: Constraint,
        mask_of: Callable[[Sequence[int]], bytes],
        rows: Sequence[RowSampling],
        drafts: Sequence[int],
    ) -> None:
        self._constraint = constraint
        self._mask_of = mask_of
        self._drafts = drafts
        self.rows = rows
        self.num_usable = len(rows)  # the others come after a draft that nothing could follow: their results are void
        self.is_done = False
        self.error: Exception | None = None  # why there are none; it concerns this entry only

    def compute(self) -> None:
        """Set the rows' masks, once. Raises nothing."""
        if self.is_done:
            return
        num_taken = number = 0
        try:
            for number, row in enumerate(self.rows):
                if number > 0:
                    self._constraint.advance(self._drafts[number - 1])
                    num_taken += 1
                row.mask = self._mask_of(row.banned_ids)
        except RequestError as error:
            if number == 0:
                self.error = error
            else:  # it concerns a text that may never be
                self.num_usable = number
        except Exception as error:
            self.error = error
        try:
            self._constraint.rollback(num_taken)
        except Exception as error:
            self.error = error
        self.is_done = True

    def give_up(self, error: Exception) -> None:
        """Nobody will use them: they took too long, or do not fit the model."""
        self.error = error
        self.is_done = True
