"""Decode speed against batch and against context, ours and the rivals', under the roofline of the probed machine.

    make bench-plots        draws the newest benchmarks/results/*-peers-sweep.json into docs/plots/

Measured by `python benchmarks/vs_llamacpp.py --sweep`. The roofline is what the median of all probes beside the
samples allows: the weights of the file and the KV cache read once a step at the DRAM rate, or the matrix operations at
the VNNI rate, whichever takes longer.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

RESULTS = Path(__file__).parent / "results"
PLOTS = Path(__file__).parents[1] / "docs" / "plots"
# Okabe and Ito's palette, and a marker each: readable without colours.
STYLES = {
    "setpoint": ("Setpoint", "#D55E00", "o"),
    "llama.cpp": ("llama.cpp, its best settings", "#0072B2", "s"),
    "openvino": ("OpenVINO GenAI", "#009E73", "^"),
    "vllm": ("vLLM, bfloat16", "#CC79A7", "D"),
}
GREY = "#555555"
BATCH_CONTEXT = 256  # prompt tokens of the rows that vary the batch


def median_probe(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Operations/s and bytes/s that the machine could do while these rows were measured."""
    samples = [one for row in rows for every in row["samples"].values() for one in every]
    probes = [one[side] for one in samples for side in ("before", "after")]
    vnni = statistics.median(probe["vnni_gops"] for probe in probes) * 1e9
    return vnni, statistics.median(probe["dram_gb_s"] for probe in probes) * 1e9


def roofline(row: dict[str, Any], vnni: float, dram: float) -> float:
    """Tokens/s that these rates allow."""
    tokens = row["row"]["batch"] * row["row"]["steps"]
    return float(tokens / max(row["work"]["operations"] / vnni, row["work"]["bytes"] / dram))


def series(rows: list[dict[str, Any]], key: str) -> dict[str, list[tuple[int, float]]]:
    """Engine -> (batch or context, tokens/s), ascending."""
    found: dict[str, list[tuple[int, float]]] = {}
    vnni, dram = median_probe(rows)
    for row in sorted(rows, key=lambda row: row["row"][key]):
        at = row["row"][key]
        found.setdefault("setpoint", []).append((at, row["setpoint"]))
        found.setdefault("roofline", []).append((at, roofline(row, vnni, dram)))
        for name, rival in row["rivals"].items():
            if "theirs" in rival:
                found.setdefault(name, []).append((at, rival["theirs"]))
    return found


def draw(axes: Axes, rows: list[dict[str, Any]], key: str) -> None:
    lines = series(rows, key)
    xs, limit = zip(*lines.pop("roofline"), strict=True)
    axes.plot(xs, limit, color=GREY, linestyle="--", linewidth=1.4, label="limit of the machine (roofline)", zorder=2)
    axes.fill_between(xs, limit, 1e9, color=GREY, alpha=0.10, linewidth=0, zorder=1)
    for name, (label, colour, marker) in STYLES.items():
        if name in lines:
            at, rates = zip(*lines[name], strict=True)
            width = 2.4 if name == "setpoint" else 1.6
            axes.plot(at, rates, color=colour, marker=marker, markersize=6, linewidth=width, label=label, zorder=3)
            axes.annotate(
                f"{rates[-1]:.0f}", (at[-1], rates[-1]), (7, -3), textcoords="offset points", color=colour, fontsize=9
            )
    lowest = min(rate for line in lines.values() for _, rate in line)
    axes.set_xscale("log", base=2)
    axes.set_xlim(xs[0] / 1.15, xs[-1] * 1.3)
    axes.set_yscale("log")
    axes.set_xticks(xs, [f"{x:,}" for x in xs])
    axes.set_ylim(lowest / 1.5, max(limit) * 1.5)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if f"{value:.0e}"[0] in "25" else ""))
    axes.tick_params(axis="y", which="minor", labelsize=8)
    axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    axes.grid(True, which="major", color="#dddddd", linewidth=0.8)
    axes.grid(True, which="minor", axis="y", color="#eeeeee", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylabel("decoded tokens/s" + (", whole batch" if key == "batch" else ""))


def plot(document: dict[str, Any], directory: Path) -> list[Path]:
    rows = document["rows"]
    model = rows[0]["row"]["model"]
    pictures = {
        "decode-by-batch": (
            [row for row in rows if row["row"]["prompt_tokens"] == BATCH_CONTEXT],
            "batch",
            "sequences in the batch",
            f"Decoding a batch, {BATCH_CONTEXT} tokens of context each",
        ),
        "decode-by-context": (
            [row for row in rows if row["row"]["batch"] == 1],
            "prompt_tokens",
            "tokens of context",
            "Decoding one sequence",
        ),
    }
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for name, (chosen, key, label, title) in pictures.items():
        if not chosen:
            continue
        figure, axes = plt.subplots(figsize=(7.2, 4.6), layout="constrained")
        draw(axes, chosen, key)
        axes.set_xlabel(label)
        axes.set_title(f"{title}\n", loc="left", fontsize=12, fontweight="bold")
        subtitle = f"{model}, {document['threads']} threads, medians of {document['repeat']}, {document['date']}"
        axes.text(0, 1.03, subtitle, transform=axes.transAxes, fontsize=9, color=GREY)
        axes.legend(frameon=False, fontsize=9, loc="best")
        for suffix in ("svg", "png"):
            path = directory / f"{name}.{suffix}"
            figure.savefig(path, dpi=150, metadata={"Date": None} if suffix == "svg" else None)
            written.append(path)
        plt.close(figure)
    return written


def newest() -> Path:
    found = sorted(RESULTS.glob("*-peers-sweep.json"))
    if not found:
        raise SystemExit("no sweep yet: python benchmarks/vs_llamacpp.py --sweep")
    return found[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", nargs="?", type=Path)
    parser.add_argument("--directory", type=Path, default=PLOTS)
    given = parser.parse_args()
    for path in plot(json.loads((given.result or newest()).read_text()), given.directory):
        print(path)


if __name__ == "__main__":
    main()
