"""A text that grows at its end and knows where its end, or the end of another text, occurred before.

What the drafts from suffixes are made of, written down plainly. `setpoint._native` has the same two classes, fifteen
times as fast, so that text nobody repeats costs little to look through; `assemble.py` passes them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from setpoint.engine.speculation.suffix_automaton import Follower, SuffixAutomaton


class Text(Protocol):
    @property
    def matched(self) -> int:
        """Tokens of its end that occurred before."""
        ...

    @property
    def source(self) -> int:
        """Where the tokens stand that followed them; the latest such place that is known."""
        ...

    def __len__(self) -> int: ...

    def extend(self, token_ids: list[int], begin: int, end: int) -> None:
        """Append `token_ids[begin:end]`."""
        ...

    def copy(self, source: int, count: int) -> list[int]:
        """`count` of its tokens from `source` on, or as many as there are."""
        ...


class TextReader(Protocol):
    """Reads one text and knows how much of its end occurs in another one."""

    @property
    def matched(self) -> int: ...

    def read(self, text: Any, token_ids: list[int], begin: int, end: int) -> None:
        """Read `token_ids[begin:end]`, to be found in `text`: the same one each time, though it may have grown."""
        ...

    def source(self, text: Any) -> int: ...


class RecurringText:
    __slots__ = ("automaton", "matched", "reader", "source")

    def __init__(self) -> None:
        self.automaton = SuffixAutomaton()
        self.reader = Follower()
        self.source, self.matched = 0, 0

    def __len__(self) -> int:
        return len(self.automaton)

    def extend(self, token_ids: list[int], begin: int, end: int) -> None:
        for token in token_ids[begin:end]:
            self._append(token)

    def _append(self, token: int) -> None:
        automaton, reader = self.automaton, self.reader
        reader.read(automaton, token)  # before it is part of the text
        self.source, self.matched = reader.source(automaton), reader.matched
        automaton.append(token)
        if (state := reader.settle(automaton)) > 0:
            automaton.after[state] = len(automaton.text)  # the latest place, for the next time

    def copy(self, source: int, count: int) -> list[int]:
        return self.automaton.text[source : source + count]


class TextFollower:
    __slots__ = ("follower",)

    def __init__(self) -> None:
        self.follower = Follower()

    @property
    def matched(self) -> int:
        return self.follower.matched

    def read(self, text: RecurringText, token_ids: list[int], begin: int, end: int) -> None:
        for token in token_ids[begin:end]:
            self.follower.read(text.automaton, token)

    def source(self, text: RecurringText) -> int:
        return self.follower.source(text.automaton)


@dataclass(frozen=True, slots=True)
class Texts:
    """Which of the two: this file's or the native ones."""

    text: Callable[[], Text] = RecurringText
    reader: Callable[[], TextReader] = TextFollower
