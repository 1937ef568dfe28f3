"""An answer as it comes in: server-sent events, when each brought how many tokens, and what the end of it was.

Tokens of an event are what the server says (a running count in `usage`, or `token_ids`); where it says neither, an
event with text is one token. The usage at the end has the last word on the sum, and `RequestLog` keeps both.
"""

from __future__ import annotations

from typing import Any

import orjson

from setpoint.tune.measure import Status

MAX_ERROR_BYTES = 1 << 14
MAX_LINE_BYTES = 64 << 20
_REJECTED = (429, 503)
_TIMED_OUT = (408, 504)


class Answer:
    """Fed by `Connections.exchange`; times are seconds since `origin`."""

    def __init__(self, origin: float) -> None:
        self.deliveries: list[tuple[float, int]] = []
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.error = ""
        self.is_whole = False  # the server has said that this was all
        self._origin = origin
        self._counted = 0
        self._total: int | None = None  # output tokens by the server's count
        self._rest = b""
        self._refusal = b""

    @property
    def output_tokens(self) -> int:
        return self._counted if self._total is None else self._total

    def feed(self, status: int, body: bytes, now: float) -> None:
        if status != 200:
            self._refusal += body[: MAX_ERROR_BYTES - len(self._refusal)]
            return
        lines = (self._rest + body).split(b"\n")
        self._rest = lines.pop()
        if len(self._rest) > MAX_LINE_BYTES:
            self.error, self._rest = "an event that does not end", b""
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), now - self._origin)

    def outcome(self, status: int, wanted_tokens: int, is_forced: bool) -> tuple[Status, str]:
        """What became of the request, and in words."""
        if status in _REJECTED:
            return "rejected", self._said(status)
        if status in _TIMED_OUT:
            return "timeout", self._said(status)
        if status != 200:
            return "error", self._said(status)
        if self.error:
            return "error", self.error
        if not self.is_whole or not self.deliveries:
            return "error", "the answer broke off" if self.deliveries else "an answer without tokens"
        if is_forced and self.output_tokens < wanted_tokens:
            return "short", f"{self.output_tokens} of {wanted_tokens} tokens"
        return "ok", ""

    def _event(self, data: bytes, at_s: float) -> None:
        if data == b"[DONE]":
            self.is_whole = True
            return
        try:
            event = orjson.loads(data)
            if event.get("error"):
                self.error = message_of(event)
                return
            self._usage(event.get("usage"))
            tokens = 0
            for choice in event.get("choices") or ():
                tokens += _tokens(choice)
                self.is_whole = self.is_whole or choice.get("finish_reason") is not None
        except (ValueError, TypeError, AttributeError, KeyError):
            self.error = f"not an event of this API: {data[:80]!r}"
            return
        running = self._total
        if running is not None and event.get("choices"):
            tokens = running - self._counted
        if tokens > 0:
            self._counted += tokens
            self.deliveries.append((at_s, tokens))

    def _usage(self, usage: dict[str, Any] | None) -> None:
        if not usage:
            return
        self._total = int(usage["completion_tokens"])
        self.prompt_tokens = int(usage.get("prompt_tokens") or 0)
        details = usage.get("prompt_tokens_details") or {}
        self.cached_tokens = int(details.get("cached_tokens") or 0)

    def _said(self, status: int) -> str:
        try:
            return f"{status}: {message_of(orjson.loads(self._refusal))}"
        except ValueError:
            return f"{status}: {self._refusal[:200].decode('utf-8', 'replace')}"


def _tokens(choice: dict[str, Any]) -> int:
    """As far as the choice alone tells."""
    if choice.get("token_ids"):
        return len(choice["token_ids"])
    delta = choice.get("delta") or {}
    has_text = choice.get("text") or delta.get("content") or delta.get("reasoning") or delta.get("reasoning_content")
    return 1 if has_text else 0


def message_of(document: Any) -> str:
    """What an error body says, whichever of the usual shapes it has."""
    error = document.get("error", document) if isinstance(document, dict) else document
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or error
    return " ".join(str(error).split())[:300]
