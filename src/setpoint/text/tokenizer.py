"""Text to token ids and back.

Ids become text through bytes: a token stands for exact bytes, a text is the bytes of its tokens joined and read as
UTF-8. Streaming (`text.stream`) does the same a few bytes at a time, so both give the same text by construction.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from setpoint.errors import ModelFileError, RequestError, SetpointError
from setpoint.text.from_file import build_from_file
from setpoint.text.from_metadata import build_from_metadata
from setpoint.text.source import TokenizerFile, TokenizerSource
from setpoint.text.vocabulary import Vocabulary

# Texts on which a backtracking expression of a hostile file would hang or panic; ours take no time.
_PROBES = ("Hello, world! 1234\n", "a" * 64 + "!", " " * 64 + "a", "1" * 64 + "a", "\n" * 64 + "\t", "é漢🙂\u200d" * 8)


class Tokenizer:
    """Safe to use from several threads; build one with `load_tokenizer`."""

    def __init__(self, vocabulary: Vocabulary, *, eos_token_ids: Iterable[int] = ()) -> None:
        self._native = vocabulary.native
        self._to_bytes = vocabulary.to_bytes
        self._verbatim_ids = vocabulary.verbatim_ids
        self._prefix = list(vocabulary.prefix_ids)
        self._suffix = list(vocabulary.suffix_ids)
        self._bytes: dict[int, bytes] = {}  # filled as ids are met
        self.space_prefix = vocabulary.space_prefix
        self.special_ids = vocabulary.special_ids
        self.bos_token_id = vocabulary.bos_id
        own_end = () if vocabulary.eos_id is None else (vocabulary.eos_id,)
        self.eos_token_ids = frozenset(eos_token_ids) | frozenset(own_end)
        self.vocab_size = vocabulary.size
        self.longest_token = vocabulary.longest_token  # bytes, at most

    def __len__(self) -> int:
        return self.vocab_size

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens written in it are read as such.

        `add_special_tokens` frames them with the beginning and end tokens that the model asks for.
        Raises RequestError when `text` holds half a surrogate pair, or defeats the model's splitting expression.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise RequestError("the text is not valid Unicode: it holds half of a surrogate pair") from None
        with _panics_as(RequestError("this text cannot be tokenized by the model's tokenizer")):
            ids = self._native.encode(text)
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True, continuation: bool = False) -> str:
        """The text of `ids`, with U+FFFD for bytes that are not UTF-8; ids without a token give nothing.

        A model that puts a space before every text (Llama 2) has that space dropped again, unless the ids are a
        `continuation` of other text.
        """
        skipped = self.special_ids if skip_special_tokens else frozenset[int]()
        joined = b"".join([self.token_bytes(i) for i in ids if i not in skipped])
        if self.space_prefix and not continuation:
            joined = joined.removeprefix(b" ")
        return joined.decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes the token stands for: possibly part of a character, b"" for an id without a token."""
        known = self._bytes.get(token_id)
        if known is None:
            token = self.id_to_token(token_id)
            if token is None:
                return b""
            known = token.encode("utf-8") if token_id in self._verbatim_ids else self._to_bytes(token)
            self._bytes[token_id] = known
        return known

    def id_to_token(self, token_id: int) -> str | None:
        """The token as the vocabulary writes it."""
        return self._native.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None

    def token_to_id(self, token: str) -> int | None:
        try:
            token.encode("utf-8")
        except UnicodeEncodeError:
            return None
        return self._native.token_to_id(token)


def load_tokenizer(source: TokenizerSource, *, eos_token_ids: Iterable[int] = ()) -> Tokenizer:
    """Build the tokenizer of a model; `eos_token_ids` join the one that the source names.

    Raises ModelFileError when the source is malformed, UnsupportedModelError when its kind is not one we know.
    """
    with _panics_as(ModelFileError("tokenizer: the vocabulary is rejected by the tokenizers library")):
        vocabulary = build_from_file(source) if isinstance(source, TokenizerFile) else build_from_metadata(source)
        tokenizer = Tokenizer(vocabulary, eos_token_ids=eos_token_ids)
    for token_id in tokenizer.eos_token_ids:
        if not 0 <= token_id < tokenizer.vocab_size:
            raise ModelFileError(f"tokenizer: end token id {token_id} is outside the {tokenizer.vocab_size} tokens")
    try:
        for text in _PROBES:
            tokenizer.encode(text)
    except RequestError:
        raise ModelFileError("tokenizer: its splitting expression fails on ordinary text") from None
    return tokenizer


@contextmanager
def _panics_as(error: Exception) -> Iterator[None]:
    """Turn whatever the native library throws into `error`; its panics are not even `Exception`s."""
    try:
        yield
    except SetpointError:
        raise
    except Exception as cause:
        raise error from cause
    except BaseException as cause:
        if type(cause).__name__ != "PanicException":
            raise
        raise error from cause
