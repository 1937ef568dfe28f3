"""Whoever guesses tokens, as the scheduler asks: it may fail, and fails alone."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from setpoint.engine.sequence import Sequence
from setpoint.engine.stats import SpeculationCounters

log = logging.getLogger(__name__)


class DraftPlanner(Protocol):
    """Guesses the tokens that follow. What it does changes the speed, never the output."""

    counters: SpeculationCounters

    def draft(self, decodes: list[Sequence], num_prefill: int, room: int, max_drafts: int) -> None:
        """Set the `drafts` of running sequences of which one token is missing: `room` tokens at most, all together.

        At most `max_drafts` each, and none that the sequence has no place for. About `num_prefill` more tokens will be
        in the step.
        """
        ...

    def verified(self, seq: Sequence, num_drafts: int, num_accepted: int) -> None:
        """What became of the drafts of a sequence."""
        ...

    def learn(self, num_tokens: int, num_prefill: int, seconds: float) -> None:
        """A step of so many tokens, of which `num_prefill` belong to prompts, took so long."""
        ...

    def finished(self, seq: Sequence) -> None:
        """A sequence came to its own end."""
        ...

    def close(self) -> None: ...


class Drafting:
    """A planner of drafts, or none. After its first failure nobody guesses any more."""

    def __init__(self, planner: DraftPlanner | None) -> None:
        self._planner = self._opened = planner

    @property
    def is_on(self) -> bool:
        return self._planner is not None

    def draft(self, decodes: list[Sequence], num_prefill: int, room: int, max_drafts: int) -> None:
        if self._planner is not None:
            self._tell(self._planner.draft, decodes, num_prefill, room, max_drafts)
        if self._planner is None:
            for seq in decodes:  # what it left half done
                seq.drafts = []

    def verified(self, seq: Sequence, num_drafts: int, num_accepted: int) -> None:
        if self._planner is not None:
            self._tell(self._planner.verified, seq, num_drafts, num_accepted)

    def learn(self, num_tokens: int, num_prefill: int, seconds: float) -> None:
        if self._planner is not None:
            self._tell(self._planner.learn, num_tokens, num_prefill, seconds)

    def finished(self, seq: Sequence) -> None:
        if self._planner is not None:
            self._tell(self._planner.finished, seq)

    def close(self) -> None:
        if self._opened is not None:
            self._opened.close()

    def _tell(self, tell: Callable[..., None], *arguments: object) -> None:
        try:
            tell(*arguments)
        except Exception as error:
            log.error("speculation failed (%s) and is off from now on", type(error).__name__)
            self._planner = None
