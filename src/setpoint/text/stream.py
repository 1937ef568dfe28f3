"""Token ids to text, a few at a time.

Every token is handled once, whatever came before. A character is given out when all its bytes are there, and text
that may begin a stop string when it is known not to; so the pieces joined are what `Tokenizer.decode` gives for all
ids at once, cut at the stop string.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from setpoint.text.stop_strings import StopStrings


class TokenTable(Protocol):
    """What a stream needs of a tokenizer."""

    @property
    def special_ids(self) -> frozenset[int]: ...

    @property
    def space_prefix(self) -> bool: ...

    def token_bytes(self, token_id: int) -> bytes: ...


@dataclass(frozen=True, slots=True)
class TextDelta:
    """New text; `stop` is the stop string that ended the stream, `num_tokens` how many of the ids given count.

    Without a stop that is all of them, with one it is up to the token that completed it.
    """

    text: str
    stop: str | None
    num_tokens: int


class TextStream:
    """The text of one sequence as its tokens arrive.

    `include_stop` keeps the stop string in the text. A stop string completed by one of the first `min_tokens` tokens
    does not count. `continuation` keeps the leading space that `Tokenizer.decode` drops for some models: right for
    text that goes on from a prompt.
    """

    def __init__(
        self,
        tokenizer: TokenTable,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
        continuation: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._drop_space = tokenizer.space_prefix and not continuation
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = StopStrings(stop) if any(stop) else None
        self._pending = ""  # decoded, but may begin a stop string
        self._found: str | None = None

    def push(self, token_ids: Sequence[int], *, final: bool = False, ended: bool = False) -> TextDelta:
        """Add tokens; `final`, in the last call, gives out what is held back. After a stop string nothing comes out.

        `ended`: the last token is the one that ended the sequence. It counts, and is text only with `include_stop`.
        """
        if self._found is not None:
            return TextDelta("", self._found, 0)
        pieces: list[str] = []
        shown = token_ids[:-1] if ended and not self._include_stop else token_ids
        for num_read, token_id in enumerate(shown, start=1):
            self._num_tokens += 1
            if token_id not in self._skipped:
                pieces.append(self._read(self._tokenizer.token_bytes(token_id)))
                if self._found is not None:
                    return TextDelta("".join(pieces), self._found, num_read)
        if final:
            pieces.append(self._read(b"", final=True))
            pieces.append(self._pending)
            self._pending = ""
        return TextDelta("".join(pieces), self._found, len(token_ids if self._found is None else shown))

    def _read(self, token: bytes, *, final: bool = False) -> str:
        """The text that these bytes set free."""
        if self._drop_space and token:
            token = token.removeprefix(b" ")
            self._drop_space = False
        text = self._decoder.decode(token, final)
        if self._stops is None or not text:
            return text
        waiting = self._pending + text
        at = len(self._pending)
        while (found := self._stops.feed(waiting[at:])) is not None:
            stop, num_read = found
            at += num_read
            if self._num_tokens > self._min_tokens:
                self._found = stop
                self._pending = ""
                return waiting[: at if self._include_stop else at - len(stop)]
        keep = len(waiting) - self._stops.num_pending
        self._pending = waiting[keep:]
        return waiting[:keep]
