"""What an OpenAI-compatible exchange says of its lengths, read beside it: nothing is held back or changed.

Tokens come from `usage` where the answer has it. Without, they are estimated: 4 bytes of UTF-8 text a token, or what
a tokenizer makes of the text. All memory is bounded; an answer that cannot be read has no lengths.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import orjson

BYTES_PER_TOKEN: Final = 4
MAX_EVENT_BYTES: Final = 1 << 20
MAX_ANSWER_BYTES: Final = 16 << 20  # of a body that is no stream, and of the text of one that is
READABLE_ENCODINGS: Final = ("gzip", "deflate", "identity")
Encode = Callable[[str], Sequence[int]]


@dataclass(slots=True)
class AnswerMeter:
    """Fed with the bytes of one answer as they pass. `keeps_text` where a tokenizer will count it."""

    content_type: str
    content_encoding: str
    keeps_text: bool = False
    input_tokens: int = 0  # by `usage`; 0 where it says none
    output_tokens: int = 0
    num_text_bytes: int = 0
    text: list[str] = field(default_factory=list)
    _pending: bytearray = field(default_factory=bytearray)
    _inflate: Any = None
    _is_lost: bool = False  # it cannot be read: too long, or not in an encoding that we know

    def __post_init__(self) -> None:
        encoding = self.content_encoding.strip().lower()
        if encoding in ("gzip", "deflate"):
            self._inflate = zlib.decompressobj(wbits=47 if encoding == "gzip" else 15)
        elif encoding not in ("", "identity"):
            self._is_lost = True

    @property
    def _is_stream(self) -> bool:
        return self.content_type.split(";")[0].strip().lower() == "text/event-stream"

    def feed(self, data: bytes) -> None:
        while data and not self._is_lost:
            piece, data = self._plain(data)
            self._pending += piece
            if self._is_stream:
                self._read_lines()
            if len(self._pending) > (MAX_EVENT_BYTES if self._is_stream else MAX_ANSWER_BYTES):
                self._is_lost = True
        if self._is_lost:
            self._pending.clear()

    def finish(self) -> None:
        """Read what has to be whole; may take long for a long body."""
        if not self._is_stream and not self._is_lost:
            self._read(bytes(self._pending))
        self._pending.clear()

    def _plain(self, data: bytes) -> tuple[bytes, bytes]:
        """Some decompressed bytes, and what is left: a small answer must not become a large one at once."""
        if self._inflate is None:
            return data, b""
        try:
            piece = self._inflate.decompress(data, MAX_EVENT_BYTES)
        except zlib.error:
            self._is_lost = True
            return b"", b""
        return piece, self._inflate.unconsumed_tail

    def _read_lines(self) -> None:
        *lines, rest = self._pending.split(b"\n")
        self._pending = bytearray(rest)
        for line in lines:
            if line.startswith(b"data:"):
                data = bytes(line[5:]).strip()
                if data.startswith(b"{"):
                    self._read(data)

    def _read(self, data: bytes) -> None:
        try:
            document = orjson.loads(data)
        except orjson.JSONDecodeError:
            return
        if not isinstance(document, dict):
            return
        whole = document.get("response")
        self._read_usage(document.get("usage"))
        if isinstance(whole, dict):  # the last event of the responses API
            self._read_usage(whole.get("usage"))
        for text in _texts(document):
            self.num_text_bytes += len(text.encode("utf-8", "replace"))
            if self.keeps_text and self.num_text_bytes <= MAX_ANSWER_BYTES:
                self.text.append(text)

    def _read_usage(self, usage: Any) -> None:
        if isinstance(usage, dict):
            self.input_tokens = _count(usage, "prompt_tokens", "input_tokens") or self.input_tokens
            self.output_tokens = _count(usage, "completion_tokens", "output_tokens") or self.output_tokens


def estimated(num_bytes: int) -> int:
    return -(-num_bytes // BYTES_PER_TOKEN)


@dataclass(frozen=True, slots=True)
class PromptRead:
    """What a body asks for. `turns` are its messages, one by one."""

    text: str
    token_ids: list[int] | None  # where the client sent them
    turns: tuple[bytes, ...]
    session: str | None
    messages: tuple[dict[str, Any], ...]


def read_prompt(body: bytes) -> PromptRead | None:
    """None for what is no single prompt: a list of them, or another kind of request."""
    document = orjson.loads(body)
    if not isinstance(document, dict):
        return None
    session = document.get("session_id")
    session = session if isinstance(session, str) else None
    prompt = document.get("prompt")
    if isinstance(prompt, str):
        return PromptRead(prompt, None, (), session, ({"role": "user", "content": prompt},))
    if isinstance(prompt, list) and prompt and all(type(token) is int and 0 <= token < 1 << 32 for token in prompt):
        return PromptRead("", prompt, (), session, ())
    messages = document.get("messages", document.get("input"))
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages) or not messages:
        return None
    before = [document[name] for name in ("tools", "instructions") if document.get(name)]
    turns = tuple(orjson.dumps(message, option=orjson.OPT_SORT_KEYS) for message in messages)
    parts = [part if isinstance(part, str) else orjson.dumps(part).decode() for part in before]
    parts += [f"{message.get('role', '')}\n{_content(message)}\n" for message in messages]
    return PromptRead("".join(parts), None, turns, session, tuple(messages))


def _content(message: dict[str, Any]) -> str:
    content = message.get("content")
    calls = message.get("tool_calls")
    text = content if isinstance(content, str) else "" if content is None else orjson.dumps(content).decode()
    return text + (orjson.dumps(calls).decode() if calls else "")


def _texts(document: dict[str, Any]) -> list[str]:
    """The generated text of an answer, or of one event of it."""
    found: list[Any] = []
    choices = document.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        if not isinstance(choice, dict):
            continue
        found.append(choice.get("text"))
        for part in (choice.get("delta"), choice.get("message")):
            if isinstance(part, dict):
                found += [part.get(name) for name in ("content", "reasoning_content", "reasoning", "refusal")]
                found += _arguments(part.get("tool_calls"))
    if str(document.get("type", "")).endswith("_text.delta"):
        found.append(document.get("delta"))
    return [text for text in found if isinstance(text, str)]


def _arguments(calls: Any) -> list[Any]:
    calls = calls if isinstance(calls, list) else []
    functions = [call.get("function") for call in calls if isinstance(call, dict)]
    return [
        function.get(name) for function in functions if isinstance(function, dict) for name in ("name", "arguments")
    ]


def _count(usage: dict[str, Any], *names: str) -> int:
    values = (usage.get(name) for name in names)
    return next((value for value in values if type(value) is int and value > 0), 0)
