"""How far is the fast path from the f32 reference program, on real text?

    python benchmarks/quality.py smollm2-135m gemma3-270m --tokens 20480

The text is the prose of Python's own language reference (`pydoc_data.topics`), which every CPython carries. Both
programs read the same windows; per position the KL divergence of the fast distribution from the reference is computed
in float64, with top-1 agreement and both perplexities. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pydoc_data.topics import topics
from typing import Any

import numpy as np
from numpy.typing import NDArray

from setpoint.assemble import load_model
from setpoint.engine.plan import LogitsRow, PlanEntry, StepPlan
from setpoint.runtime.cpu.runner import CpuRunner

WINDOW = 512
CHUNK = 128  # positions whose logits are in memory at once


def windows(token_ids: list[int], bos: int | None, total: int) -> Iterator[list[int]]:
    """Windows of WINDOW tokens, each beginning with the model's BOS when it has one."""
    size = WINDOW - (bos is not None)
    for start in range(0, total, size):
        window = token_ids[start : start + size]
        if len(window) < size:
            return
        yield window if bos is None else [bos, *window]


def logits(runner: CpuRunner, window: list[int], tables: tuple[list[int], ...]) -> Iterator[NDArray[np.float32]]:
    for start in range(0, len(window), CHUNK):
        chunk = window[start : start + CHUNK]
        rows = [LogitsRow(offset, target=0) for offset in range(len(chunk))]
        yield runner.logits(StepPlan([PlanEntry(0, chunk, start, tables, rows)]))


def log_softmax(x: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = x.astype(np.float64) - x.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def compare(fast: NDArray[np.float32], exact: NDArray[np.float32], following: list[int]) -> dict[str, list[float]]:
    """Per position: KL(exact || fast), whether the most likely token agrees, and both losses on the next token."""
    out: dict[str, list[float]] = {"kl": [], "agree": [], "loss_fast": [], "loss_exact": []}
    for start in range(0, len(following), 16):  # few rows at a time: a row of Gemma is 2 MB in float64
        p = log_softmax(exact[start : start + 16])
        q = log_softmax(fast[start : start + 16])
        count = min(len(following) - start, 16)
        ids = following[start : start + count]
        out["kl"].extend((np.exp(p) * (p - q)).sum(axis=1)[:count])
        out["agree"].extend((p.argmax(axis=1) == q.argmax(axis=1))[:count])
        out["loss_fast"].extend(-q[np.arange(count), ids])
        out["loss_exact"].extend(-p[np.arange(count), ids])
    return out


def measure(name: str, total: int) -> dict[str, Any]:
    loaded = load_model(name)
    text = "\n\n".join(topics[key] for key in sorted(topics))
    ids = loaded.tokenizer.encode(text, add_special_tokens=False)
    options: dict[str, Any] = {
        "num_threads": 2,
        "isa": "auto",
        "max_model_len": WINDOW,
        "max_num_seqs": 1,
        "max_num_batched_tokens": CHUNK,
        "kv_cache_memory_bytes": 128 << 20,
    }
    fast = CpuRunner(loaded.model, loaded.checkpoint, dtype="auto", kv_dtype="s16", **options)
    exact = CpuRunner(loaded.model, loaded.checkpoint, dtype="f32", kv_dtype="f32", **options)
    tables = tuple(list(range(WINDOW // fast.info.block_size)) for _ in fast.info.kv_groups)
    found: dict[str, list[float]] = {"kl": [], "agree": [], "loss_fast": [], "loss_exact": []}
    bos = loaded.tokenizer.bos_token_id if loaded.tokenizer.encode("a")[0] == loaded.tokenizer.bos_token_id else None
    for window in windows(ids, bos, total):
        pairs = zip(logits(fast, window, tables), logits(exact, window, tables), strict=True)
        for index, (left, right) in enumerate(pairs):
            following = window[index * CHUNK + 1 : (index + 1) * CHUNK + 1]
            for key, values in compare(left, right, following).items():
                found[key].extend(values)
        print(f"{name}: {len(found['kl'])} positions, mean KL {np.mean(found['kl']):.5f}", file=sys.stderr, flush=True)
    fast.close()
    exact.close()
    return {
        "model": name,
        "positions": len(found["kl"]),
        "mean_kl": round(float(np.mean(found["kl"])), 6),
        "p99_kl": round(float(np.quantile(found["kl"], 0.99)), 6),
        "top1_agreement": round(float(np.mean(found["agree"])), 5),
        "perplexity_fast": round(float(np.exp(np.mean(found["loss_fast"]))), 4),
        "perplexity_f32": round(float(np.exp(np.mean(found["loss_exact"]))), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--tokens", type=int, default=20480)
    arguments = parser.parse_args()
    rows = [measure(name, arguments.tokens) for name in arguments.models]
    for row in rows:
        print(
            f"{row['model']}: mean KL {row['mean_kl']:.5f}, p99 KL {row['p99_kl']:.5f}, "
            f"top-1 agreement {row['top1_agreement']:.2%}, perplexity {row['perplexity_fast']:.3f} "
            f"(f32: {row['perplexity_f32']:.3f}) on {row['positions']} positions"
        )
    print(json.dumps({"question": "quality of the fast path", "rows": rows}))


if __name__ == "__main__":
    main()
