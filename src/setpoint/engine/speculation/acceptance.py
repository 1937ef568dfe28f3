"""How likely a draft's tokens are right, learned from what came out: the survival S_k of each position.

A free drafter is judged on every guess, whether it was verified or not: the tokens that the sequence goes on with are
compared with the guess. What is learned for a strength of match and a position is shared by all sequences; a sequence
that has shown more or less than that moves its own figure.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from setpoint.engine.sequence import Sequence
from setpoint.engine.speculation.drafter import MAX_DRAFTS, Draft

_PRIOR = (0.15, 0.3, 0.5, 0.7, 0.8, 0.85)  # that the next token is right, by class of strength; before anything is seen
_PRIOR_WEIGHT = 4.0
_SHARED_WEIGHT = 6.0  # of what all sequences showed, against the tokens of one
_SHARED_MEMORY, _OWN_MEMORY = 0.998, 0.96  # an older token counts that much less than the next one


def strength_class(strength: int) -> int:
    """1, 2-3, 4-7, 8-15, 16-31, 32 and more."""
    return min(max(strength, 1).bit_length(), len(_PRIOR)) - 1


@dataclass(slots=True)
class _Tally:
    """Tokens guessed and guessed right, fading."""

    tried: float
    right: float

    def add(self, right: bool, memory: float) -> None:
        self.tried = self.tried * memory + 1.0
        self.right = self.right * memory + right


@dataclass(slots=True)
class Guess:
    """A draft that time will judge: its tokens belong from position `at` on."""

    token_ids: list[int]
    at: int
    strength: int  # class
    num_judged: int = 0


@dataclass(slots=True)
class Record:
    """What one drafter showed on one sequence."""

    tallies: list[_Tally] = field(default_factory=lambda: [_Tally(0.0, 0.0) for _ in _PRIOR])
    open: Guess | None = None


class Acceptance:
    """Of one drafter."""

    def __init__(self) -> None:
        self._shared = [[_Tally(_PRIOR_WEIGHT, _PRIOR_WEIGHT * prior) for _ in range(MAX_DRAFTS)] for prior in _PRIOR]

    def watch(self, record: Record, seq: Sequence, draft: Draft) -> None:
        """Judge this draft by the tokens that follow, unless an older one still is being judged."""
        if record.open is None:
            record.open = Guess(draft.token_ids, seq.num_tokens, strength_class(draft.strength))

    def judge(self, record: Record, seq: Sequence) -> None:
        """Compare the open guess with the tokens that have come since."""
        guess = record.open
        if guess is None:
            return
        shared, own = self._shared[guess.strength], record.tallies[guess.strength]
        known = seq.token_ids[guess.at + guess.num_judged : guess.at + len(guess.token_ids)]
        for actual in known:
            right = actual == guess.token_ids[guess.num_judged]
            shared[guess.num_judged].add(right, _SHARED_MEMORY)
            own.add(right, _OWN_MEMORY)
            guess.num_judged += 1
            if not right:
                record.open = None
                return
        if guess.num_judged == len(guess.token_ids):
            record.open = None

    def survival(self, record: Record, draft: Draft, least: float = 0.0) -> list[float]:
        """For each token of the draft, the probability that it and all before it are right.

        It ends where that falls below `least`, after the first token at the earliest.
        """
        strength = strength_class(draft.strength)
        shared, own = self._shared[strength], record.tallies[strength]
        weight = own.tried + _SHARED_WEIGHT
        alive = 1.0
        survival: list[float] = []
        for position in range(len(draft.token_ids)):
            tally = shared[position]
            alive *= (own.right + _SHARED_WEIGHT * tally.right / tally.tried) / weight
            if alive < least and survival:
                break
            survival.append(alive)
        return survival
