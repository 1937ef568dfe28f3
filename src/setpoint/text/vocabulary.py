"""What both builders produce, and the limits on what they read."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as Library

from setpoint.errors import ModelFileError
from setpoint.text.token_bytes import TokenToBytes

MAX_TOKENS = 1_000_000
MAX_TOKEN_CHARS = 65_536
MAX_VOCABULARY_CHARS = 10_000_000  # Gemma 3: 1.5 M
MAX_MERGES = 2_000_000  # Gemma 3: 0.5 M
MAX_ADDED_TOKENS = 65_536  # Gemma 3: 6,414


class Encoder(Protocol):
    """Text to ids, without what frames a text, and ids to the tokens as the vocabulary writes them."""

    def encode(self, text: str) -> list[int]: ...

    def id_to_token(self, token_id: int) -> str | None: ...

    def token_to_id(self, token: str) -> int | None: ...


class LibraryEncoder:
    """The `tokenizers` library as an `Encoder`."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self.id_to_token = library.id_to_token
        self.token_to_id = library.token_to_id

    def encode(self, text: str) -> list[int]:
        # The batch call lets other threads run meanwhile and keeps no character offsets.
        ids: list[int] = self._library.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids


@dataclass(frozen=True)
class Vocabulary:
    """What encodes a text, and what it cannot tell: how ids become bytes and what frames a text."""

    native: Encoder
    size: int  # every id is below it; some ids may have no token
    longest_token: int  # no token stands for more bytes
    to_bytes: TokenToBytes
    special_ids: frozenset[int]
    verbatim_ids: frozenset[int]  # added tokens that stand for their own text
    bos_id: int | None
    eos_id: int | None
    prefix_ids: tuple[int, ...]  # what encode adds in front
    suffix_ids: tuple[int, ...]  # and behind
    space_prefix: bool  # a space is put before the text, and dropped from its decoding


def checked_lengths(tokens: Collection[str]) -> NDArray[np.int64]:
    """Characters of each token. Raises ModelFileError when there are too many tokens or characters, or none."""
    if not 0 < len(tokens) <= MAX_TOKENS:
        raise ModelFileError(f"tokenizer: {len(tokens)} tokens (1 to {MAX_TOKENS})")
    lengths = np.fromiter(map(len, tokens), np.int64, len(tokens))
    longest, num_chars = int(lengths.max()), int(lengths.sum())
    if longest > MAX_TOKEN_CHARS:
        raise ModelFileError(f"tokenizer: a token of {longest} characters (at most {MAX_TOKEN_CHARS})")
    if num_chars > MAX_VOCABULARY_CHARS:
        raise ModelFileError(f"tokenizer: {num_chars} characters of tokens (at most {MAX_VOCABULARY_CHARS})")
    return lengths


def longest_in_bytes(tokens: Iterable[str]) -> int:
    """At most this many bytes lie behind one token: its own in UTF-8, or one for each character."""
    return max(map(len, map(str.encode, tokens)), default=1) or 1


def check_added_tokens(num_added: int) -> None:
    if num_added > MAX_ADDED_TOKENS:
        raise ModelFileError(f"tokenizer: {num_added} special and user-defined tokens (at most {MAX_ADDED_TOKENS})")
