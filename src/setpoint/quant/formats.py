"""The weight formats Setpoint reads: one table, and numpy code to take blocks apart and put them together.

A tensor of `rows x cols` is stored row by row; a row is `cols / block_elements` blocks of `block_bytes`. Names and
type ids are those of GGUF (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). The native core holds the
same formats in csrc/quant; this module is its oracle, and what loaders use for small tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from setpoint.quant import decode, encode
from setpoint.quant.decode import Bytes, Floats

__all__ = ["FORMATS", "FORMAT_BY_GGML_TYPE", "Format", "bytes_per_row", "dequantize", "quantize"]


@dataclass(frozen=True, slots=True)
class Format:
    """`block_elements` weights are stored in `block_bytes`; decode and encode work on [num_blocks, ...] arrays."""

    name: str
    ggml_type: int
    block_elements: int
    block_bytes: int
    decode: Callable[[Bytes], Floats]
    encode: Callable[[Floats], Bytes]


_ROWS = (
    Format("F32", 0, 1, 4, decode.decode_f32, encode.encode_f32),
    Format("F16", 1, 1, 2, decode.decode_f16, encode.encode_f16),
    Format("Q4_0", 2, 32, 18, decode.decode_q4_0, encode.encode_q4_0),
    Format("Q4_1", 3, 32, 20, decode.decode_q4_1, encode.encode_q4_1),
    Format("Q5_0", 6, 32, 22, decode.decode_q5_0, encode.encode_q5_0),
    Format("Q5_1", 7, 32, 24, decode.decode_q5_1, encode.encode_q5_1),
    Format("Q8_0", 8, 32, 34, decode.decode_q8_0, encode.encode_q8_0),
    Format("Q2_K", 10, 256, 84, decode.decode_q2_k, encode.encode_q2_k),
    Format("Q3_K", 11, 256, 110, decode.decode_q3_k, encode.encode_q3_k),
    Format("Q4_K", 12, 256, 144, decode.decode_q4_k, encode.encode_q4_k),
    Format("Q5_K", 13, 256, 176, decode.decode_q5_k, encode.encode_q5_k),
    Format("Q6_K", 14, 256, 210, decode.decode_q6_k, encode.encode_q6_k),
    Format("BF16", 30, 1, 2, decode.decode_bf16, encode.encode_bf16),
)
FORMATS: dict[str, Format] = {row.name: row for row in _ROWS}
FORMAT_BY_GGML_TYPE: dict[int, Format] = {row.ggml_type: row for row in _ROWS}


def _lookup(format: str) -> Format:
    if format not in FORMATS:
        raise ValueError(f"unknown weight format {format!r}; known: {', '.join(FORMATS)}")
    return FORMATS[format]


def bytes_per_row(format: str, cols: int) -> int:
    """Bytes of one row of `cols` weights. Raises ValueError when `cols` is not a positive number of whole blocks."""
    row = _lookup(format)
    if cols <= 0 or cols % row.block_elements:
        raise ValueError(f"{cols} columns are not whole {format} blocks of {row.block_elements}")
    return cols // row.block_elements * row.block_bytes


def dequantize(format: str, raw: Bytes) -> Floats:
    """raw: uint8 [rows, bytes_per_row]; returns float32 [rows, cols]. Raises ValueError on a partial block."""
    row = _lookup(format)
    rows, num_bytes = raw.shape
    if raw.dtype != np.uint8 or num_bytes % row.block_bytes:
        raise ValueError(f"expected uint8 rows of whole {format} blocks of {row.block_bytes} bytes")
    cols = num_bytes // row.block_bytes * row.block_elements
    return row.decode(raw.reshape(-1, row.block_bytes)).astype(np.float32, copy=False).reshape(rows, cols)


def quantize(format: str, x: Floats) -> Bytes:
    """x: finite float32 [rows, cols]; returns uint8 [rows, bytes_per_row]. Raises ValueError on a partial block."""
    row = _lookup(format)
    rows, cols = x.shape
    num_bytes = bytes_per_row(format, cols)
    blocks = np.ascontiguousarray(x, dtype=np.float32).reshape(-1, row.block_elements)
    return row.encode(blocks).astype(np.uint8, copy=False).reshape(rows, num_bytes)
