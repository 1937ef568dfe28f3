"""What bytes a vocabulary entry stands for.

Byte-level BPE writes each byte as one printable character (GPT-2's alphabet); SentencePiece writes a space as '▁'
and a byte it has no character for as '<0xNN>'.
"""

from __future__ import annotations

import re
from collections.abc import Callable

TokenToBytes = Callable[[str], bytes]

SPACE = "▁"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_alphabet() -> dict[str, int]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    # The others, in order, take the characters from U+0100 on.
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_ALPHABET = _byte_alphabet()


def byte_level_bytes(token: str) -> bytes:
    """The bytes of a byte-level token; one with a character outside the alphabet stands for its own text."""
    try:
        return bytes([BYTE_ALPHABET[character] for character in token])
    except KeyError:
        return verbatim_bytes(token)


def sentencepiece_bytes(token: str) -> bytes:
    value = byte_token_value(token)
    return bytes([value]) if value is not None else spaced_bytes(token)


def spaced_bytes(token: str) -> bytes:
    """SentencePiece without byte tokens."""
    return verbatim_bytes(token.replace(SPACE, " "))


def verbatim_bytes(token: str) -> bytes:
    return token.encode("utf-8")


def byte_token_value(token: str) -> int | None:
    """0..255 for '<0xNN>', None for any other text."""
    match = _BYTE_TOKEN.fullmatch(token)
    return int(match.group(1), 16) if match else None
