"""Golden logits from Hugging Face transformers: `make parity` runs this with `--check`.

    make_goldens.py [--check] [smollm2-135m=FILE.gguf gemma3-270m=FILE.gguf]

Every tiny model whole, and of each real model that is named a sample of the vocabulary (transformers dequantizes its
GGUF file). Runs in its own environment (torch, transformers); the tests that compare with the goldens need neither.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
GOLDENS = HERE / "goldens"
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent / "src")]

from tiny_models import REAL_PROMPT, REAL_STRIDE, TINY_MODELS, TinyModel, prompts, write_directory  # noqa: E402

TOLERANCE = 2e-6  # of the largest logit: float32 rounding differs from machine to machine


def reference_logits(tiny: TinyModel, directory: Path) -> dict[str, np.ndarray]:
    """Logits at every position of every prompt, by transformers in float32 with eager attention."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return {f"prompt{i}": model(torch.tensor([ids])).logits[0].numpy() for i, ids in enumerate(prompts(tiny))}


def real_logits(path: Path) -> dict[str, np.ndarray]:
    """Of a real model: the most likely token at every position of a fixed prompt, and every 997th logit."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([REAL_PROMPT])).logits[0].numpy()
    return {"most_likely": logits.argmax(axis=1), "logits": logits[:, ::REAL_STRIDE], "largest": np.abs(logits).max()}


def difference(stored: dict[str, np.ndarray], fresh: dict[str, np.ndarray]) -> float:
    """The largest, relative to the largest value; infinite for other prompts or other most likely tokens."""
    if set(stored) != set(fresh) or any(stored[key].shape != fresh[key].shape for key in fresh):
        return float("inf")
    if "most_likely" in fresh and not np.array_equal(stored["most_likely"], fresh["most_likely"]):
        return float("inf")
    return float(max(np.abs(stored[key] - fresh[key]).max() / np.abs(fresh[key]).max() for key in fresh))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the stored goldens instead of writing them")
    parser.add_argument("models", nargs="*", metavar="NAME=FILE.gguf")
    given = parser.parse_args()
    GOLDENS.mkdir(exist_ok=True)
    fresh: dict[str, dict[str, np.ndarray]] = {}
    for tiny in TINY_MODELS.values():
        with tempfile.TemporaryDirectory() as directory:
            fresh[tiny.name] = reference_logits(tiny, write_directory(tiny, Path(directory) / tiny.name))
    for model in given.models:
        name, _, path = model.partition("=")
        fresh[f"real-{name}"] = real_logits(Path(path))
    wrong = 0
    for name, made in fresh.items():
        path = GOLDENS / f"{name}.npz"
        if not given.check:
            np.savez_compressed(path, **made)
            print(f"{name}: written")
            continue
        with np.load(path) as stored:
            error = difference(dict(stored), made)
        print(f"{name}: largest difference {error:.1e}")
        wrong += error > TOLERANCE
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
