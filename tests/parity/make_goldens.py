"""Golden logits from Hugging Face transformers, for every tiny model: `make parity` runs this with `--check`.

Runs in its own environment (torch, transformers); the tests that compare with the goldens need neither.
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

from tiny_models import TINY_MODELS, TinyModel, prompts, write_directory  # noqa: E402

TOLERANCE = 2e-6  # of the largest logit: float32 rounding differs from machine to machine


def reference_logits(tiny: TinyModel, directory: Path) -> dict[str, np.ndarray]:
    """Logits at every position of every prompt, by transformers in float32 with eager attention."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return {f"prompt{i}": model(torch.tensor([ids])).logits[0].numpy() for i, ids in enumerate(prompts(tiny))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the stored goldens instead of writing them")
    check = parser.parse_args().check
    GOLDENS.mkdir(exist_ok=True)
    wrong = 0
    for tiny in TINY_MODELS.values():
        with tempfile.TemporaryDirectory() as directory:
            fresh = reference_logits(tiny, write_directory(tiny, Path(directory) / tiny.name))
        path = GOLDENS / f"{tiny.name}.npz"
        if not check:
            np.savez_compressed(path, **fresh)
            print(f"{tiny.name}: written")
            continue
        with np.load(path) as stored:
            if set(stored.files) != set(fresh):
                print(f"{tiny.name}: other prompts than stored")
                wrong += 1
                continue
            error = max(np.abs(stored[key] - fresh[key]).max() / np.abs(fresh[key]).max() for key in fresh)
        print(f"{tiny.name}: largest difference {error:.1e}")
        wrong += error > TOLERANCE
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
