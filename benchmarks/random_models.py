"""Models of published shapes with random weights, for timing: no download, the same bytes every time.

    python benchmarks/random_models.py random-0.5b random-1.5b

Each tensor has the format that llama.cpp's Q4_K_M gives it. The blocks are drawn directly, codes and scales, so that
a gigabyte takes seconds; weights have mean 0 and the spread of a trained matrix, so activations stay in range. The
vocabulary is a byte-level BPE of made-up tokens that both engines can load. Files are cached.
"""

from __future__ import annotations

import argparse
import itertools
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from setpoint.config import cache_directory
from setpoint.loaders.gguf_writer import NamedTensor, Raw, write
from setpoint.quant.encode import pack_k_scales
from setpoint.quant.formats import FORMATS
from setpoint.text.token_bytes import BYTE_ALPHABET

VERSION = 1  # part of the file name: raise it when the bytes change
NORMAL, CONTROL = 1, 3
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@dataclass(frozen=True, slots=True)
class Shape:
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int = 32768


SHAPES = {
    "random-0.5b": Shape(24, 896, 4864, 14, 2, 64, 151936),  # Qwen2.5-0.5B
    "random-1.5b": Shape(28, 1536, 8960, 12, 2, 128, 151936),  # Qwen2.5-1.5B
}


def random_model(name: str, directory: Path | None = None) -> Path:
    """The file of that model, written when it is not there yet."""
    directory = directory or cache_directory() / "benchmarks"
    path = directory / f"{name}-q4_k_m-v{VERSION}.gguf"
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        write_random_model(path, SHAPES[name], name)
    return path


def write_random_model(path: Path, shape: Shape, name: str) -> None:
    write(path, metadata(shape, name), tensors(shape))


def metadata(shape: Shape, name: str) -> dict[str, Any]:
    own = {
        "block_count": shape.layers,
        "context_length": shape.context,
        "embedding_length": shape.hidden,
        "feed_forward_length": shape.intermediate,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 1e6,
    }
    return (
        {"general.architecture": "qwen2", "general.name": name, "general.file_type": 15}
        | {f"qwen2.{key}": value for key, value in own.items()}
        | vocabulary(shape.vocabulary)
    )


def vocabulary(size: int) -> dict[str, Any]:
    """Every byte, then every pair, then triples until it is full: each longer token is the merge of two others."""
    letters = sorted(BYTE_ALPHABET, key=BYTE_ALPHABET.__getitem__)
    pairs = ((a + b, f"{a} {b}") for a, b in itertools.product(letters, repeat=2))
    triples = ((a + b + c, f"{a + b} {c}") for a, b, c in itertools.product(letters, repeat=3))
    longer = list(itertools.islice(itertools.chain(pairs, triples), size - len(letters) - len(SPECIAL)))
    tokens = [*letters, *(text for text, _ in longer), *SPECIAL]
    assert len(tokens) == size
    own: dict[str, Any] = {
        "model": "gpt2",
        "pre": "qwen2",
        "tokens": tokens,
        "token_type": np.array([NORMAL] * (size - len(SPECIAL)) + [CONTROL] * len(SPECIAL), np.int32),
        "merges": [merge for _, merge in longer],
        "eos_token_id": tokens.index("<|im_end|>"),
        "padding_token_id": tokens.index("<|endoftext|>"),
        "add_bos_token": False,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in own.items()}


def tensors(shape: Shape) -> Iterator[NamedTensor]:
    """Tied embedding; biases on q, k and v, as in Qwen 2."""
    query, key_value = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield _matrix("token_embd", shape.vocabulary, shape.hidden, head_format(shape.hidden), spread=0.02)
    yield _vector("output_norm.weight", shape.hidden, mean=1.0)
    for layer in range(shape.layers):
        more = "Q6_K" if uses_more_bits(layer, shape.layers) else "Q4_K"
        block = f"blk.{layer}."
        for name, rows, columns, wanted in (
            ("attn_q", query, shape.hidden, "Q4_K"),
            ("attn_k", key_value, shape.hidden, "Q4_K"),
            ("attn_v", key_value, shape.hidden, more),
            ("attn_output", shape.hidden, query, "Q4_K"),
            ("ffn_gate", shape.intermediate, shape.hidden, "Q4_K"),
            ("ffn_up", shape.intermediate, shape.hidden, "Q4_K"),
            ("ffn_down", shape.hidden, shape.intermediate, more),
        ):
            yield _matrix(block + name, rows, columns, fitting(wanted, columns), spread=columns**-0.5)
        for name, size in (("attn_q", query), ("attn_k", key_value), ("attn_v", key_value)):
            yield _vector(f"{block}{name}.bias", size, mean=0.0)
        for name in ("attn_norm", "ffn_norm"):
            yield _vector(f"{block}{name}.weight", shape.hidden, mean=1.0)


