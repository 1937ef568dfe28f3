"""The least a model's file makes any engine do: operations of its matrices, bytes of its weights and its KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from peers.rows import Row
from setpoint.loaders.checkpoint import open_checkpoint
from setpoint.models import build_model

KV_BYTES = 2  # a 16-bit value


@dataclass(frozen=True, slots=True)
class Window:
    """KV values of one layer per token, and how many tokens it sees at most."""

    values: int
    tokens: int | None


@dataclass(frozen=True, slots=True)
class ModelWork:
    """Weights that every token meets; embedding rows are looked up and cost nothing."""

    body_weights: int
    head_weights: int
    file_bytes: int  # of both, as stored in the file
    layers: tuple[Window, ...]

    def operations(self, row: Row) -> float:
        """Multiplications and additions of the matrices; attention is not counted. A prompt needs one row of logits."""
        if row.phase == "prefill":
            return 2.0 * (row.prompt_tokens * self.body_weights + self.head_weights)
        return 2.0 * row.batch * row.steps * (self.body_weights + self.head_weights)

    def num_bytes(self, row: Row, weight_bytes: float | None = None) -> float:
        """Read at least: all weights once a step (once a prompt) and, decoding, the KV cache of each sequence."""
        weights = self.file_bytes if weight_bytes is None else weight_bytes
        if row.phase == "prefill":
            return weights
        context = row.prompt_tokens + (row.steps + 1) / 2
        return row.steps * (weights + row.batch * self.kv_bytes(context))

    def kv_bytes(self, context: float) -> float:
        seen = (layer.values * min(context, layer.tokens or context) for layer in self.layers)
        return KV_BYTES * sum(seen)


def model_work(path: Path) -> ModelWork:
    checkpoint = open_checkpoint(path)
    try:
        model = build_model(checkpoint.config)
        head = model.head.tied or model.head.name
        body_weights = head_weights = file_bytes = 0
        for name in checkpoint.tensor_names():
            tensor = checkpoint.tensor(name)
            is_head = name == f"{head}.weight"
            if len(tensor.shape) != 2 or (name == f"{model.embedding.name}.weight" and not is_head):
                continue
            weights = tensor.shape[0] * tensor.shape[1]
            file_bytes += tensor.raw.nbytes
            head_weights += weights if is_head else 0
            body_weights += 0 if is_head else weights
        windows = []
        for block in model.layers.layers:
            attention = block.attention
            windows.append(Window(2 * attention.kv_heads * attention.head_dim, attention.window))
        return ModelWork(body_weights, head_weights, file_bytes, tuple(windows))
    finally:
        checkpoint.close()
