"""How a forbidden word may come out of a model: its token sequences."""

from __future__ import annotations

from collections.abc import Iterable

from setpoint.text.tokenizer import Tokenizer


def spellings(tokenizer: Tokenizer, words: Iterable[str]) -> list[list[int]]:
    """The token sequences of each word at the start of a text and after a space (`bad_words_token_ids`)."""
    found: list[list[int]] = []
    for word in words:
        for text in (word, " " + word.lstrip(" ")):
            ids = tokenizer.encode(text, add_special_tokens=False)
            if ids and ids not in found:
                found.append(ids)
    return found
