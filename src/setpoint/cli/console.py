"""What every command prints with: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

diagnostics = Console(stderr=True, highlight=False)


def command_app(help: str) -> typer.Typer:
    """A Typer application with the house rules: plain help (no rich import), no traceback art."""
    return typer.Typer(help=help, rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)


def print_json(document: Any) -> None:
    print(json.dumps(document, ensure_ascii=False, default=str))


class DownloadBar:
    """A progress bar that appears when a download begins; plain lines when stderr is no terminal."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._announced: dict[str, int] = {}

    def __enter__(self) -> DownloadBar:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def __call__(self, label: str, done: int, total: int) -> None:
        if not sys.stderr.isatty():
            tenth = done * 10 // max(total, 1)
            if self._announced.get(label) != tenth:
                self._announced[label] = tenth
                print(f"downloading {label}: {done / 1e6:.0f} of {total / 1e6:.0f} MB", file=sys.stderr, flush=True)
            return
        if self._progress is None:
            self._progress = Progress(
                TextColumn("downloading {task.description}"),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=diagnostics,
            )
            self._progress.start()
        if label not in self._tasks:
            self._tasks[label] = self._progress.add_task(label, total=total)
        self._progress.update(self._tasks[label], completed=done)


def status(message: str) -> None:
    """Say what takes time."""
    print(f"setpoint: {message} ...", file=sys.stderr, flush=True)
