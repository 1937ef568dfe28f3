"""Drafts from suffix automata: the longest end of a sequence that occurred before, however long.

One automaton holds the sequence itself, its prompt included: with a chat or an agent that is the whole session. One
for each tenant and salt holds recent outputs of other requests, because agents repeat themselves; it is never shared
wider than the prefix cache is, as what it speeds up could be told from outside. After SuffixDecoding (Oliaro et al.,
2024), with automata instead of trees and no counts: the latest occurrence is the one that is copied.
"""

from __future__ import annotations

from collections import OrderedDict, abc, deque
from typing import Any

from setpoint.engine.sequence import Sequence
from setpoint.engine.speculation.drafter import Draft
from setpoint.engine.speculation.prompt_lookup import continuation
from setpoint.engine.speculation.suffix_automaton import Follower, SuffixAutomaton

MIN_MATCH = 2
MAX_PROMPT_TOKENS = 4096  # of one sequence, the last ones
MAX_TOKENS = 1 << 17  # of all sequences of a step: automata take some 400 bytes a token
TOKENS_PER_CALL = 512  # a long text is read over several steps
GENERATION_TOKENS = 8192  # of a tenant's outputs; there are two generations, and the older one is dropped whole
MAX_OUTPUT_TOKENS = 2048  # of one request, the last ones
MAX_TENANTS = 16


class RecurringText:
    """A text that grows, and where the end of it occurred before."""

    __slots__ = ("automaton", "matched", "reader", "source")

    def __init__(self) -> None:
        self.automaton = SuffixAutomaton()
        self.reader = Follower()
        self.source, self.matched = 0, 0

    def append(self, token: int) -> None:
        automaton, reader = self.automaton, self.reader
        reader.read(automaton, token)  # before it is part of the text
        self.source, self.matched = reader.source(automaton), reader.matched
        automaton.append(token)
        if (state := reader.settle(automaton)) > 0:
            automaton.after[state] = len(automaton.text)  # the latest place, for the next time


class _Session:
    __slots__ = ("done", "text")

    def __init__(self, begin: int) -> None:
        self.done = begin
        self.text = RecurringText()


class SessionSuffix:
    """Drafts from the sequence itself."""

    name = "suffix-session"

    def propose(self, seqs: abc.Sequence[Sequence], max_drafts: int) -> list[Draft | None]:
        states: list[Any] = [seq.draft_states.get(self.name) for seq in seqs]
        room = MAX_TOKENS - sum(len(state.text.automaton) for state in states if state is not None)
        to_read = TOKENS_PER_CALL
        drafts: list[Draft | None] = []
        for seq, state in zip(seqs, states, strict=True):
            if state is None:
                begin = max(0, seq.num_tokens - MAX_PROMPT_TOKENS)
                state = seq.draft_states[self.name] = _Session(begin)
            read = max(0, min(seq.num_tokens - state.done, to_read, room))
            for token in seq.token_ids[state.done : state.done + read]:
                state.text.append(token)
            state.done += read
            to_read -= read
            room -= read
            drafts.append(self._draft(state.text, max_drafts) if state.done == seq.num_tokens else None)
        return drafts

    @staticmethod
    def _draft(text: RecurringText, max_drafts: int) -> Draft | None:
        if text.matched < MIN_MATCH:
            return None
        return Draft(continuation(text.automaton.text, text.source, max_drafts), text.matched)

    def finished(self, seq: Sequence) -> None:
        pass


class _Corpus:
    """Recent outputs of one tenant in two generations."""

    def __init__(self) -> None:
        self.generations = [RecurringText(), RecurringText()]  # the older one first
        self.number = 0  # of the newer one
        self.pending: deque[int] = deque()

    def add(self, output: abc.Sequence[int]) -> None:
        if len(self.pending) < GENERATION_TOKENS:
            self.pending.extend(output)

    def take_in(self, count: int) -> None:
        for _ in range(min(count, len(self.pending))):
            if len(self.generations[1].automaton) >= GENERATION_TOKENS:
                self.generations = [self.generations[1], RecurringText()]
                self.number += 1
            self.generations[1].append(self.pending.popleft())


class _Reader:
    """How far a sequence's end is found in both generations of its tenant's corpus."""

    __slots__ = ("done", "followers", "number")

    def __init__(self, begin: int, number: int) -> None:
        self.done = begin
        self.number = number
        self.followers = [Follower(), Follower()]

    def read(self, corpus: _Corpus, token_ids: list[int], count: int) -> None:
        for _ in range(min(corpus.number - self.number, 2)):
            self.followers = [self.followers[1], Follower()]
        self.number = corpus.number
        for token in token_ids[self.done : self.done + count]:
            for follower, text in zip(self.followers, corpus.generations, strict=True):
                follower.read(text.automaton, token)
        self.done += count


class CorpusSuffix:
    """Drafts from what others of the same tenant and salt were answered."""

    name = "suffix-corpus"

    def __init__(self) -> None:
        self._corpora: OrderedDict[bytes, _Corpus] = OrderedDict()

    def propose(self, seqs: abc.Sequence[Sequence], max_drafts: int) -> list[Draft | None]:
        to_read = TOKENS_PER_CALL
        drafts: list[Draft | None] = []
        for seq in seqs:
            corpus = self._corpora.get(seq.owner.root_key)
            if corpus is None:
                drafts.append(None)
                continue
            corpus.take_in(TOKENS_PER_CALL // len(seqs) + 1)
            reader: Any = seq.draft_states.get(self.name)
            if reader is None:  # a match of the prompt's last tokens is all that it takes to begin
                reader = seq.draft_states[self.name] = _Reader(max(0, seq.num_tokens - 32), corpus.number)
            read = max(0, min(seq.num_tokens - reader.done, to_read))
            reader.read(corpus, seq.token_ids, read)
            to_read -= read
            drafts.append(_best(corpus, reader, max_drafts) if reader.done == seq.num_tokens else None)
        return drafts

    def finished(self, seq: Sequence) -> None:
        output = seq.token_ids[max(seq.num_prompt, seq.num_tokens - MAX_OUTPUT_TOKENS) :]
        if len(output) <= MIN_MATCH:
            return
        corpus = self._corpora.setdefault(seq.owner.root_key, _Corpus())
        self._corpora.move_to_end(seq.owner.root_key)
        corpus.add(output)
        while len(self._corpora) > MAX_TENANTS:
            self._corpora.popitem(last=False)


def _best(corpus: _Corpus, reader: _Reader, max_drafts: int) -> Draft | None:
    """Of the longer match; the newer generation wins a draw."""
    older, newer = reader.followers
    choice = 1 if newer.matched >= older.matched else 0
    follower, automaton = reader.followers[choice], corpus.generations[choice].automaton
    if follower.matched < MIN_MATCH:
        return None
    source = follower.source(automaton)
    token_ids = automaton.text[source : source + max_drafts]
    return Draft(token_ids, follower.matched) if token_ids else None
