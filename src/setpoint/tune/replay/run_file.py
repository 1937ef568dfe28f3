"""The raw log of a run: JSON lines, one for the run and one a request, from which every figure can be computed again.

    {"schema": "setpoint.run/1", "window": [0.0, 60.0], "num_requests": 120, "before": {...}, "provenance": {...}, ...}
    {"i": 0, "scheduled": 0.0, "sent": 0.0004, "status": "ok", "deliveries": [[0.021, 1], [0.028, 1]], ...}

Nothing in a file is trusted; errors name the line. Fields with their default are left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from setpoint.errors import ConfigError
from setpoint.tune.measure import OUTCOMES, STATUSES, EngineCounters, MachineUse, RequestLog, Run, Verdict, Window

SCHEMA = "setpoint.run/1"
MAX_LINE_BYTES = 64 << 20
MAX_NUMBER = 1e15
_NAMES = {  # field of RequestLog -> name in the file, where they differ
    "index": "i",
    "scheduled_s": "scheduled",
    "sent_s": "sent",
    "finished_s": "finished",
    "prompt_tokens": "prompt",
    "cached_tokens": "cached",
    "output_tokens": "output",
    "wanted_tokens": "wanted",
    "class_name": "class",
}
_TEXTS = ("class_name", "session", "slo", "error")
_COUNTS = ("index", "prompt_tokens", "cached_tokens", "output_tokens", "wanted_tokens", "turn")


class RunFileError(ConfigError):
    """A log that cannot be read as it is."""


def write_run(run: Run, path: Path) -> None:
    """Whole or not at all. Raises RunFileError when it cannot be written."""
    temporary = path.with_name(path.name + ".part")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for line in run_lines(run):
                file.write(line + "\n")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunFileError(f"{path} cannot be written: {error.strerror}") from None


def run_lines(run: Run) -> Iterator[str]:
    head = {
        "schema": SCHEMA,
        "window": [run.window.begin_s, run.window.end_s],
        "num_requests": run.num_requests,
        "before": asdict(run.before),
        "after": asdict(run.after),
        "preemptions": run.preemptions,
        "machine": None if run.machine is None else asdict(run.machine),
        "clock_skew_s": run.clock_skew_s,
        "is_cut_short": run.is_cut_short,
        "notes": list(run.notes),
        "provenance": run.provenance,
        "verdicts": [asdict(verdict) for verdict in run.verdicts],
    }
    yield json.dumps(head)
    for log in run.logs:
        yield json.dumps(log_document(log))


def log_document(log: RequestLog) -> dict[str, Any]:
    """One request as the file has it."""
    return {
        _NAMES.get(field.name, field.name): getattr(log, field.name)
        for field in fields(RequestLog)
        if getattr(log, field.name) != field.default
    }


def read_run(path: Path) -> Run:
    """Raises RunFileError naming the line."""
    try:
        with path.open("rb") as file:
            documents = [_document(number, line) for number, line in enumerate(file, 1)]
    except OSError as error:
        raise RunFileError(f"{path} cannot be read: {error.strerror}") from None
    if not documents or documents[0].get("schema") != SCHEMA:
        raise RunFileError(f'{path.name}: a log of a run begins with {{"schema": "{SCHEMA}"}}')
    logs = tuple(log_from(document, f"line {number}") for number, document in enumerate(documents[1:], 2))
    return _run(documents[0], logs)


def log_from(document: dict[str, Any], place: str = "the log") -> RequestLog:
    """Raises RunFileError beginning with `place`."""
    ours = {name: field for field, name in _NAMES.items()}
    given = {ours.get(name, name): value for name, value in document.items()}
    known = {field.name for field in fields(RequestLog)}
    if not {"index", "scheduled_s", "sent_s", "status"} <= set(given) <= known:
        raise RunFileError(f"{place}: fields are missing or unknown")
    for name, value in given.items():
        if name in _COUNTS:
            good = type(value) is int and 0 <= value <= MAX_NUMBER
        elif name in _TEXTS:
            good = isinstance(value, str) or (value is None and name in ("session", "slo"))
        elif name == "status":
            good = value in STATUSES
        elif name == "deliveries":
            good = isinstance(value, list | tuple) and all(map(_is_delivery, value))
        else:
            good = _is_time(value) or (value is None and name != "scheduled_s")
        if not good:
            raise RunFileError(f"{place}: {_NAMES.get(name, name)} cannot be {str(value)[:40]!r}")
    given["deliveries"] = tuple((float(moment), count) for moment, count in given.get("deliveries", ()))
    return RequestLog(**given)


def _run(head: dict[str, Any], logs: tuple[RequestLog, ...]) -> Run:
    try:
        begin, end = head["window"]
        verdicts = tuple(Verdict(**verdict) for verdict in head["verdicts"])
        if not (_is_time(begin) and _is_time(end)) or any(verdict.outcome not in OUTCOMES for verdict in verdicts):
            raise ValueError
        return Run(
            logs=logs,
            window=Window(begin, end),
            num_requests=int(head["num_requests"]),
            before=EngineCounters(**head["before"]),
            after=EngineCounters(**head["after"]),
            preemptions=head["preemptions"],
            machine=None if head["machine"] is None else MachineUse(**head["machine"]),
            clock_skew_s=float(head["clock_skew_s"]),
            is_cut_short=bool(head["is_cut_short"]),
            notes=tuple(map(str, head["notes"])),
            provenance=dict(head["provenance"]),
            verdicts=verdicts,
        )
    except (KeyError, TypeError, ValueError):
        raise RunFileError("line 1 is not the head of a run") from None


def _document(number: int, line: bytes) -> dict[str, Any]:
    if len(line) > MAX_LINE_BYTES:
        raise RunFileError(f"line {number} is longer than {MAX_LINE_BYTES >> 20} MiB")
    try:
        document = json.loads(line)
    except (ValueError, RecursionError):
        raise RunFileError(f"line {number} is not JSON") from None
    if not isinstance(document, dict):
        raise RunFileError(f"line {number} is not a JSON object")
    return document


def _is_time(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) <= MAX_NUMBER  # type: ignore[arg-type]


def _is_delivery(value: object) -> bool:
    if not isinstance(value, list | tuple) or len(value) != 2:
        return False
    return _is_time(value[0]) and type(value[1]) is int and 0 <= value[1] <= 1 << 25
