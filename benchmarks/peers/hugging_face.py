"""A GGUF file as a Hugging Face directory of float weights without a tokenizer, for rivals that read no GGUF."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from setpoint.loaders.checkpoint import open_checkpoint
from setpoint.quant.formats import dequantize

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}


def hugging_face_directory(source: Path) -> Path:
    """Beside the file, written once: `config.json` and the weights in float32 (the reader rounds them as it likes)."""
    target = source.with_suffix(".hf")
    if target.exists():
        return target
    checkpoint = open_checkpoint(source)
    try:
        partial = source.with_suffix(".hf.part")
        partial.mkdir(exist_ok=True)
        weights = {}
        for name in checkpoint.tensor_names():
            tensor = checkpoint.tensor(name)
            weights[name] = dequantize(tensor.format, tensor.raw).reshape(tensor.shape).astype(np.float32)
        save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
        config = dict(checkpoint.config)
        config["architectures"] = [ARCHITECTURES[config["model_type"]]]
        config["torch_dtype"] = "bfloat16"
        (partial / "config.json").write_text(json.dumps(config, indent=1))
        return partial.rename(target)
    finally:
        checkpoint.close()