# --- which format llama.cpp's Q4_K_M gives to which tensor -------------------------------------------------------


def uses_more_bits(layer: int, layers: int) -> bool:
    """Values and down projections of the first and last eighth, and of every third layer between, get six bits."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def fitting(wanted: str, columns: int) -> str:
    """Rows that are not whole blocks of 256 fall back to a format with blocks of 32."""
    return wanted if columns % 256 == 0 else {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}[wanted]


def head_format(columns: int) -> str:
    return fitting("Q6_K", columns)


# --- random blocks -----------------------------------------------------------------------------------------------


def _matrix(name: str, rows: int, columns: int, weight_format: str, spread: float) -> NamedTensor:
    def draw() -> Raw:
        kind = FORMATS[weight_format]
        bits = _random_bytes(name, rows * columns // kind.block_elements * kind.block_bytes)
        blocks = bits.reshape(-1, kind.block_bytes)
        _FINISH[weight_format](blocks, spread)
        return blocks.reshape(rows, -1)

    return f"{name}.weight", (rows, columns), weight_format, draw


def _vector(name: str, size: int, mean: float) -> NamedTensor:
    noise = _random_bytes(name, size).astype(np.float32) / 255 - 0.5
    return name, (size,), "F32", (mean + 0.2 * noise).astype(np.float32).reshape(1, -1).view(np.uint8)


def _random_bytes(name: str, count: int) -> NDArray[np.uint8]:
    """Raw output of a bit generator: the same on every machine and numpy, a gigabyte in seconds."""
    words = np.random.PCG64(zlib.crc32(name.encode())).random_raw(-(-count // 8))
    return words.view(np.uint8)[:count]


def _scale(blocks: Raw, at: int, value: float) -> None:
    """A float16 at byte `at`: `value`, up to a fifth more or less, its sign random so that no bias builds up."""
    random = blocks[:, at].astype(np.float32)
    scale = value * (0.8 + 0.4 / 255 * random) * np.where(blocks[:, at + 1] & 1, 1, -1)
    blocks[:, at : at + 2] = scale.astype(np.float16).reshape(-1, 1).view(np.uint8)


def _uniform(levels: int) -> float:
    """Standard deviation of uniform codes 0 .. levels - 1."""
    return float(((levels**2 - 1) / 12) ** 0.5)


def _finish_with_scale(at: int, levels: int, blocks: Raw, spread: float) -> None:
    _scale(blocks, at, spread / _uniform(levels))


def _finish_q8_0(blocks: Raw, spread: float) -> None:
    codes = blocks[:, 2:]
    codes[codes == 0x80] = 0x81  # llama.cpp never writes -128
    _scale(blocks, 0, spread / _uniform(255))


def _finish_q4_k(blocks: Raw, spread: float) -> None:
    """Group scales of 40..63 with equal minimums, dmin = 7.5 d: codes 0..15 become symmetric around 0."""
    groups = 40 + blocks[:, 4:12] % 24
    blocks[:, 4:16] = pack_k_scales(groups, groups)
    _scale(blocks, 0, spread / (_uniform(16) * 52))
    d = np.ascontiguousarray(blocks[:, 0:2]).view(np.float16).astype(np.float32)
    blocks[:, 2:4] = (7.5 * d).astype(np.float16).view(np.uint8)


def _finish_q6_k(blocks: Raw, spread: float) -> None:
    blocks[:, 192:208] = 64 + blocks[:, 192:208] % 64
    _scale(blocks, 208, spread / (_uniform(64) * 96))


_FINISH: dict[str, Callable[[Raw, float], None]] = {
    "Q4_K": _finish_q4_k,
    "Q5_0": partial(_finish_with_scale, 0, 32),
    "Q6_K": _finish_q6_k,
    "Q8_0": _finish_q8_0,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=SHAPES)
    for name in parser.parse_args().names:
        print(random_model(name))


if __name__ == "__main__":
    main()
