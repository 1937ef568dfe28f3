"""What the engine asks of a grammar, and nothing of how it is made.

A `Grammar` is compiled once and shared; each sequence walks a `Constraint` of its own, token by token. Tokens stand
for text here, or for the end of the output: `stop_ids` that have no text are ends, allowed where the text so far is
complete. A constraint that reaches one of its limits raises RequestError (`compile_limit`), and that ends its request.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol


class Constraint(Protocol):
    """Where one sequence stands in its grammar. For one thread; what it says depends on the tokens taken alone."""

    @property
    def is_finished(self) -> bool:
        """The text is complete, and no more text may follow."""
        ...

    def mask(self) -> bytes:
        """Bit i of byte i // 8 is set where token i may come next; as long as ceil(vocabulary / 32) words of 4 bytes.

        Never empty: raises RequestError where nothing can follow. Not to be asked for when finished.
        """
        ...

    def forced(self) -> int | None:
        """The only token of `mask()`, where that is known without it."""
        ...

    def count_allowed(self, tokens: Sequence[int]) -> int:
        """How many of these may follow one after the other; text only. Changes nothing."""
        ...

    def advance(self, token: int) -> None:
        """Take a token. Raises OutputViolationError when it is not allowed here."""
        ...

    def rollback(self, num_tokens: int) -> None:
        """Take back the last text tokens."""
        ...


class Grammar(Protocol):
    def start(self, stop_ids: Collection[int]) -> Constraint:
        """A constraint at its beginning; of `stop_ids`, those that stand for no text may end a complete output."""
        ...


def admissible(constraint: Constraint, drafts: Sequence[int]) -> int:
    """How many of the drafts can be verified: allowed, and each followed by a row that may draw something."""
    count = constraint.count_allowed(drafts)
    for token in drafts[:count]:
        constraint.advance(token)
    while count and constraint.is_finished:
        constraint.rollback(1)
        count -= 1
    constraint.rollback(count)
    return count
