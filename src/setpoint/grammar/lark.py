"""Texts and expressions of clients as Lark writes them, so that nothing in them is notation."""

from __future__ import annotations

import json
import re
from typing import Final

_NOT_IN_SLASHES: Final = re.compile(r"\\.|[/\n\r\x7f]", re.DOTALL)
_ESCAPED: Final = {"/": r"\/", "\n": r"\n", "\r": r"\r", "\x7f": r"\x7f", "\\\n": r"\n"}


def literal(text: str) -> str:
    """A string, which is as JSON writes it, but for the one control character that JSON leaves alone."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", r"\u007f")


def expression(pattern: str) -> str:
    """A regular expression between slashes."""
    return f"/{_NOT_IN_SLASHES.sub(lambda found: _ESCAPED.get(found[0], found[0]), pattern)}/"
