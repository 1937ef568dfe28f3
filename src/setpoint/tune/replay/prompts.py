"""Prompts for requests that a trace knows by lengths and block ids only.

Random tokens would distort speculation, routing of experts and the tokenizer, so prompts are cut from a long text:
words of the shipped prose, in an order in which each word follows one that it follows there too. A block id always
gives the same piece of it, and ids that are equal over a prefix give equal prefixes, which a prefix cache finds.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Generic, TypeVar

from setpoint.workload.trace import TraceRequest

POOL_WORDS = 24_000
PIECE = 32  # items that lie together in the text, where the block is no shorter
Item = TypeVar("Item", int, str)


@cache
def words() -> tuple[str, ...]:
    """The long text; the same everywhere and always."""
    source = (Path(__file__).parent.parent / "data" / "prose.txt").read_text(encoding="utf-8").split()
    followers: dict[str, list[str]] = {}
    for word, after in zip(source, [*source[1:], source[0]], strict=True):
        followers.setdefault(word, []).append(after)
    chance, text = random.Random(1), [source[0]]
    while len(text) < POOL_WORDS:
        text.append(chance.choice(followers[text[-1]]))
    return tuple(text)


class Prompts(Generic[Item]):
    """Items are token ids of the long text, or words of it where a server takes text alone.

    `items_per_token` is 1 for token ids. `salt` makes another text of the same ids: nothing of an earlier run is found.
    """

    def __init__(
        self,
        pool: Sequence[Item],
        block_tokens: int,
        salt: str,
        *,
        items_per_token: float = 1.0,
        first: Item | None = None,
        overhead_tokens: int = 0,
    ) -> None:
        self._pool: Sequence[Item] = pool
        self._block_tokens = block_tokens
        self._salt = salt
        self._per_token = items_per_token
        self._first: Item | None = first
        self._overhead = overhead_tokens

    def items(self, request: TraceRequest, index: int) -> list[Item]:
        """So many as stand for the input's length, `overhead_tokens` (of a chat template) less."""
        wanted = max(1, round((request.input_tokens - self._overhead) * self._per_token))
        found: list[Item] = [] if self._first is None else [self._first]
        for piece in self._pieces(request, index):
            if len(found) >= wanted:
                break
            found += piece
        return found[:wanted]

    def _pieces(self, request: TraceRequest, index: int) -> Iterator[Sequence[Item]]:
        block = max(1, round(self._block_tokens * self._per_token))
        for block_id in request.hash_ids:
            yield from self._cut(f"b{block_id}", block)
        tail = 0
        while True:  # what no id names belongs to this request alone
            yield from self._cut(f"r{index}.{tail}", PIECE)
            tail += 1

    def _cut(self, name: str, length: int) -> Iterator[Sequence[Item]]:
        for start in range(0, length, PIECE):
            size = min(PIECE, length - start)
            digest = hashlib.blake2b(f"{self._salt}/{name}/{start}".encode(), digest_size=8).digest()
            place = int.from_bytes(digest, "little") % (len(self._pool) - size)
            yield self._pool[place : place + size]
