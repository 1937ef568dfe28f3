"""The lines of the table that are not tokens a second: starts and overhead, measured by scripts of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers.rows import ONE_AND_A_HALF
from random_models import random_model

BENCHMARKS = Path(__file__).parents[1]
SMALL = "smollm2-135m"


@dataclass(frozen=True, slots=True)
class ScriptRow:
    """`goal` is the most that `value` of the script's document may be, `theirs` what the rival needs."""

    name: str
    script: str
    unit: str
    goal: float | None
    value: Callable[[dict[str, Any]], float]
    theirs: Callable[[dict[str, Any]], float] | None = None


def _start(model: int, name: str) -> Callable[[dict[str, Any]], float]:
    return lambda document: document["models"][model]["median_s"][name]


def _readings(state: str) -> Callable[[dict[str, Any]], float]:
    """Seconds to ready, in readings of the file in the same state."""
    return lambda document: _start(1, f"serve {state}, ready")(document) / _start(1, f"read {state}")(document)


def _over_native(level: str) -> Callable[[dict[str, Any]], float]:
    return lambda document: 100 * document["over_native"][level]


SCRIPT_ROWS = (
    ScriptRow("start to first token", "startup", "s", 0.7, _start(0, "generate cached"), _start(0, "llama.cpp cached")),
    ScriptRow("start to first answer over HTTP", "startup", "s", None, _start(0, "serve cached")),
    ScriptRow("unseen 1 GB GGUF to ready, on disk", "startup", "× reading it", 2.0, _readings("unread")),
    ScriptRow(
        "unseen 1 GB GGUF to first token, on disk",
        "startup",
        "s",
        None,
        _start(1, "generate unread"),
        _start(1, "llama.cpp unread"),
    ),
    ScriptRow(
        "unseen 1 GB GGUF to first token, in memory",
        "startup",
        "s",
        None,
        _start(1, "generate unseen"),
        _start(1, "llama.cpp unseen"),
    ),
    ScriptRow("overhead of runner and engine", "overhead", "% of the step", 5.0, _over_native("engine")),
    ScriptRow("overhead with the server", "overhead", "% of the step", 5.0, _over_native("raw client")),
    ScriptRow(
        "overhead with the server and the openai client",
        "overhead",
        "% of the step",
        None,
        _over_native("openai client"),
    ),
)


def measure(rows: Sequence[ScriptRow], repeat: int, llama_cpp_python: Path) -> dict[str, Any]:
    """Runs the scripts that the rows need, each once; rows and the scripts' documents."""
    arguments = {
        "startup": ["--models", SMALL, str(random_model(ONE_AND_A_HALF)), "--states", "cached", "unread", "unseen"],
        "overhead": ["--model", SMALL],
    }
    arguments["startup"] += ["--rounds", str(repeat), "--rival-python", str(llama_cpp_python)]
    arguments["overhead"] += ["--repeat", str(repeat)]
    documents = {}
    for script in dict.fromkeys(row.script for row in rows):
        command = [sys.executable, str(BENCHMARKS / f"{script}.py"), *arguments[script]]
        ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        documents[script] = json.loads(ran.stdout.splitlines()[-1])
    return {"rows": [row_document(row, documents[row.script]) for row in rows], "documents": documents}


def row_document(row: ScriptRow, document: dict[str, Any]) -> dict[str, Any]:
    value = row.value(document)
    return {
        "name": row.name,
        "unit": row.unit,
        "value": float(f"{value:.3g}"),
        "theirs": None if row.theirs is None else float(f"{row.theirs(document):.3g}"),
        "goal": row.goal,
        "passes": None if row.goal is None else value <= row.goal,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        verdict = {None: "", True: "pass", False: "MISS"}[row["passes"]]
        goal = "" if row["goal"] is None else f"goal {row['goal']:g}"
        theirs = "" if row["theirs"] is None else f"llama.cpp {row['theirs']:g}"
        lines.append(f"{row['name']:<44}{row['value']:>7.3g} {row['unit']:<14}{goal:<10}{verdict:<6}{theirs}".rstrip())
    return "\n".join(lines)
