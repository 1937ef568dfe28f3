"""Drafts from suffix automata: the longest end of a sequence that occurred before, however long.

One automaton holds the sequence itself, its prompt included: with a chat or an agent that is the whole session. One
for each tenant and salt holds recent outputs of other requests, because agents repeat themselves; it is never shared
wider than the prefix cache is, as what it speeds up could be told from outside. After SuffixDecoding (Oliaro et al.,
2024), with automata instead of trees and no counts: the latest occurrence is the one that is copied.
"""

from __future__ import annotations

from collections import OrderedDict, abc
from typing import Any

from setpoint.engine.sequence import Sequence
from setpoint.engine.speculation.drafter import Draft
from setpoint.engine.speculation.prompt_lookup import repeated
from setpoint.engine.speculation.recurring_text import Text, TextReader, Texts

MIN_MATCH = 2
MAX_PROMPT_TOKENS = 4096  # of one sequence, the last ones
MAX_TOKENS = 1 << 17  # of all sequences of a step: automata take some 100 to 400 bytes a token
TOKENS_PER_CALL = 512  # a long text is read over several steps
GENERATION_TOKENS = 8192  # of a tenant's outputs; there are two generations, and the older one is dropped whole
MAX_OUTPUT_TOKENS = 2048  # of one request, the last ones
MAX_TENANTS = 16


class _Session:
    __slots__ = ("done", "text")

    def __init__(self, begin: int, text: Text) -> None:
        self.done = begin
        self.text = text


class SessionSuffix:
    """Drafts from the sequence itself."""

    name = "suffix-session"

    def __init__(self, texts: Texts | None = None) -> None:
        self._texts = texts or Texts()

    def propose(self, seqs: abc.Sequence[Sequence], max_drafts: int) -> list[Draft | None]:
        states: list[Any] = [seq.draft_states.get(self.name) for seq in seqs]
        room = MAX_TOKENS - sum(len(state.text) for state in states if state is not None)
        to_read = TOKENS_PER_CALL
        drafts: list[Draft | None] = []
        for seq, state in zip(seqs, states, strict=True):
            if state is None:
                begin = max(0, seq.num_tokens - MAX_PROMPT_TOKENS)
                state = seq.draft_states[self.name] = _Session(begin, self._texts.text())
            read = max(0, min(seq.num_tokens - state.done, to_read, room))
            state.text.extend(seq.token_ids, state.done, state.done + read)
            state.done += read
            to_read -= read
            room -= read
            drafts.append(self._draft(state.text, max_drafts) if state.done == seq.num_tokens else None)
        return drafts

    @staticmethod
    def _draft(text: Text, max_drafts: int) -> Draft | None:
        if text.matched < MIN_MATCH:
            return None
        return Draft(repeated(text.copy(text.source, max_drafts), max_drafts), text.matched)

    def finished(self, seq: Sequence) -> None:
        pass


class _Corpus:
    """Recent outputs of one tenant in two generations."""

    def __init__(self, texts: Texts) -> None:
        self._texts = texts
        self.generations = [texts.text(), texts.text()]  # the older one first
        self.number = 0  # of the newer one
        self.pending: list[int] = []

    def add(self, output: abc.Sequence[int]) -> None:
        if len(self.pending) < GENERATION_TOKENS:
            self.pending.extend(output)

    def take_in(self, count: int) -> None:
        taken = self.pending[:count]
        del self.pending[:count]
        begin = 0
        while begin < len(taken):
            room = GENERATION_TOKENS - len(self.generations[1])
            if room == 0:
                self.generations = [self.generations[1], self._texts.text()]
                self.number += 1
                continue
            end = min(len(taken), begin + room)
            self.generations[1].extend(taken, begin, end)
            begin = end


class _Reader:
    """How far a sequence's end is found in both generations of its tenant's corpus."""

    __slots__ = ("done", "number", "readers")

    def __init__(self, begin: int, number: int, texts: Texts) -> None:
        self.done = begin
        self.number = number
        self.readers: list[TextReader] = [texts.reader(), texts.reader()]

    def read(self, corpus: _Corpus, token_ids: list[int], count: int, texts: Texts) -> None:
        for _ in range(min(corpus.number - self.number, 2)):
            self.readers = [self.readers[1], texts.reader()]
        self.number = corpus.number
        for reader, text in zip(self.readers, corpus.generations, strict=True):
            reader.read(text, token_ids, self.done, self.done + count)
        self.done += count


class CorpusSuffix:
    """Drafts from what others of the same tenant and salt were answered."""

    name = "suffix-corpus"

    def __init__(self, texts: Texts | None = None) -> None:
        self._texts = texts or Texts()
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
                begin = max(0, seq.num_tokens - 32)
                reader = seq.draft_states[self.name] = _Reader(begin, corpus.number, self._texts)
            read = max(0, min(seq.num_tokens - reader.done, to_read))
            reader.read(corpus, seq.token_ids, read, self._texts)
            to_read -= read
            drafts.append(_best(corpus, reader, max_drafts) if reader.done == seq.num_tokens else None)
        return drafts

    def finished(self, seq: Sequence) -> None:
        output = seq.token_ids[max(seq.num_prompt, seq.num_tokens - MAX_OUTPUT_TOKENS) :]
        if len(output) <= MIN_MATCH:
            return
        corpus = self._corpora.setdefault(seq.owner.root_key, _Corpus(self._texts))
        self._corpora.move_to_end(seq.owner.root_key)
        corpus.add(output)
        while len(self._corpora) > MAX_TENANTS:
            self._corpora.popitem(last=False)


def _best(corpus: _Corpus, reader: _Reader, max_drafts: int) -> Draft | None:
    """Of the longer match; the newer generation wins a draw."""
    older, newer = reader.readers
    choice = 1 if newer.matched >= older.matched else 0
    best, text = reader.readers[choice], corpus.generations[choice]
    if best.matched < MIN_MATCH:
        return None
    token_ids = text.copy(best.source(text), max_drafts)
    return Draft(token_ids, best.matched) if token_ids else None
