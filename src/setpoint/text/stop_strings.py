"""Find stop strings in text that arrives in pieces (Aho and Corasick, 1975)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class StopStrings:
    """Reads text one character at a time, in constant time whatever the number of stop strings.

    The state is the longest end of the text so far that begins some stop string. A stop string counts where it is
    completed first; of those completed by the same character, the longest.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._fallback = [0]  # the state of the longest proper end of this state's text
        self._depth = [0]
        self._completed: list[str | None] = [None]
        for stop in stops:
            self._add(stop)
        self._link()
        self._state = 0

    def _add(self, stop: str) -> None:
        state = 0
        for character in stop:
            if character not in self._next[state]:
                self._next[state][character] = len(self._next)
                self._next.append({})
                self._fallback.append(0)
                self._depth.append(self._depth[state] + 1)
                self._completed.append(None)
            state = self._next[state][character]
        if state:  # an empty stop string never counts
            self._completed[state] = stop

    def _link(self) -> None:
        waiting = deque(self._next[0].values())
        while waiting:  # breadth first: a fallback is shorter, so it is linked already
            state = waiting.popleft()
            for character, child in self._next[state].items():
                self._fallback[child] = self._step(self._fallback[state], character)
                if self._completed[child] is None:
                    self._completed[child] = self._completed[self._fallback[child]]
                waiting.append(child)

    def _step(self, state: int, character: str) -> int:
        while state and character not in self._next[state]:
            state = self._fallback[state]
        return self._next[state].get(character, 0)

    @property
    def num_pending(self) -> int:
        """How many of the last characters may still become a stop string."""
        return self._depth[self._state]

    def feed(self, text: str) -> tuple[str, int] | None:
        """Read `text`; at the first stop string completed, return it and the number of characters read."""
        state = self._state
        for i, character in enumerate(text):
            state = self._step(state, character)
            stop = self._completed[state]
            if stop is not None:
                self._state = state
                return stop, i + 1
        self._state = state
        return None
