"""Prompts for speculation, from real text: this repository's own code and documents.

Each workload is a list of conversations that want different things of the same kind, as (messages, temperature).
"""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
Messages = list[dict[str, str]]

SUBJECTS = (
    *("a lighthouse keeper", "the first train through the mountains", "a violin maker", "a city without cars"),
    *("the winter market", "a letter that came too late", "two rival bakers", "an old telescope", "a flooded library"),
    *("the last day of school", "a sailor's garden", "the clock tower", "a chess game in the park", "a lost dog"),
    *("the night shift at a hospital", "an island of goats"),
)


@dataclass(frozen=True, slots=True)
class Workload:
    name: str
    conversations: list[Messages]
    temperature: float = 0.0
    goal: float = 0.98  # the least speed-up at batch 1


def workloads(count: int) -> list[Workload]:
    return [
        Workload("repeating data", _taken(_data(), count), goal=1.5),
        Workload("code editing", _taken(_edits(), count), goal=1.5),
        Workload("quoting sources", _taken(_quotes(), count), goal=1.5),
        Workload("agent tool loop", _taken(_tool_loops(), count), goal=2.5),
        Workload("free prose", [_story(subject) for subject in SUBJECTS[:count]], temperature=0.8),
    ]


def _taken(made: Iterator[Messages], count: int) -> list[Messages]:
    found = [messages for messages, _ in zip(made, range(count), strict=False)]
    assert len(found) == count, "too little text"
    return found


def _story(subject: str) -> Messages:
    return [{"role": "user", "content": f"Write a story of about 200 words about {subject}."}]


def _functions() -> Iterator[tuple[str, str]]:
    """Path and text of top-level definitions of 15 to 45 lines, one a file."""
    for path in sorted((ROOT / "src").rglob("*.py")):
        text = path.read_text()
        for node in ast.parse(text).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.end_lineno is not None:
                lines = text.splitlines()[node.lineno - 1 : node.end_lineno]
                if 15 <= len(lines) <= 45:
                    yield str(path.relative_to(ROOT)), "\n".join(lines)
                    break


def _edits() -> Iterator[Messages]:
    for _, code in _functions():
        names = [name for name in re.findall(r"\b[a-z_]{4,}\b", code) if code.count(name) >= 3 and name != "self"]
        if names:
            old = max(names, key=names.count)
            yield [
                {
                    "role": "user",
                    "content": f"```python\n{code}\n```\nRename `{old}` to `my_{old}` and write the whole code again.",
                }
            ]


def _quotes() -> Iterator[Messages]:
    """Paragraphs of this repository's documents and of numpy's documentation, in pairs."""
    documents = [path.read_text() for path in sorted((*(ROOT / "docs").rglob("*.md"), ROOT / "ARCHITECTURE.md"))]
    documents += [inspect.getdoc(getattr(np, name)) or "" for name in sorted(np.__all__)]
    paragraphs = [
        " ".join(text.split()) for document in documents for text in document.split("\n\n") if ">>>" not in text
    ]
    prose = [text for text in paragraphs if 300 <= len(text) <= 800 and "|" not in text and "----" not in text]
    for first, second in zip(prose[::2], prose[1::2], strict=False):
        yield [
            {
                "role": "user",
                "content": f"Source A:\n{first}\n\nSource B:\n{second}\n\n"
                "Quote source A word for word, then source B word for word.",
            }
        ]


def _tool_loops() -> Iterator[Messages]:
    """An agent that reads files one after another; its next call follows the pattern of the earlier ones."""
    system = (
        "You are a coding agent. Answer with one JSON object only, the next tool call:\n"
        '{"thought": "...", "tool": "read_file", "arguments": {"path": "...", "begin": 1, "end": 20}}'
    )
    files = [path for path in sorted((ROOT / "src").rglob("*.py")) if len(path.read_text().splitlines()) > 30]
    for first in range(0, len(files) - 5, 4):
        group = files[first : first + 5]
        names = [str(path.relative_to(ROOT)) for path in group]
        messages = [
            {"role": "system", "content": system},
            {"role": "user", "content": "Read the first 6 lines of: " + ", ".join(names)},
        ]
        for path, name in zip(group[:4], names, strict=False):
            call = {
                "thought": f"I have to read the next file of the list, which is {name}, and look at its first lines.",
                "tool": "read_file",
                "arguments": {"path": name, "begin": 1, "end": 6},
            }
            result = "\n".join(path.read_text().splitlines()[:6])
            messages += [{"role": "assistant", "content": json.dumps(call)}, {"role": "user", "content": result}]
        yield messages


def _data() -> Iterator[Messages]:
    """Pieces of this repository's committed measurements."""
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        lines = json.dumps(json.loads(path.read_text()), indent=1).splitlines()
        for begin in range(0, len(lines) - 40, 120):
            piece = "\n".join(lines[begin : begin + 30])
            yield [{"role": "user", "content": f"```json\n{piece}\n```\nRepeat this JSON exactly."}]
