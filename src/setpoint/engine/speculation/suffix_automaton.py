"""A suffix automaton of token ids that grows at its end: every substring of a text, in at most two states a token.

Blumer et al., "The smallest automaton recognizing the subwords of a text" (1985). A state stands for substrings that
end at the same places; `length` is its longest one, and `link` leads to the longest suffix that ends at more places.
Most states have one way out, kept in two lists; the others share a table of dictionaries.
"""

from __future__ import annotations

_NOTHING = -1


class SuffixAutomaton:
    def __init__(self) -> None:
        self.text: list[int] = []
        self.link, self.length = [_NOTHING], [0]
        self.after = [0]  # per state: the position behind one of its places, a late one where that is known
        self._token, self._target = [_NOTHING], [_NOTHING]  # the first way out
        self._others: dict[int, dict[int, int]] = {}
        self._last = 0

    def __len__(self) -> int:
        return len(self.text)

    def target(self, state: int, token: int) -> int:
        """The state behind `token`, or -1."""
        if self._token[state] == token:
            return self._target[state]
        others = self._others.get(state)
        return others.get(token, _NOTHING) if others is not None else _NOTHING

    def append(self, token: int) -> None:
        """Token ids are 0 and up."""
        self.text.append(token)
        new = self._add_state(self.length[self._last] + 1, 0)
        state, self._last = self._last, new
        while state != _NOTHING:
            behind = self.target(state, token)
            if behind != _NOTHING:
                self.link[new] = self._exactly(state, token, behind)
                return
            self._set_target(state, token, new)
            state = self.link[state]

    def _add_state(self, length: int, link: int) -> int:
        self.length.append(length)
        self.link.append(link)
        self.after.append(len(self.text))
        self._token.append(_NOTHING)
        self._target.append(_NOTHING)
        return len(self.length) - 1

    def _set_target(self, state: int, token: int, target: int) -> None:
        if self._token[state] in (token, _NOTHING):
            self._token[state], self._target[state] = token, target
        else:
            self._others.setdefault(state, {})[token] = target

    def _exactly(self, state: int, token: int, behind: int) -> int:
        """The state of the strings that are one token longer than those of `state`, split off where need be."""
        if self.length[behind] == self.length[state] + 1:
            return behind
        split = self._add_state(self.length[state] + 1, self.link[behind])
        self.after[split] = self.after[behind]
        self._token[split], self._target[split] = self._token[behind], self._target[behind]
        if behind in self._others:
            self._others[split] = dict(self._others[behind])
        self.link[behind] = split
        while state != _NOTHING and self.target(state, token) == behind:
            self._set_target(state, token, split)
            state = self.link[state]
        return split


class Follower:
    """The longest end of a text, read token by token, that occurs in an automaton."""

    __slots__ = ("matched", "state")

    def __init__(self) -> None:
        self.state = 0
        self.matched = 0  # tokens

    def read(self, automaton: SuffixAutomaton, token: int) -> None:
        state, matched = self.settle(automaton), self.matched
        while (behind := automaton.target(state, token)) < 0 and state > 0:
            state = automaton.link[state]
            matched = automaton.length[state]
        if behind >= 0:
            self.state, self.matched = behind, matched + 1
            self.settle(automaton)
        else:
            self.state = self.matched = 0

    def settle(self, automaton: SuffixAutomaton) -> int:
        """The state of the match: since it was found, its string may have been split off."""
        state = self.state
        while state > 0 and self.matched <= automaton.length[automaton.link[state]]:
            state = automaton.link[state]
        self.state = state
        return state

    def source(self, automaton: SuffixAutomaton) -> int:
        """Where the tokens stand that followed the match."""
        return automaton.after[self.settle(automaton)]
