"""Public trace formats, read into the canonical one. Rows that tell of no served request are counted and left out.

azure     CSV: TIMESTAMP, ContextTokens, GeneratedTokens          (AzurePublicDataset, 2023 and 2024)
burstgpt  CSV: Timestamp, Model, Request tokens, Response tokens  (BurstGPT; failures have 0 response tokens)
mooncake  JSONL: timestamp (ms), input_length, output_length, hash_ids of 512 tokens
bailian   JSONL: the same with chat_id, parent_chat_id, turn and timestamp in s; hash_ids of 16 tokens
openai    JSONL of request and response pairs: {"time", "request": {...}, "response": {"usage": {...}}}
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from setpoint.workload.trace import MAX_TOKENS, Trace, TraceError, TraceHeader, TraceRequest, json_object

_Row = TraceRequest | None  # None: left out


def import_trace(path: Path, format_name: str) -> tuple[Trace, int]:
    """The trace, beginning at 0, and how many rows were left out. Raises TraceError naming the line."""
    if format_name not in FORMATS:
        raise TraceError(f"no format {format_name[:64]!r}; choose one of {', '.join(FORMATS)}")
    read, block_size, licence = FORMATS[format_name]
    requests: list[TraceRequest] = []
    skipped = 0
    try:
        with path.open(encoding="utf-8", errors="strict", newline="") as file:
            for row in read(file):
                if row is None:
                    skipped += 1
                else:
                    requests.append(row)
    except OSError as error:
        raise TraceError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise TraceError(f"{path.name} is not UTF-8 text") from None
    if not requests:
        raise TraceError(f"{path.name} holds no request in the {format_name} format")
    requests.sort(key=lambda request: request.arrival_s)
    begin = requests[0].arrival_s
    moved = [replace(request, arrival_s=request.arrival_s - begin) for request in requests]
    return Trace(TraceHeader(f"{format_name}: {path.name}", licence, block_size), moved), skipped


def _csv(file: Iterable[str], names: tuple[str, ...]) -> Iterator[tuple[int, list[str]]]:
    """Line numbers and the named columns of each row."""
    reader = csv.reader(file)
    try:
        header = [name.strip() for name in next(reader, [])]
        missing = [name for name in names if name not in header]
        if missing:
            raise TraceError(f"line 1: no column {missing[0]!r}")
        columns = [header.index(name) for name in names]
        for row in reader:
            if not row:
                continue
            if len(row) < len(header):
                raise TraceError(f"line {reader.line_num}: {len(row)} columns instead of {len(header)}")
            yield reader.line_num, [row[column] for column in columns]
    except csv.Error as error:
        raise TraceError(f"line {reader.line_num}: {error}") from None


def _azure(file: Iterable[str]) -> Iterator[_Row]:
    for number, (stamp, num_in, num_out) in _csv(file, ("TIMESTAMP", "ContextTokens", "GeneratedTokens")):
        try:
            moment = datetime.fromisoformat(stamp[:26].strip())  # seven digits of a second are one too many
        except ValueError:
            raise TraceError(f"line {number}: {stamp[:40]!r} is not a time") from None
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        yield _made(number, moment.timestamp(), num_in, num_out)


def _burstgpt(file: Iterable[str]) -> Iterator[_Row]:
    for number, (stamp, num_in, num_out) in _csv(file, ("Timestamp", "Request tokens", "Response tokens")):
        yield _made(number, stamp, num_in, num_out)


def _json_lines(file: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            yield number, json_object(number, line)


def _mooncake(file: Iterable[str]) -> Iterator[_Row]:
    for number, row in _json_lines(file):
        made = _made(number, row.get("timestamp"), row.get("input_length"), row.get("output_length"))
        yield made and replace(made, arrival_s=made.arrival_s / 1000, hash_ids=_hash_ids(number, row))


def _bailian(file: Iterable[str]) -> Iterator[_Row]:
    roots: dict[int, str] = {}  # chat -> the session's first chat
    for number, row in _json_lines(file):
        made = _made(number, row.get("timestamp"), row.get("input_length"), row.get("output_length"))
        chat, parent = row.get("chat_id"), row.get("parent_chat_id", -1)
        if type(chat) is not int or type(parent) is not int:
            raise TraceError(f"line {number}: chat_id and parent_chat_id must be integers")
        session = roots[chat] = roots.get(parent, str(chat))
        turn = row.get("turn", 1)
        if type(turn) is not int or turn < 1:
            raise TraceError(f"line {number}: turn must be an integer from 1 on")
        kind = str(row.get("type", ""))[:64]
        yield made and replace(made, hash_ids=_hash_ids(number, row), session=session, turn=turn - 1, class_name=kind)


def _openai(file: Iterable[str]) -> Iterator[_Row]:
    for number, row in _json_lines(file):
        response = row.get("response")
        usage = response.get("usage") if isinstance(response, dict) else None
        if not isinstance(usage, dict):
            yield None  # a request that failed
            continue
        num_in = usage.get("prompt_tokens", usage.get("input_tokens"))
        num_out = usage.get("completion_tokens", usage.get("output_tokens"))
        yield _made(number, row.get("time"), num_in, num_out)


def _made(number: int, time: Any, num_in: Any, num_out: Any) -> _Row:
    """None for a request without prompt or answer."""
    try:
        seconds, inputs, outputs = float(time), int(num_in), int(num_out)
    except (TypeError, ValueError, OverflowError):
        raise TraceError(f"line {number}: time and token counts must be numbers") from None
    if not abs(seconds) < 1e12 or not 0 <= inputs <= MAX_TOKENS or not 0 <= outputs <= MAX_TOKENS:
        raise TraceError(f"line {number}: a number is out of range")
    return TraceRequest(seconds, inputs, outputs) if inputs and outputs else None


def _hash_ids(number: int, row: dict[str, Any]) -> tuple[int, ...]:
    ids = row.get("hash_ids", [])
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < 1 << 63 for i in ids):
        raise TraceError(f"line {number}: hash_ids must be a list of integers from 0 on")
    return tuple(ids)


_Read = Callable[[Iterable[str]], Iterator[_Row]]
FORMATS: dict[str, tuple[_Read, int, str]] = {  # name -> (reader, block size, licence of the public data set)
    "azure": (_azure, 16, "CC-BY-4.0"),
    "burstgpt": (_burstgpt, 16, "CC-BY-4.0"),
    "mooncake": (_mooncake, 512, "Apache-2.0"),
    "bailian": (_bailian, 16, "Apache-2.0"),
    "openai": (_openai, 16, ""),
}
