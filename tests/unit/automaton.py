"""A grammar that the engine can follow without a library: a finite automaton over token ids."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from setpoint.errors import OutputViolationError

VOCAB_SIZE = 256
NO_TEXT = 200  # ids from here on stand for no text


@dataclass(frozen=True)
class Automaton:
    """`edges[state]` maps a token to the next state; states without edges must be accepting."""

    edges: Sequence[dict[int, int]]
    accepting: frozenset[int]

    def start(self, stop_ids: Collection[int]) -> Walk:
        return Walk(self, frozenset(token for token in stop_ids if token >= NO_TEXT))

    def accepts(self, tokens: Sequence[int], *, whole: bool) -> bool:
        """Whether `tokens`, ends left out, are a sentence of the language, or at least the beginning of one."""
        state = 0
        for token in tokens:
            if token not in self.edges[state]:
                return False
            state = self.edges[state][token]
        return state in self.accepting or not whole


@dataclass
class Walk:
    automaton: Automaton
    ends: frozenset[int]
    states: list[int] = field(default_factory=lambda: [0])
    has_ended: bool = False
    num_masks: int = 0

    @property
    def _edges(self) -> dict[int, int]:
        return self.automaton.edges[self.states[-1]]

    @property
    def _accepts(self) -> bool:
        return self.states[-1] in self.automaton.accepting

    @property
    def is_finished(self) -> bool:
        return self.has_ended or (self._accepts and not self._edges)

    def _allowed(self) -> set[int]:
        assert not self.is_finished
        return set(self._edges) | (set(self.ends) if self._accepts else set())

    def mask(self) -> bytes:
        self.num_masks += 1
        mask = bytearray(-(-VOCAB_SIZE // 32) * 4)
        for token in self._allowed():
            mask[token // 8] |= 1 << token % 8
        assert any(mask)
        return bytes(mask)

    def forced(self) -> int | None:
        allowed = self._allowed()
        return allowed.pop() if len(allowed) == 1 else None

    def count_allowed(self, tokens: Sequence[int]) -> int:
        state = self.states[-1]
        for count, token in enumerate(tokens):
            if token not in self.automaton.edges[state]:
                return count
            state = self.automaton.edges[state][token]
        return len(tokens)

    def advance(self, token: int) -> None:
        if self.has_ended or (token in self.ends and not self._accepts):
            raise OutputViolationError("an end that may not be")
        if token in self.ends:
            self.has_ended = True
        elif token not in self._edges:
            raise OutputViolationError(f"token {token} may not be")
        else:
            self.states.append(self._edges[token])

    def rollback(self, num_tokens: int) -> None:
        assert not self.has_ended
        assert num_tokens < len(self.states)
        del self.states[len(self.states) - num_tokens :]


def chain(*options: Collection[int]) -> Automaton:
    """One of the tokens of each collection after the other; the last state has no way on."""
    edges = [dict.fromkeys(tokens, number + 1) for number, tokens in enumerate(options)]
    return Automaton([*edges, {}], frozenset([len(options)]))
