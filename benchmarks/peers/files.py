"""The files that the rows are measured on: downloads, one requantized by llama.cpp, and random ones of our own."""

from __future__ import annotations

import subprocess
from pathlib import Path

from peers.rows import GEMMA, Q4_0, Q4_1
from peers.worker import WORKERS
from random_models import random_model
from setpoint.assemble import models_directory
from setpoint.config import cache_directory
from setpoint.loaders.hub import resolve_model

ALIASES = {Q4_1: "smollm2-135m", GEMMA: "gemma3-270m"}


def model_file(model: str, llama_cpp_python: Path) -> Path:
    if model in ALIASES:
        return resolve_model(ALIASES[model], models_directory())
    return requantized(llama_cpp_python) if model == Q4_0 else random_model(model)


def requantized(llama_cpp_python: Path) -> Path:
    """SmolLM2 in the format llama.cpp is fastest with, written by its own quantizer."""
    target = cache_directory() / "benchmarks" / "SmolLM2-135M-Instruct.Q4_0.gguf"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".part")
        source = resolve_model(ALIASES[Q4_1], models_directory())
        command = [llama_cpp_python, WORKERS / "llama_cpp_worker.py", partial, "--quantize-from", source]
        subprocess.run([str(part) for part in command], check=True, capture_output=True)
        partial.replace(target)
    return target
