"""Build a tokenizer from the `tokenizer.ggml.*` fields of a GGUF file.

A 'gpt2' vocabulary brings its merges and is encoded by the `tokenizers` library. A 'llama' (SentencePiece) one brings
scores instead: a pair may merge when the joined text is a token, best score first. Written down as merges those of
Gemma 3 are half a million, which the library needs seconds to take in; `csrc/text` finds them as it encodes.
Nothing in the file is trusted: every count, id and text is checked here, because the library below may panic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from itertools import repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE

from setpoint import _native
from setpoint.errors import ModelFileError, UnsupportedModelError
from setpoint.text.pre_tokenizers import find_pre_tokenizer
from setpoint.text.source import TokenizerMetadata
from setpoint.text.token_bytes import SPACE, TokenToBytes, byte_level_bytes, byte_token_value, sentencepiece_bytes
from setpoint.text.vocabulary import (
    MAX_MERGES,
    Encoder,
    LibraryEncoder,
    Vocabulary,
    check_added_tokens,
    checked_lengths,
    longest_in_bytes,
)

MAX_MERGE_WORK = 256 << 20  # sum of squared token lengths: texts of long tokens take long to encode; Gemma 3: 12 M


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def build_from_metadata(source: TokenizerMetadata) -> Vocabulary:
    """Raises ModelFileError for fields that contradict each other, UnsupportedModelError for an unknown kind."""
    lengths = checked_lengths(source.tokens)
    tokens = _named(source.tokens) if lengths.min() == 0 else list(source.tokens)
    types = _checked_types(source, len(tokens))
    for name, token_id in (("bos", source.bos_id), ("eos", source.eos_id), ("unknown", source.unk_id)):
        if token_id is not None and not 0 <= token_id < len(tokens):
            raise ModelFileError(f"tokenizer: {name} token id {token_id} is outside the {len(tokens)} tokens")
    special = _special_ids(source, tokens, types)
    user_defined = frozenset(np.flatnonzero(types == TokenType.USER_DEFINED).tolist()) - special
    check_added_tokens(len(special) + len(user_defined))
    if source.model == "gpt2":
        native, adds_bos, space_prefix = _byte_level(source, tokens, special, user_defined)
        longest = longest_in_bytes(tokens)
        to_bytes: TokenToBytes = byte_level_bytes
    elif source.model == "llama":
        space_prefix = source.add_space_prefix is not False
        pieces, adds_bos = _sentencepiece(source, tokens, lengths, types, special | user_defined, space_prefix), True
        native, longest = pieces, pieces.longest
        to_bytes = sentencepiece_bytes
    else:
        raise UnsupportedModelError(
            f"tokenizer.ggml.model is {source.model[:64]!r}; the supported ones are: gpt2, llama"
        )
    return Vocabulary(
        native=native,
        size=len(tokens),
        longest_token=longest,
        to_bytes=to_bytes,
        special_ids=special,
        verbatim_ids=special | user_defined,
        bos_id=source.bos_id,
        eos_id=source.eos_id,
        prefix_ids=_frame("bos", source.bos_id, adds_bos if source.add_bos is None else source.add_bos),
        suffix_ids=_frame("eos", source.eos_id, bool(source.add_eos)),
        space_prefix=space_prefix,
    )


def _frame(name: str, token_id: int | None, wanted: bool) -> tuple[int, ...]:
    if not wanted:
        return ()
    if token_id is None:
        raise ModelFileError(f"tokenizer: texts start or end with the {name} token, but the file names none")
    return (token_id,)


def _named(tokens: Sequence[str]) -> list[str]:
    """The texts; an empty one gets a name that no text can merge into."""
    return [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]


def _checked_types(source: TokenizerMetadata, num_tokens: int) -> NDArray[np.int64]:
    types = source.token_types if source.token_types is not None else [TokenType.NORMAL] * num_tokens
    if len(types) != num_tokens:
        raise ModelFileError(f"tokenizer: {len(types)} token types for {num_tokens} tokens")
    return np.array(types, np.int64)


def _special_ids(source: TokenizerMetadata, tokens: list[str], types: NDArray[np.int64]) -> frozenset[int]:
    special = set(np.flatnonzero((types == TokenType.CONTROL) | (types == TokenType.UNKNOWN)).tolist())
    # Some converters type '<|im_end|>' as normal; a one-letter token that a bad file names as its end stays text.
    ends = [i for i in (source.bos_id, source.eos_id) if i is not None]
    special.update(i for i in ends if len(tokens[i]) > 2 and tokens[i][0] in "<[" and tokens[i][-1] in ">]")
    return frozenset(special)


def _byte_level(
    source: TokenizerMetadata, tokens: list[str], special: frozenset[int], user_defined: frozenset[int]
) -> tuple[Encoder, bool, bool]:
    rule = find_pre_tokenizer(source.pre)
    if not source.merges:
        raise ModelFileError("tokenizer: a gpt2 vocabulary needs tokenizer.ggml.merges")
    if len(source.merges) > MAX_MERGES:
        raise ModelFileError(f"tokenizer: {len(source.merges)} merges (at most {MAX_MERGES})")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise ModelFileError("tokenizer: the same token appears twice")
    merges: list[Any] = list(map(tuple, map(str.split, source.merges, repeat(" "), repeat(1))))
    try:
        library = Tokenizer(BPE(vocab=vocabulary, merges=merges, ignore_merges=rule.whole_words))
    except Exception as error:  # looked through only now: this is a tenth of a start
        raise ModelFileError(f"tokenizer: {_bad_merge(source.merges, vocabulary)}") from error
    library.pre_tokenizer = rule.build()
    if (normalizer := rule.normalizer()) is not None:
        library.normalizer = normalizer
    library.add_special_tokens([AddedToken(tokens[i], special=True, normalized=False) for i in sorted(special)])
    library.add_tokens([AddedToken(tokens[i], special=False, normalized=False) for i in sorted(user_defined)])
    return LibraryEncoder(library), rule.adds_bos, False


def _bad_merge(merges: Sequence[str], vocabulary: Mapping[str, int]) -> str:
    """Why the library refused them."""
    for text in merges:
        left, space, right = text.partition(" ")
        if not space or any(part not in vocabulary for part in (left, right, left + right)):
            return f"the merge {text[:64]!r} names a token that is not in the vocabulary"
    return "the vocabulary is rejected by the tokenizers library"


def _sentencepiece(
    source: TokenizerMetadata,
    tokens: list[str],
    lengths: NDArray[np.int64],
    types: NDArray[np.int64],
    added: frozenset[int],
    space_prefix: bool,
) -> _native.SentencePiece:
    if source.scores is None or len(source.scores) != len(tokens):
        raise ModelFileError("tokenizer: a llama vocabulary needs one tokenizer.ggml.scores entry per token")
    with np.errstate(over="ignore"):
        scores = np.array(source.scores, np.float32)  # a copy: in the file it may lie at any address
    if not np.isfinite(scores).all():
        raise ModelFileError("tokenizer: a score is not a finite number")
    if np.square(lengths).sum() > MAX_MERGE_WORK:
        raise ModelFileError("tokenizer: the tokens are too long to merge texts into them")
    mergeable = types != TokenType.BYTE
    names = list(tokens)
    characters = {tokens[i] for i in np.flatnonzero(lengths == 1).tolist()}  # that have a token of their own
    for i in np.flatnonzero(~mergeable).tolist():
        value = byte_token_value(tokens[i])
        if value is None:
            raise ModelFileError(f"tokenizer: byte token {tokens[i][:64]!r} is not of the form <0xNN>")
        # Byte tokens of ASCII characters that have no token of their own take that character as their text.
        # Gemma has '\t' only as <0x09> but '\t\t' as a token: the merge needs its parts by name.
        character = SPACE if value == 0x20 else chr(value)
        if value < 0x80 and character not in characters:
            names[i], mergeable[i] = character, True
    if source.unk_id is None:
        known = set(names)
        if not all(f"<0x{byte:02X}>" in known or chr(byte) in known for byte in range(0x80, 0x100)):
            raise ModelFileError("tokenizer: no unknown token and not every byte token: some text would vanish")
    mergeable[list(added)] = False
    try:
        return _native.SentencePiece(
            names,
            scores,
            mergeable.view(np.uint8),
            np.array(sorted(added), np.int32),
            source.unk_id,
            space_prefix,
        )
    except ValueError as error:
        raise ModelFileError(f"tokenizer: {error}") from error
