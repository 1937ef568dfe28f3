"""What a step works in, beside weights and cache: it grows with --max-num-batched-tokens."""

from __future__ import annotations

from setpoint.models.spec import Model, SandwichBlock

_RECORD_BYTES = 256  # of a token's positions, tables and outputs
_QUANTIZED_BYTES = 1 + 4 / 32 + 4 / 16  # an input as an 8-bit code, with its share of scale and sums


def step_bytes_per_token(model: Model) -> int:
    """Bytes of the slots that `lower` makes, for each token that a step may have."""
    layers = model.layers.layers
    last = layers[-1].attention
    sandwich = any(isinstance(layer, SandwichBlock) for layer in layers)
    values = {("x", model.hidden), ("h", model.hidden), ("wanted x", model.hidden)}
    values.add(("wanted attention", last.heads * last.head_dim))
    if sandwich:
        values |= {("x'", model.hidden), ("y", model.hidden)}
    quantized = {("h", model.hidden), ("wanted attention", last.heads * last.head_dim)}
    angles = set()
    for layer in layers:
        attention = layer.attention
        widths = {"q": attention.heads, "k": attention.kv_heads, "v": attention.kv_heads, "attention": attention.heads}
        values |= {(name, heads * attention.head_dim) for name, heads in widths.items()}
        values |= {("gate", layer.mlp.intermediate), ("up", layer.mlp.intermediate)}
        quantized |= {("attention", attention.heads * attention.head_dim), ("gate", layer.mlp.intermediate)}
        if attention.rope is not None:
            angles.add((attention.rope, attention.head_dim))
    total = sum(4 * (-(-width // 16) * 16 + 16) for _, width in values)
    total += sum(int(_QUANTIZED_BYTES * width) for _, width in quantized)
    return total + sum(4 * (rope.dim or head_dim) for rope, head_dim in angles) + _RECORD_BYTES
