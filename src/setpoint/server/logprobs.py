"""Log-probabilities in the wire forms: chat's list of entries, completions' parallel lists, prompt dictionaries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from setpoint.engine.events import TokenLogprob
from setpoint.text.tokenizer import Tokenizer

_LOWEST = -9999.0  # JSON has no infinity; the value vLLM sends for a banned token


class LogprobWriter:
    """Names tokens for one request. `tokens_as_ids` writes `token_id:N`, which is unambiguous."""

    def __init__(self, tokenizer: Tokenizer, *, tokens_as_ids: bool = False) -> None:
        self._tokenizer = tokenizer
        self._tokens_as_ids = tokens_as_ids

    def name(self, token_id: int) -> str:
        if self._tokens_as_ids:
            return f"token_id:{token_id}"
        return self._tokenizer.token_bytes(token_id).decode("utf-8", "replace")

    def _legacy_name(self, token_id: int) -> str:
        """As `name`, but a token that is part of a character is written like OpenAI does: names are dictionary keys."""
        if self._tokens_as_ids:
            return self.name(token_id)
        token = self._tokenizer.token_bytes(token_id)
        try:
            return token.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)

    def chat(self, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        """`choices[].logprobs` of chat completions."""
        return {"content": [self._chat_entry(entry) for entry in entries]}

    def _chat_entry(self, entry: TokenLogprob) -> dict[str, Any]:
        top = zip(entry.top_ids, entry.top_logprobs, strict=True)
        return {
            **self._chat_token(entry.token_id, entry.logprob),
            "top_logprobs": [self._chat_token(token_id, logprob) for token_id, logprob in top],
        }

    def _chat_token(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self.name(token_id),
            "logprob": finite(logprob),
            "bytes": list(self._tokenizer.token_bytes(token_id)),
        }

    def completion(self, entries: Sequence[TokenLogprob | None], token_ids: Sequence[int], offset: int) -> Legacy:
        """`choices[].logprobs` of completions. `offset` is the place of the first token in the choice's text."""
        legacy = Legacy()
        for entry, token_id in zip(entries, token_ids, strict=True):
            name = self._legacy_name(token_id)
            legacy.tokens.append(name)
            legacy.text_offset.append(offset)
            offset += len(self._tokenizer.token_bytes(token_id).decode("utf-8", "replace"))
            if entry is None:
                legacy.token_logprobs.append(None)
                legacy.top_logprobs.append(None)
            else:
                top = dict(zip(map(self._legacy_name, entry.top_ids), map(finite, entry.top_logprobs), strict=True))
                top.setdefault(name, finite(entry.logprob))
                legacy.token_logprobs.append(finite(entry.logprob))
                legacy.top_logprobs.append(top)
        legacy.end = offset
        return legacy

    def prompt(self, entries: Sequence[TokenLogprob | None]) -> list[dict[str, Any] | None]:
        """`prompt_logprobs`, as in vLLM: one dictionary from token id to value per prompt token, null for the first."""
        return [None if entry is None else self._prompt_entry(entry) for entry in entries]

    def _prompt_entry(self, entry: TokenLogprob) -> dict[str, Any]:
        ranked = [(i, lp, rank) for rank, (i, lp) in enumerate(zip(entry.top_ids, entry.top_logprobs, strict=True), 1)]
        if entry.token_id not in entry.top_ids:
            ranked.append((entry.token_id, entry.logprob, entry.rank))
        return {
            str(token_id): {"logprob": finite(logprob), "rank": rank, "decoded_token": self.name(token_id)}
            for token_id, logprob, rank in ranked
        }


class Legacy:
    """The parallel lists, and where the text goes on."""

    def __init__(self) -> None:
        self.tokens: list[str] = []
        self.token_logprobs: list[float | None] = []
        self.top_logprobs: list[dict[str, float] | None] = []
        self.text_offset: list[int] = []
        self.end = 0

    def extend(self, other: Legacy) -> None:
        self.tokens += other.tokens
        self.token_logprobs += other.token_logprobs
        self.top_logprobs += other.top_logprobs
        self.text_offset += other.text_offset
        self.end = other.end

    def body(self) -> dict[str, Any]:
        return {
            "text_offset": self.text_offset,
            "token_logprobs": self.token_logprobs,
            "tokens": self.tokens,
            "top_logprobs": self.top_logprobs,
        }


def finite(logprob: float) -> float:
    return logprob if logprob > _LOWEST else _LOWEST
