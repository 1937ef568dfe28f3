"""Block formats to float32 in numpy: the readable reference that the native core is tested against.

Every function takes blocks as uint8 [num_blocks, block_bytes] and returns float32 [num_blocks, block_elements].
The layouts are those of GGUF (ggml-common.h of llama.cpp); all arithmetic is done in float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.integer[Any]]  # uint8; numpy types a shift of uint8 as some integer
Floats = NDArray[np.floating[Any]]


def _half(blocks: Bytes, at: int) -> Floats:
    """The float16 stored at byte `at` of each block.  [num_blocks, 1]"""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def _nibbles(packed: Bytes) -> Bytes:
    """Low nibbles of all bytes, then high nibbles.  [num_blocks, 2 * bytes]"""
    return np.concatenate([packed & 0x0F, packed >> 4], axis=1)


def _fifth_bits(packed: Bytes) -> Bytes:
    """Bit i of the 32-bit word as the fifth bit of code i.  [num_blocks, 32]"""
    return np.unpackbits(packed.astype(np.uint8, copy=False), axis=1, bitorder="little") << 4


def decode_f32(blocks: Bytes) -> Floats:
    return np.ascontiguousarray(blocks).view(np.float32)


def decode_f16(blocks: Bytes) -> Floats:
    return np.ascontiguousarray(blocks).view(np.float16).astype(np.float32)


def decode_bf16(blocks: Bytes) -> Floats:
    return (np.ascontiguousarray(blocks).view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def decode_q4_0(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:18]).astype(np.float32) - 8)


def decode_q4_1(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:20]).astype(np.float32) + _half(blocks, 2)


def decode_q5_0(blocks: Bytes) -> Floats:
    codes = _nibbles(blocks[:, 6:22]) | _fifth_bits(blocks[:, 2:6])
    return _half(blocks, 0) * (codes.astype(np.float32) - 16)


def decode_q5_1(blocks: Bytes) -> Floats:
    codes = _nibbles(blocks[:, 8:24]) | _fifth_bits(blocks[:, 4:8])
    return _half(blocks, 0) * codes.astype(np.float32) + _half(blocks, 2)


def decode_q8_0(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * np.ascontiguousarray(blocks[:, 2:34]).view(np.int8).astype(np.float32)


def _two_bits(packed: Bytes) -> Bytes:
    """64 bytes to 256 two-bit codes: halves of 32 bytes, in each the bit pairs from low to high."""
    pairs = packed.reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], dtype=np.uint8).reshape(1, 1, 4, 1)
    return (pairs & 3).reshape(-1, 256)


def decode_q2_k(blocks: Bytes) -> Floats:
    scales = _half(blocks, 80) * (blocks[:, :16] & 0x0F).astype(np.float32)  # [num_blocks, 16 groups of 16]
    minimums = _half(blocks, 82) * (blocks[:, :16] >> 4).astype(np.float32)
    codes = _two_bits(blocks[:, 16:80]).reshape(-1, 16, 16).astype(np.float32)
    return (scales[:, :, None] * codes - minimums[:, :, None]).reshape(-1, 256)


def unpack_q3_k_scales(packed: Bytes) -> Bytes:
    """12 bytes to sixteen 6-bit scales with their offset of 32 removed: low four bits first, then high two."""
    low = _nibbles(packed[:, :8])
    high = (packed[:, None, 8:12] >> np.array([0, 2, 4, 6], dtype=np.uint8).reshape(1, 4, 1)) & 3
    return (low | (high.reshape(-1, 16) << 4)).astype(np.int32) - 32


def decode_q3_k(blocks: Bytes) -> Floats:
    high = (blocks[:, None, :32] >> np.arange(8, dtype=np.uint8).reshape(1, 8, 1)) & 1  # [num_blocks, 8, 32]
    codes = (_two_bits(blocks[:, 32:96]) | (high.reshape(-1, 256) << 2)).astype(np.float32) - 4
    scales = _half(blocks, 108) * unpack_q3_k_scales(blocks[:, 96:108]).astype(np.float32)
    return (scales[:, :, None] * codes.reshape(-1, 16, 16)).reshape(-1, 256)


def unpack_k_scales(packed: Bytes) -> tuple[Bytes, Bytes]:
    """12 bytes of Q4_K and Q5_K to eight 6-bit scales and eight 6-bit minimums."""
    first, second, last = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([first & 63, (last & 0x0F) | ((first >> 6) << 4)], axis=1)
    minimums = np.concatenate([second & 63, (last >> 4) | ((second >> 6) << 4)], axis=1)
    return scales, minimums


def _decode_affine_k(blocks: Bytes, codes: Bytes) -> Floats:
    scales, minimums = unpack_k_scales(blocks[:, 4:16])
    factor = _half(blocks, 0) * scales.astype(np.float32)
    offset = _half(blocks, 2) * minimums.astype(np.float32)
    return (factor[:, :, None] * codes.reshape(-1, 8, 32).astype(np.float32) - offset[:, :, None]).reshape(-1, 256)


def _nibbles_by_32(packed: Bytes) -> Bytes:
    """Each 32 bytes give 32 low nibbles, then 32 high nibbles.  [num_blocks, 2 * bytes]"""
    chunks = packed.reshape(len(packed), -1, 1, 32) >> np.array([0, 4], dtype=np.uint8).reshape(1, 1, 2, 1)
    return (chunks & 0x0F).reshape(len(packed), -1)


def decode_q4_k(blocks: Bytes) -> Floats:
    return _decode_affine_k(blocks, _nibbles_by_32(blocks[:, 16:144]))


def decode_q5_k(blocks: Bytes) -> Floats:
    high = (blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8).reshape(1, 8, 1)) & 1  # [num_blocks, 8, 32]
    return _decode_affine_k(blocks, _nibbles_by_32(blocks[:, 48:176]) | (high.reshape(-1, 256) << 4))


def decode_q6_k(blocks: Bytes) -> Floats:
    low = (blocks[:, :128].reshape(-1, 2, 1, 64) >> np.array([0, 4], dtype=np.uint8).reshape(1, 1, 2, 1)) & 0x0F
    codes = low.reshape(-1, 256) | (_two_bits(blocks[:, 128:192]) << 4)
    scales = _half(blocks, 208) * np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    return (scales[:, :, None] * (codes.reshape(-1, 16, 16).astype(np.float32) - 32)).reshape(-1, 256)
