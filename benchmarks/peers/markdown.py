"""The part of the README that a result file determines: `make docs` writes it, a test holds it to the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

BEGIN = "<!-- From benchmarks/results, by `make docs`. -->"
END = "<!-- End of it. -->"


def newest_result(directory: Path) -> Path | None:
    return max(directory.glob("????-??-??-peers.json"), default=None)


def with_performance(readme: str, directory: Path) -> str:
    """The text with the section between its marks written anew; unchanged while there is no result."""
    path = newest_result(directory)
    if path is None:
        return readme
    head, _, rest = readme.partition(BEGIN)
    _, found, tail = rest.partition(END)
    if not found:
        raise ValueError("the README has lost the marks of its performance section")
    section = performance(json.loads(path.read_text()), path.name)
    return f"{head}{BEGIN}\n{section}\n{END}{tail}"


def performance(document: dict[str, Any], file_name: str) -> str:
    version = next(iter(document["engines"]["llama.cpp"].values()))["version"]
    lines = [
        f"Tokens/s beside llama.cpp ({version}, built for the machine, its best settings row by row), in turn on the",
        f"same files and token ids with {document['threads']} threads; *share* is the part of what the machine's own",
        "limit (DRAM or VNNI rate, probed beside every sample) allows:",
        "",
        "| | Setpoint | llama.cpp | ratio | goal | share |",
        "|---|---|---|---|---|---|",
        *map(_line, document["rows"]),
        "",
    ]
    lines += [*map(_script_line, (document.get("scripts") or {"rows": []})["rows"]), ""]
    others = [line for line in map(_others, document["rows"]) if line]
    if others:
        lines += [f"Ratios to other engines: {'; '.join(others)}.", ""]
    lines += [f"{name} is missing: {why.splitlines()[-1]}." for name, why in document["unavailable"].items()]
    lines.append(
        f"`make bench-peers` measures it anew ([result](benchmarks/results/{file_name}), every sample with its probes)."
    )
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    goal = row["row"]["goal"]
    said = "–" if goal is None else f"{goal:g}{'' if row['passes'] else ' (missed)'}"
    rival = row["rivals"]["llama.cpp"]["theirs"]
    return f"| {row['name']} | {row['setpoint']:.0f} | {rival:.0f} | {row['ratio']:.2f} | {said} | {row['share']:.0%} |"


def _script_line(row: dict[str, Any]) -> str:
    goal = "" if row["goal"] is None else f", goal {row['goal']:g}{'' if row['passes'] else ' (missed)'}"
    theirs = "" if row["theirs"] is None else f"; llama.cpp {row['theirs']:g} s"
    return f"- {row['name']}: {row['value']:g} {row['unit']}{goal}{theirs}"


def _others(row: dict[str, Any]) -> str:
    ratios = [
        f"{name} {rival['ratio']:.2f}"
        for name, rival in row["rivals"].items()
        if name != "llama.cpp" and "ratio" in rival
    ]
    return f"{row['name']}: {', '.join(ratios)}" if ratios else ""
