"""The measured rows as a document and as a table to read."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from typing import Any

from peers.measure import Engine, Measured
from peers.samples import compare, passes
from peers.work import ModelWork


def machine_record() -> dict[str, Any]:
    """The whole record of the machine, measured now: the probes beside the samples are its short form."""
    from setpoint.tune.probe.ceilings import measure_machine

    return asdict(measure_machine(10.0, lambda done, total: None))


def row_document(measured: Measured, engines: list[Engine], work: ModelWork, wanted: int) -> dict[str, Any]:
    row = measured.row
    rivals: dict[str, Any] = {}
    for engine in engines[1:]:
        pairs = measured.pairs(engine.name)
        if pairs:
            found = {key: _rounded(value) for key, value in asdict(compare(pairs, row.resources, wanted)).items()}
            rivals[engine.name] = found | {
                "share": shares(measured, engine.name, work, None),
                "settings": engine.settings(row),
            }
        elif row.name in engine.failures:
            rivals[engine.name] = {"failed": engine.failures[row.name]}
    packed = engines[0].worker.about["weight_bytes"]
    document: dict[str, Any] = {
        "name": row.name,
        "row": asdict(row),
        "setpoint": rivals[engines[1].name]["ours"],
        "ratio": rivals[engines[1].name]["ratio"],
        "passes": passes(row.goal, rivals[engines[1].name]["ratio"]),
        "share": shares(measured, "setpoint", work, packed),
        "share_by_file_bytes": shares(measured, "setpoint", work, None),
        "rivals": rivals,
        "work": {
            "operations": work.operations(row),
            "bytes": work.num_bytes(row),
            "our_bytes": work.num_bytes(row, packed),
        },
        "samples": {name: [_sample(one, row.resources) for one in every] for name, every in measured.samples.items()},
    }
    document["share_passes"] = passes(row.goal_share, document["share"])
    return document


def shares(measured: Measured, name: str, work: ModelWork, weight_bytes: float | None) -> float:
    """Median share of what the probes around each undoubted sample (or each, when there is none) allow."""
    every = measured.samples[name]
    undoubted = [one for one in every if not one.doubts(measured.row.resources)] or every
    row = measured.row
    operations, num_bytes = work.operations(row), work.num_bytes(row, weight_bytes)
    # Ours counts the steps that served the whole batch, which may be a few less than all.
    full = row.prompt_tokens if row.phase == "prefill" else row.batch * row.steps
    return _rounded(statistics.median(one.share(operations, num_bytes) * one.tokens / full for one in undoubted))


def _sample(one: Any, resources: tuple[str, ...]) -> dict[str, Any]:
    return {
        "tok_s": _rounded(one.rate),
        "before": {key: round(value, 1) for key, value in asdict(one.before).items()},
        "after": {key: round(value, 1) for key, value in asdict(one.after).items()},
        "steal": round(one.steal, 4),
        "others": round(one.others, 4),
        "doubts": one.doubts(resources),
    }


def _rounded(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.4g}")


def table(rows: list[dict[str, Any]], unavailable: dict[str, str]) -> str:
    lines = [
        f"{'tokens/s':<36}{'setpoint':>9}{'llama.cpp':>10}{'ratio':>7}{'goal':>6}{'':>6}"
        f"{'share':>7}{'goal':>6}{'':>6}{'its share':>10}{'clean':>7}  llama.cpp's best"
    ]
    for row in rows:
        rival = row["rivals"]["llama.cpp"]
        goal, share_goal = row["row"]["goal"], row["row"]["goal_share"]
        lines.append(
            f"{row['name']:<36}{row['setpoint']:>9.1f}{rival['theirs']:>10.1f}{row['ratio']:>7.2f}"
            f"{_goal(goal)}{_verdict(row['passes'])}{row['share']:>7.0%}{_goal(share_goal)}{_verdict(row['share_passes'])}"
            f"{rival['share']:>10.0%}{rival['clean']:>4}/{rival['pairs']}  {_settings(rival['settings'])}"
        )
        for name, other in row["rivals"].items():
            if name != "llama.cpp" and "failed" not in other:
                lines.append(
                    f"{'  beside ' + name:<36}{other['ours']:>9.1f}{other['theirs']:>10.1f}{other['ratio']:>7.2f}"
                )
            elif name != "llama.cpp":
                lines.append(f"  {name} failed: {other['failed']}")
    lines += [f"{name} is missing: {why}" for name, why in unavailable.items()]
    return "\n".join(lines)


def _goal(goal: float | None) -> str:
    return f"{'-' if goal is None else f'{goal:.2f}':>6}"


def _verdict(passed: bool | None) -> str:
    return f"{'' if passed is None else ('pass' if passed else 'MISS'):>6}"


def _settings(settings: dict[str, Any]) -> str:
    return ", ".join(
        [
            f"fa {'on' if settings['flash_attention'] else 'off'}",
            f"ubatch {settings['ubatch']}",
            f"{settings['threads']} threads",
        ]
    )
