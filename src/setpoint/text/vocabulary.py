"""What both builders produce, and the limits on what they read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tokenizers import Tokenizer

from setpoint.errors import ModelFileError
from setpoint.text.token_bytes import TokenToBytes

MAX_TOKENS = 1_000_000
MAX_TOKEN_CHARS = 65_536
MAX_VOCABULARY_CHARS = 10_000_000  # Gemma 3: 1.5 M
MAX_MERGES = 2_000_000  # Gemma 3: 0.5 M
MAX_ADDED_TOKENS = 65_536  # Gemma 3: 6,414


@dataclass(frozen=True)
class Vocabulary:
    """The library's tokenizer and what it cannot tell: how ids become bytes and what frames a text."""

    native: Tokenizer
    size: int  # every id is below it; some ids may have no token
    to_bytes: TokenToBytes
    special_ids: frozenset[int]
    verbatim_ids: frozenset[int]  # added tokens that stand for their own text
    bos_id: int | None
    eos_id: int | None
    prefix_ids: tuple[int, ...]  # what encode adds in front
    suffix_ids: tuple[int, ...]  # and behind
    space_prefix: bool  # a space is put before the text, and dropped from its decoding


def check_vocabulary_size(tokens: Iterable[str]) -> None:
    num_tokens = num_chars = 0
    for token in tokens:
        num_tokens += 1
        num_chars += len(token)
        if len(token) > MAX_TOKEN_CHARS:
            raise ModelFileError(f"tokenizer: a token of {len(token)} characters (at most {MAX_TOKEN_CHARS})")
    if not 0 < num_tokens <= MAX_TOKENS:
        raise ModelFileError(f"tokenizer: {num_tokens} tokens (1 to {MAX_TOKENS})")
    if num_chars > MAX_VOCABULARY_CHARS:
        raise ModelFileError(f"tokenizer: {num_chars} characters of tokens (at most {MAX_VOCABULARY_CHARS})")


def check_added_tokens(num_added: int) -> None:
    if num_added > MAX_ADDED_TOKENS:
        raise ModelFileError(f"tokenizer: {num_added} special and user-defined tokens (at most {MAX_ADDED_TOKENS})")
