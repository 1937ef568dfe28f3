"""The study of a tuning: one JSON line a run, failed and invalid ones too, written as they end.

A tuning is a function of what its runs gave. So resuming one means reading the lines instead of running: the same
questions come in the same order. The head says what was asked for; another question is another study.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from setpoint.errors import ConfigError
from setpoint.tune.search.trial import Ask, Observation, Share, document

SCHEMA = "setpoint.study/1"
MAX_LINE_BYTES = 1 << 20
MAX_LINES = 100_000
_TUPLES = ("scores", "ttft_ms", "tpot_ms")


class StudyError(ConfigError):
    """A study that cannot be read, or is of another tuning."""


class Study:
    """`path` None keeps nothing on disk."""

    def __init__(self, path: Path | None, head: dict[str, Any], *, resume: bool = False) -> None:
        self.path = path
        self.head = {"schema": SCHEMA, **head}
        self.lines: list[tuple[Ask, Observation]] = []
        self._known: dict[str, Observation] = {}
        if path is None:
            return
        if resume and path.exists():
            self._read(path)
        elif path.exists() and not resume:
            raise StudyError(f"{path} exists; give --resume to go on with it, or remove it")
        self._rewrite(path)

    def find(self, ask: Ask) -> Observation | None:
        return self._known.get(_key(ask))

    def add(self, ask: Ask, seen: Observation) -> None:
        """On disk when this returns."""
        self.lines.append((ask, seen))
        self._known[_key(ask)] = seen
        if self.path is not None:
            with self.path.open("ab") as file:
                file.write((json.dumps(document(ask, seen)) + "\n").encode())
                file.flush()
                os.fsync(file.fileno())

    def _rewrite(self, path: Path) -> None:
        """The head and what is known, whole or not at all: a torn last line goes."""
        temporary = path.with_name(path.name + ".part")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(json.dumps(self.head) + "\n")
                file.writelines(json.dumps(document(ask, seen)) + "\n" for ask, seen in self.lines)
            temporary.replace(path)
        except OSError as error:
            raise StudyError(f"{path} cannot be written: {error.strerror}") from None

    def _read(self, path: Path) -> None:
        head, runs = read_study(path)
        if head != self.head:
            names = [name for name in self.head if head.get(name) != self.head[name]]
            raise StudyError(f"{path.name} is of another tuning ({', '.join(names) or 'no head'} differ)")
        for ask, seen in runs:
            self.lines.append((ask, seen))
            self._known[_key(ask)] = seen


def read_study(path: Path) -> tuple[dict[str, Any], list[tuple[Ask, Observation]]]:
    """The head and the runs of a study. A last line without its end was being written when the run ended."""
    try:
        rows = path.read_bytes().split(b"\n")
    except OSError as error:
        raise StudyError(f"{path} cannot be read: {error.strerror}") from None
    if len(rows) > MAX_LINES or any(len(row) > MAX_LINE_BYTES for row in rows):
        raise StudyError(f"{path.name} is too large for a study")
    whole = rows[:-1]
    head = _json(whole[0], 1) if whole else {}
    return head, [_line(_json(row, number), number) for number, row in enumerate(whole[1:], 2)]


def _key(ask: Ask) -> str:
    return json.dumps(asdict(ask), sort_keys=True)


def _json(row: bytes, number: int) -> dict[str, Any]:
    try:
        found = json.loads(row)
    except (ValueError, RecursionError):
        raise StudyError(f"line {number} of the study is not JSON") from None
    if not isinstance(found, dict):
        raise StudyError(f"line {number} of the study is not a JSON object")
    return found


def _line(row: dict[str, Any], number: int) -> tuple[Ask, Observation]:
    try:
        asked, seen = dict(row["ask"]), dict(row["seen"])
        asked["setting"] = tuple((str(knob), value) for knob, value in asked["setting"])
        seen["shares"] = {str(name): Share(**share) for name, share in seen["shares"].items()}
        for name in _TUPLES:
            seen[name] = tuple(map(float, seen[name]))
        if set(seen) != {declared.name for declared in fields(Observation)}:
            raise ValueError
        return Ask(**asked), Observation(**seen)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise StudyError(f"line {number} of the study is not a run") from None
