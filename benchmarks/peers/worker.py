"""An engine in a process of its own, as the driver sees it (the other side is benchmarks/workers/protocol.py)."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WORKERS = Path(__file__).parents[1] / "workers"


class WorkerDied(Exception):
    """With the last lines the worker wrote."""


class Worker:
    def __init__(
        self, python: Path, script: str, arguments: list[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self._log = log
        with log.open("w") as stream:
            self._process = subprocess.Popen(
                [python, WORKERS / script, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
                env=None if environment is None else dict(environment),
            )
        self.about = self._read()

    def ask(self, do: str, **question: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            print(json.dumps({"do": do, **question}), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            self._fail()
        return self._read()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._fail()
        return dict(json.loads(line))

    def _fail(self) -> None:
        self._process.wait()
        lines = self._log.read_text(errors="replace").strip().splitlines()
        raise WorkerDied("\n".join(lines[-3:]) or f"exit status {self._process.returncode}")
