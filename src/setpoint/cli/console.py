"""What every command prints with: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

# Control characters shown as pictures of themselves: what a model or a file says must not steer a terminal.
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_PICTURES |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def command_app(help: str) -> typer.Typer:
    """A Typer application with the house rules: plain help (no rich import), no traceback art."""
    return typer.Typer(
        help=help,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        add_completion=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def printable(text: str) -> str:
    """`text` without the power to move a cursor or change a title; newlines and tabs stay."""
    return text.translate(_PICTURES)


def print_json(document: Any) -> None:
    print(json.dumps(document, ensure_ascii=False, default=str))


def write_text(piece: str) -> None:
    """Text of a model, at once: as it is into a file or pipe, harmless on a terminal."""
    sys.stdout.write(printable(piece) if sys.stdout.isatty() else piece)
    sys.stdout.flush()


def say(message: str) -> None:
    """A line for the person who waits."""
    print(printable(message), file=sys.stderr, flush=True)


def status(message: str) -> None:
    """Say what takes time."""
    say(f"setpoint: {message} ...")


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
            self._print_tenths(label, done, total)
            return
        if self._progress is None:
            self._progress = _terminal_bar()
            self._progress.start()
        if label not in self._tasks:
            self._tasks[label] = self._progress.add_task(printable(label), total=total)
        self._progress.update(self._tasks[label], completed=done, total=total)

    def _print_tenths(self, label: str, done: int, total: int) -> None:
        tenth = done * 10 // max(total, 1)
        if self._announced.get(label) != tenth:
            self._announced[label] = tenth
            say(f"downloading {label}: {done / 1e6:.0f} of {total / 1e6:.0f} MB")


class RequestBar:
    """How many of the requests of a run are answered; a line now and then when stderr is no terminal."""

    def __init__(self, total: int, what: str = "") -> None:
        self._total = total
        self._what = what
        self._tenth = -1
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> RequestBar:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[state]}", markup=False),
                TimeElapsedColumn(),
                console=Console(stderr=True, highlight=False),
                refresh_per_second=4,  # it shares the CPUs with what it measures
            )
            self._task = self._progress.add_task(printable(self._what), total=self._total, state="")
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def __call__(self, sent: int, done: int, missed: int) -> None:
        state = f"{sent - done} in flight" + (f", {missed} missed" if missed else "")
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, state=state)
            return
        tenth = done * 10 // max(self._total, 1)
        if tenth != self._tenth:
            self._tenth = tenth
            say(f"{self._what}: {done} of {self._total} requests, {state}")


def _terminal_bar() -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    return Progress(
        TextColumn("downloading {task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True, highlight=False),
    )
