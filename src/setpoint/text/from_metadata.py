"""Build a tokenizer from the `tokenizer.ggml.*` fields of a GGUF file.

A 'gpt2' vocabulary brings its merges. A 'llama' (SentencePiece) one brings scores instead: a pair may merge when the
joined text is a token, best score first, so the merges are recovered by cutting every token in two at every place.
Nothing in the file is trusted: every count, id and text is checked here, because the library below may panic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum

from tokenizers import AddedToken, Tokenizer, normalizers
from tokenizers.models import BPE

from setpoint.errors import ModelFileError, UnsupportedModelError
from setpoint.text.pre_tokenizers import find_pre_tokenizer
from setpoint.text.source import TokenizerMetadata
from setpoint.text.token_bytes import SPACE, TokenToBytes, byte_level_bytes, byte_token_value, sentencepiece_bytes
from setpoint.text.vocabulary import MAX_MERGES, Vocabulary, check_added_tokens, check_vocabulary_size

MAX_CUT_WORK = 256 << 20  # sum of squared token lengths, the cost of recovering merges; Gemma 3: 12 M


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
    tokens = _checked_tokens(source.tokens)
    types = _checked_types(source, len(tokens))
    for name, token_id in (("bos", source.bos_id), ("eos", source.eos_id), ("unknown", source.unk_id)):
        if token_id is not None and not 0 <= token_id < len(tokens):
            raise ModelFileError(f"tokenizer: {name} token id {token_id} is outside the {len(tokens)} tokens")
    special = _special_ids(source, tokens, types)
    user_defined = frozenset(i for i, kind in enumerate(types) if kind == TokenType.USER_DEFINED) - special
    check_added_tokens(len(special) + len(user_defined))
    if source.model == "gpt2":
        native, adds_bos, space_prefix = _byte_level(source, tokens)
        to_bytes: TokenToBytes = byte_level_bytes
    elif source.model == "llama":
        space_prefix = source.add_space_prefix is not False
        native, adds_bos = _sentencepiece(source, tokens, types, special | user_defined, space_prefix), True
        to_bytes = sentencepiece_bytes
    else:
        raise UnsupportedModelError(
            f"tokenizer.ggml.model is {source.model[:64]!r}; the supported ones are: gpt2, llama"
        )
    native.add_special_tokens([AddedToken(tokens[i], special=True, normalized=False) for i in sorted(special)])
    native.add_tokens([AddedToken(tokens[i], special=False, normalized=False) for i in sorted(user_defined)])
    return Vocabulary(
        native=native,
        size=len(tokens),
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


def _checked_tokens(tokens: Sequence[str]) -> list[str]:
    """The texts, all different: an empty one gets a name that no text can merge into."""
    check_vocabulary_size(tokens)
    named = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    if len(set(named)) != len(named):
        raise ModelFileError("tokenizer: the same token appears twice")
    return named


def _checked_types(source: TokenizerMetadata, num_tokens: int) -> Sequence[int]:
    types = source.token_types if source.token_types is not None else [TokenType.NORMAL] * num_tokens
    if len(types) != num_tokens:
        raise ModelFileError(f"tokenizer: {len(types)} token types for {num_tokens} tokens")
    return types


def _special_ids(source: TokenizerMetadata, tokens: list[str], types: Sequence[int]) -> frozenset[int]:
    special = {i for i, kind in enumerate(types) if kind in (TokenType.CONTROL, TokenType.UNKNOWN)}
    # Some converters type '<|im_end|>' as normal; a one-letter token that a bad file names as its end stays text.
    ends = [i for i in (source.bos_id, source.eos_id) if i is not None]
    special.update(i for i in ends if len(tokens[i]) > 2 and tokens[i][0] in "<[" and tokens[i][-1] in ">]")
    return frozenset(special)


def _byte_level(source: TokenizerMetadata, tokens: list[str]) -> tuple[Tokenizer, bool, bool]:
    rule = find_pre_tokenizer(source.pre)
    if not source.merges:
        raise ModelFileError("tokenizer: a gpt2 vocabulary needs tokenizer.ggml.merges")
    if len(source.merges) > MAX_MERGES:
        raise ModelFileError(f"tokenizer: {len(source.merges)} merges (at most {MAX_MERGES})")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = []
    for text in source.merges:
        left, _, right = text.partition(" ")
        if left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            raise ModelFileError(f"tokenizer: the merge {text[:64]!r} names a token that is not in the vocabulary")
        merges.append((left, right))
    native = Tokenizer(BPE(vocab=vocabulary, merges=merges, ignore_merges=rule.whole_words))
    native.pre_tokenizer = rule.build()
    if (normalizer := rule.normalizer()) is not None:
        native.normalizer = normalizer
    return native, rule.adds_bos, False


def _sentencepiece(
    source: TokenizerMetadata, tokens: list[str], types: Sequence[int], added: frozenset[int], space_prefix: bool
) -> Tokenizer:
    if source.scores is None or len(source.scores) != len(tokens):
        raise ModelFileError("tokenizer: a llama vocabulary needs one tokenizer.ggml.scores entry per token")
    if not all(map(math.isfinite, source.scores)):
        raise ModelFileError("tokenizer: a score is not a finite number")
    if sum(len(token) ** 2 for token in tokens) > MAX_CUT_WORK:
        raise ModelFileError("tokenizer: the tokens are too long to recover their merges")
    for i, kind in enumerate(types):
        if kind == TokenType.BYTE and byte_token_value(tokens[i]) is None:
            raise ModelFileError(f"tokenizer: byte token {tokens[i][:64]!r} is not of the form <0xNN>")
    names = _with_characters(tokens, types)
    pieces = {
        names[i]: source.scores[i]
        for i, kind in enumerate(types)
        if i not in added and (kind != TokenType.BYTE or names[i] != tokens[i])
    }
    unknown = tokens[source.unk_id] if source.unk_id is not None else None
    if unknown is None and not all(f"<0x{byte:02X}>" in names or chr(byte) in names for byte in range(0x80, 0x100)):
        raise ModelFileError("tokenizer: no unknown token and not every byte token: some text would vanish")
    model = BPE(
        vocab={name: i for i, name in enumerate(names)},
        merges=recover_merges(pieces),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    native = Tokenizer(model)
    escape = normalizers.Replace(" ", SPACE)
    native.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), escape]) if space_prefix else escape
    return native


def _with_characters(tokens: list[str], types: Sequence[int]) -> list[str]:
    """Byte tokens of ASCII characters that have no token of their own take that character as their text.

    Gemma has '\\t' only as <0x09> but '\\t\\t' as a token: the merge needs its parts by name.
    """
    present = set(tokens)
    names = list(tokens)
    for i, kind in enumerate(types):
        if kind == TokenType.BYTE and (value := byte_token_value(tokens[i])) is not None and value < 0x80:
            character = SPACE if value == 0x20 else chr(value)
            if character not in present:
                names[i] = character
    return names


def recover_merges(pieces: dict[str, float]) -> list[tuple[str, str]]:
    """Every way to cut a piece into two pieces, best score first, then the longest left part."""
    merges: list[tuple[str, str]] = []
    for piece in sorted(pieces, key=pieces.__getitem__, reverse=True):
        for at in range(len(piece) - 1, 0, -1):
            if piece[:at] in pieces and piece[at:] in pieces:
                merges.append((piece[:at], piece[at:]))
        if len(merges) > MAX_MERGES:
            raise ModelFileError(f"tokenizer: its tokens can be merged in more than {MAX_MERGES} ways")
    return merges
