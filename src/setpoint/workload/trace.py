"""The canonical trace: JSON lines, a header and one request a line, in the order of arrival.

    {"schema": "setpoint.trace/1", "source": "...", "licence": "...", "block_size": 16, "scaling": []}
    {"t": 0.0, "in": 812, "out": 120, "hash_ids": [1, 2, 3], "session": "a", "turn": 0, "think": null, "class": "chat"}

`t` is in seconds from the start, `in` and `out` are tokens, `think` is the pause of a session since its last answer.
`hash_ids` names the full blocks of the prompt: an equal id is an equal block behind an equal prefix. Only `t`, `in` and
`out` must be there. A header with `"order": "end"` is of a recording that was not closed: its lines stand in the order
in which requests ended, and the last may be torn. Nothing in a file is trusted; errors name the line.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from setpoint.errors import ConfigError

SCHEMA = "setpoint.trace/1"
MAX_LINE_BYTES = 16 << 20
MAX_TOKENS = 1 << 25
MAX_SECONDS = 1e9
MAX_NAME_CHARS = 128
MAX_HASH_ID = 1 << 63


class TraceError(ConfigError):
    """A trace that cannot be read as it is."""


@dataclass(frozen=True, slots=True)
class TraceHeader:
    source: str
    licence: str = ""
    block_size: int = 16  # tokens that one of the hash_ids stands for
    scaling: tuple[str, ...] = ()  # what was done to the source, in order


@dataclass(frozen=True, slots=True)
class TraceRequest:
    arrival_s: float
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()
    messages: tuple[dict[str, Any], ...] | None = None  # only where text was asked for
    session: str | None = None
    turn: int = 0
    think_s: float | None = None
    class_name: str = ""
    slo: str | None = None


@dataclass(frozen=True, slots=True)
class Trace:
    header: TraceHeader
    requests: list[TraceRequest] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """From the first arrival to the last."""
        return self.requests[-1].arrival_s - self.requests[0].arrival_s if self.requests else 0.0

    @property
    def has_sessions(self) -> bool:
        return any(request.turn > 0 for request in self.requests)


def read_trace(path: Path) -> Trace:
    """Raises TraceError naming the line."""
    try:
        with path.open("rb") as file:
            lines = _lines(file)
            first = next(lines, None)
            if first is None:
                raise TraceError(f"{path.name} is empty; a trace begins with a header line")
            header, is_open = _header(first)
            requests: list[TraceRequest] = []
            for number, document in lines:
                request = _request(number, document, header)
                if not is_open and requests and request.arrival_s < requests[-1].arrival_s:
                    raise TraceError(f"line {number}: t goes back from {requests[-1].arrival_s} to {request.arrival_s}")
                requests.append(request)
    except OSError as error:
        raise TraceError(f"{path} cannot be read: {error.strerror}") from None
    if not requests:
        raise TraceError(f"{path.name} holds no request")
    if is_open:
        requests.sort(key=lambda request: request.arrival_s)
    return Trace(header, requests)


def write_trace(trace: Trace, path: Path) -> None:
    """Whole or not at all. Raises TraceError when it cannot be written."""
    temporary = path.with_name(path.name + ".part")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for line in trace_lines(trace):
                file.write(line + "\n")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise TraceError(f"{path} cannot be written: {error.strerror}") from None


def trace_lines(trace: Trace) -> Iterator[str]:
    yield header_line(trace.header)
    yield from map(request_line, trace.requests)


def header_line(header: TraceHeader, *, is_open: bool = False) -> str:
    """`is_open`: of a recording under way."""
    document: dict[str, Any] = {"schema": SCHEMA, "source": header.source, "licence": header.licence}
    order = {"order": "end"} if is_open else {}
    return json.dumps(document | {"block_size": header.block_size, "scaling": list(header.scaling)} | order)


def request_line(request: TraceRequest) -> str:
    line: dict[str, Any] = {
        "t": round(request.arrival_s, 6),
        "in": request.input_tokens,
        "out": request.output_tokens,
    }
    optional = {
        "hash_ids": list(request.hash_ids) or None,
        "messages": None if request.messages is None else list(request.messages),
        "session": request.session,
        "turn": request.turn or None,
        "think": None if request.think_s is None else round(request.think_s, 6),
        "class": request.class_name or None,
        "slo": request.slo,
    }
    return json.dumps(line | {name: value for name, value in optional.items() if value is not None})


def _lines(file: Iterable[bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
    is_open = False
    for number, line in enumerate(file, 1):
        if is_open and not line.endswith(b"\n"):
            return  # torn: whoever wrote it was killed
        document = json_object(number, line)
        is_open = is_open or (number == 1 and document.get("order") == "end")
        yield number, document


def json_object(number: int, line: str | bytes) -> dict[str, Any]:
    """What a line of JSON lines holds. Raises TraceError naming it."""
    if len(line) > MAX_LINE_BYTES:
        raise TraceError(f"line {number} is longer than {MAX_LINE_BYTES >> 20} MiB")
    try:
        document = json.loads(line)
    except (ValueError, RecursionError):
        raise TraceError(f"line {number} is not JSON") from None
    if not isinstance(document, dict):
        raise TraceError(f"line {number} is not a JSON object")
    return document


def _header(first: tuple[int, dict[str, Any]]) -> tuple[TraceHeader, bool]:
    """And whether it is of a recording that was not closed."""
    number, document = first
    if document.get("schema") != SCHEMA:
        raise TraceError(f'line {number}: a trace begins with {{"schema": "{SCHEMA}"}}; see `setpoint trace import`')
    _known(number, document, ("schema", "source", "licence", "block_size", "scaling", "order"))
    block_size, scaling = document.get("block_size", 16), document.get("scaling", [])
    if not _is_integer(block_size, 1, 1 << 16):
        raise TraceError(f"line {number}: block_size must be an integer in 1..{1 << 16}")
    if not isinstance(scaling, list) or not all(isinstance(step, str) for step in scaling):
        raise TraceError(f"line {number}: scaling must be a list of strings")
    texts = (document.get("source", ""), document.get("licence", ""))
    if not all(isinstance(text, str) for text in texts):
        raise TraceError(f"line {number}: source and licence must be strings")
    order = document.get("order", "arrival")
    if order not in ("arrival", "end"):
        raise TraceError(f'line {number}: order must be "arrival" or "end"')
    return TraceHeader(*texts, block_size, tuple(scaling)), order == "end"


def _request(number: int, document: dict[str, Any], header: TraceHeader) -> TraceRequest:
    _known(number, document, ("t", "in", "out", "hash_ids", "messages", "session", "turn", "think", "class", "slo"))
    for name in ("t", "in", "out"):
        if name not in document:
            raise TraceError(f'line {number}: "{name}" is missing')
    input_tokens, output_tokens = document["in"], document["out"]
    for name, value in (("in", input_tokens), ("out", output_tokens)):
        if not _is_integer(value, 1, MAX_TOKENS):
            raise TraceError(f'line {number}: "{name}" must be an integer in 1..{MAX_TOKENS}')
    hash_ids = document.get("hash_ids", [])
    if not isinstance(hash_ids, list) or not all(_is_integer(i, 0, MAX_HASH_ID) for i in hash_ids):
        raise TraceError(f"line {number}: hash_ids must be a list of integers")
    if len(hash_ids) > -(-input_tokens // header.block_size):
        raise TraceError(f"line {number}: {len(hash_ids)} hash_ids for {input_tokens} tokens")
    turn = document.get("turn", 0)
    if not _is_integer(turn, 0, 1 << 31):
        raise TraceError(f"line {number}: turn must be an integer from 0 on")
    return TraceRequest(
        arrival_s=_seconds(number, document, "t"),
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        hash_ids=tuple(hash_ids),
        messages=_messages(number, document),
        session=_name(number, document, "session"),
        turn=turn,
        think_s=None if document.get("think") is None else _seconds(number, document, "think"),
        class_name=_name(number, document, "class") or "",
        slo=_name(number, document, "slo"),
    )


def _known(number: int, document: dict[str, Any], names: tuple[str, ...]) -> None:
    for name in document:
        if name not in names:
            raise TraceError(f"line {number}: unknown field {name[:64]!r}; known are {', '.join(names)}")


def _is_integer(value: object, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _seconds(number: int, document: dict[str, Any], name: str) -> float:
    value = document[name]
    if type(value) not in (int, float) or not math.isfinite(value) or not 0 <= value <= MAX_SECONDS:
        raise TraceError(f'line {number}: "{name}" must be seconds from 0 on')
    return float(value)


def _name(number: int, document: dict[str, Any], name: str) -> str | None:
    value = document.get(name)
    if value is not None and (not isinstance(value, str) or len(value) > MAX_NAME_CHARS):
        raise TraceError(f"line {number}: {name} must be a string of at most {MAX_NAME_CHARS} characters")
    return value


def _messages(number: int, document: dict[str, Any]) -> tuple[dict[str, Any], ...] | None:
    messages = document.get("messages")
    if messages is None:
        return None
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise TraceError(f"line {number}: messages must be a list of objects")
    return tuple(messages)
