"""Prompt lookup: what followed the last few tokens the last time they occurred in this sequence.

The method of "Prompt Lookup Decoding" (Saxena 2023), with an index instead of a scan: two tables say where each pair
and each run of four tokens last ended. The match is then followed backwards, to tell a chance from a copy.
"""

from __future__ import annotations

from collections import abc
from typing import Any

from setpoint.engine.sequence import Sequence
from setpoint.engine.speculation.drafter import Draft

LENGTHS = (4, 2)  # tried in this order
MAX_STRENGTH = 32
MAX_PROMPT_TOKENS = 4096  # of one sequence, the last ones
MAX_TOKENS = 1 << 18  # of all sequences of a step: tables take some 300 bytes a token
TOKENS_PER_CALL = 1024  # a long prompt is indexed over several steps


class _Index:
    __slots__ = ("done", "size", "tables")

    def __init__(self, begin: int) -> None:
        self.done = begin  # tokens below it are in the tables, as the ends of runs
        self.size = 0
        self.tables: tuple[dict[tuple[int, ...], int], ...] = tuple({} for _ in LENGTHS)

    def extend(self, token_ids: list[int], end: int) -> None:
        for length, table in zip(LENGTHS, self.tables, strict=True):
            first = max(self.done, length - 1)
            if first >= end:
                continue
            ends = range(first + 1, end + 1)
            runs = zip(*(token_ids[first - back : end - back] for back in reversed(range(length))), strict=True)
            table.update(zip(runs, ends, strict=True))
        self.size += end - self.done
        self.done = end

    def source(self, token_ids: list[int]) -> int | None:
        """Where the tokens stand that followed the longest run which also ends the sequence."""
        for length, table in zip(LENGTHS, self.tables, strict=True):
            found = table.get(tuple(token_ids[-length:]))
            if found is not None:
                return found
        return None


class PromptLookup:
    name = "prompt-lookup"

    def propose(self, seqs: abc.Sequence[Sequence], max_drafts: int) -> list[Draft | None]:
        room = MAX_TOKENS - sum(index.size for seq in seqs if (index := _index_of(seq)) is not None)
        to_read = TOKENS_PER_CALL
        drafts: list[Draft | None] = []
        for seq in seqs:
            index, end = _index_of(seq), len(seq.token_ids) - 1  # the last token has nothing behind it yet
            if index is None:
                index = seq.draft_states[self.name] = _Index(max(0, end - MAX_PROMPT_TOKENS))
            read = min(end - index.done, to_read, room)
            if read > 0:
                index.extend(seq.token_ids, index.done + read)
                to_read -= read
                room -= read
            drafts.append(_draft(index, seq.token_ids, max_drafts) if index.done == end else None)
        return drafts

    def finished(self, seq: Sequence) -> None:
        pass


def _index_of(seq: Sequence) -> _Index | None:
    found: Any = seq.draft_states.get(PromptLookup.name)
    return found if isinstance(found, _Index) else None


def _draft(index: _Index, token_ids: list[int], max_drafts: int) -> Draft | None:
    source = index.source(token_ids)
    if source is None:
        return None
    matched, most = 0, min(MAX_STRENGTH, source)
    while matched < most and token_ids[source - 1 - matched] == token_ids[-1 - matched]:
        matched += 1
    return Draft(continuation(token_ids, source, max_drafts), matched)


def continuation(token_ids: list[int], source: int, count: int) -> list[int]:
    """`count` tokens from `source` on; past the end of the text it goes on with itself, as a repetition does."""
    return repeated(token_ids[source : source + count], count)


def repeated(token_ids: list[int], count: int) -> list[int]:
    """At least one token, again and again until there are `count`."""
    while len(token_ids) < count:
        token_ids += token_ids[: count - len(token_ids)]
    return token_ids
