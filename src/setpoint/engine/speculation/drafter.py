"""What guesses the tokens that follow a sequence, and what a guess is."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass
from typing import Protocol

from setpoint.config import MAX_SPECULATIVE_TOKENS
from setpoint.engine.sequence import Sequence

MAX_DRAFTS = MAX_SPECULATIVE_TOKENS  # of a sequence in a step


@dataclass(slots=True)
class Draft:
    """`strength` is how much it rests on: for lookups, how many tokens before it equal those before its source."""

    token_ids: list[int]
    strength: int


class Drafter(Protocol):
    """What it proposes changes the speed, never the output. What it knows of a sequence lies in `seq.draft_states`."""

    name: str

    def propose(self, seqs: abc.Sequence[Sequence], max_drafts: int) -> list[Draft | None]:
        """A draft of 1 to `max_drafts` tokens for each sequence, or None where it has no guess."""
        ...

    def finished(self, seq: Sequence) -> None:
        """The sequence came to its own end; its output may help others of the same tenant."""
        ...
