"""A model's tokens as a grammar sees them: bytes of text, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from setpoint.errors import RequestError
from setpoint.text.tokenizer import Tokenizer

MAX_REMEMBERED = 4096
MAX_REMEMBERED_CHARS = 256


class GrammarVocabulary:
    """`size` is the width of the logits. Special and end tokens are no text, nor are ids that the tokenizer lacks."""

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        self.size = size
        self.mask_bytes = -(-size // 32) * 4
        self.no_tokens = bytes(self.mask_bytes)
        no_text = tokenizer.special_ids | tokenizer.eos_token_ids
        known = min(size, len(tokenizer))
        texts = [b"" if token in no_text else tokenizer.token_bytes(token) for token in range(known)]
        self.texts = texts + [b""] * (self.mask_bytes * 8 - known)
        self.text_bits = int("".join("1" if text else "0" for text in reversed(self.texts)), 2)  # bit i: token i
        self._tokenizer = tokenizer
        self._remembered: dict[str, Sequence[int]] = {}

    def is_text(self, token: int) -> bool:
        return 0 <= token < self.size and self.texts[token] != b""

    def encoder(self, otherwise: Callable[[str], Sequence[int]]) -> Callable[[str], Sequence[int]]:
        """How the model is used to see a text; `otherwise` where the tokenizer would read more into it than text.

        Forced texts come again and again: the keys of a schema, for every object.
        """

        def encode(text: str) -> Sequence[int]:
            known = self._remembered.get(text)
            if known is not None:
                return known
            try:
                ids: Sequence[int] = self._tokenizer.encode(text, add_special_tokens=False)
            except RequestError:
                ids = ()
            if max(ids, default=self.size) >= self.size or b"".join(self.texts[i] for i in ids) != text.encode():
                ids = otherwise(text)
            if len(text) <= MAX_REMEMBERED_CHARS:
                if len(self._remembered) >= MAX_REMEMBERED:
                    self._remembered.clear()
                self._remembered[text] = ids
            return ids

        return encode
