"""What a draft model brings: tokens a second with it over without it, by how good its guesses are.

    python benchmarks/draft_models.py [--batches 1 4] [--repeat 3] [--output FILE]

No two trained models of one vocabulary and different sizes can be had from the package index, so the pair is made from
one: the target is SmolLM2-135M with silent layers added, whose outputs are zeroed (it says what SmolLM2 says, at the
price of a model several times as deep); the drafts are SmolLM2 as it is (always right: what speculation can bring at
most) and with layers left out (often wrong). Costs and their bookkeeping are real, what is accepted is arranged. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from setpoint.assemble import models_directory
from setpoint.loaders.gguf import GGUFArray, GGUFFile
from setpoint.loaders.gguf_writer import NamedTensor, write
from setpoint.loaders.hub import resolve_model
from speculation import Bench, measure, show
from speculation_work import workloads

DEPTH = 6  # times as many layers
DRAFTS = {"the model itself": (), "one layer less": (14,), "four layers less": (9, 13, 17, 21)}
WORK = ("free prose", "code editing")
SILENT = ("attn_output.weight", "ffn_down.weight")


def write_layers(source: GGUFFile, path: Path, layers: list[tuple[int, bool]]) -> None:
    """A copy whose layers are those of the source named here, in this order; False: without any effect."""

    def tensors() -> Iterator[NamedTensor]:
        for name, entry in source.tensors.items():
            if not name.startswith("blk."):
                yield name, entry.shape, entry.format, source.raw(entry)
        for number, (layer, speaks) in enumerate(layers):
            prefix = f"blk.{layer}."
            for name, entry in source.tensors.items():
                if name.startswith(prefix):
                    own = name.removeprefix(prefix)
                    raw = source.raw(entry)
                    contents = np.zeros_like(raw) if own in SILENT and not speaks else raw
                    yield f"blk.{number}.{own}", entry.shape, entry.format, contents

    metadata: dict[str, Any] = {}
    for key, value in source.metadata.items():
        if isinstance(value, GGUFArray):
            metadata[key] = value.strings() if value.kind == 8 else value.numbers().copy()
        else:
            metadata[key] = value
    metadata[f"{metadata['general.architecture']}.block_count"] = len(layers)
    write(path, metadata, tensors())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    args.more = 0
    source = GGUFFile(resolve_model("smollm2-135m", models_directory()))
    count = source.metadata[f"{source.metadata['general.architecture']}.block_count"]
    assert isinstance(count, int)
    rows: list[dict[str, Any]] = []
    document = {"benchmark": "draft models", "depth": DEPTH, "repeat": args.repeat, "tokens": args.tokens}
    document |= {"machine": platform.processor() or platform.machine(), "rows": rows}
    with tempfile.TemporaryDirectory() as folder:
        args.model = str(Path(folder) / "target.gguf")
        write_layers(source, Path(args.model), [(layer, turn == 0) for layer in range(count) for turn in range(DEPTH)])
        for name, left_out in DRAFTS.items():
            draft = Path(folder) / "draft.gguf"
            write_layers(source, draft, [(layer, True) for layer in range(count) if layer not in left_out])
            args.config = json.dumps({"method": "draft", "model": str(draft), "num_speculative_tokens": 8})
            bench = Bench(args)
            try:
                for work in workloads(max(16, *args.batches)):
                    for batch in args.batches:
                        if work.name not in WORK:
                            continue
                        row = measure(bench, work, batch, args, None)
                        row |= {"draft": name, "draft_share": bench.scheduler._drafting._planner._model_share}
                        rows.append(row)
                        print(f"{name}, a step costs {row['draft_share']:.0%} of the target's: ", end="")
                        show(row)
                        if args.output is not None:
                            args.output.write_text(json.dumps(document) + "\n")
            finally:
                bench.engine.shutdown()
    print(json.dumps(document))


if __name__ == "__main__":
    sys.exit(main())
