"""Float32 to block formats in numpy, for tests and small conversions.

Every function takes float32 [num_blocks, block_elements] and returns uint8 [num_blocks, block_bytes]. Q4_0 to Q8_0
round as llama.cpp does. The K formats use plain minimum/maximum scales: valid files, no search for the best scale.
"""

from __future__ import annotations

import numpy as np

from setpoint.quant.decode import Bytes, Floats


def _inverse(scale: Floats) -> Floats:
    """1 / scale, and 0 where the scale is 0."""
    return np.divide(1.0, scale, out=np.zeros_like(scale), where=scale != 0)


def _half_bytes(x: Floats) -> Bytes:
    return np.ascontiguousarray(x, dtype=np.float16).view(np.uint8)


def _as_half(x: Floats) -> Floats:
    return x.astype(np.float16).astype(np.float32)


def _pack_nibbles(codes: Bytes) -> Bytes:
    half = codes.shape[1] // 2
    return codes[:, :half] | (codes[:, half:] << 4)


def _pack_fifth_bits(codes: Bytes) -> Bytes:
    return np.packbits(codes >> 4, axis=1, bitorder="little")


def encode_f32(x: Floats) -> Bytes:
    return np.ascontiguousarray(x, dtype=np.float32).view(np.uint8)


def encode_f16(x: Floats) -> Bytes:
    with np.errstate(over="ignore"):
        return _half_bytes(x)


def encode_bf16(x: Floats) -> Bytes:
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # round to nearest even
    quiet_nan = (bits >> 16) | 0x40
    return np.where(np.isnan(x), quiet_nan, rounded).astype(np.uint16).view(np.uint8)


def _symmetric_codes(x: Floats, levels: int) -> tuple[Floats, Bytes]:
    """Scale so that the element of largest magnitude gets code 0: the range is one step wider on that side."""
    extreme = np.take_along_axis(x, np.abs(x).argmax(axis=1, keepdims=True), axis=1)
    scale = extreme / -levels
    codes = np.trunc(x.astype(np.float64) * _inverse(scale) + (levels + 0.5))
    return scale, codes.clip(0, 2 * levels - 1).astype(np.uint8)


def _affine_codes(x: Floats, steps: int) -> tuple[Floats, Floats, Bytes]:
    low = x.min(axis=1, keepdims=True)
    scale = (x.max(axis=1, keepdims=True) - low) / steps
    codes = np.trunc((x - low) * _inverse(scale) + np.float32(0.5)).clip(0, steps)
    return scale, low, codes.astype(np.uint8)


def encode_q4_0(x: Floats) -> Bytes:
    scale, codes = _symmetric_codes(x, 8)
    return np.concatenate([_half_bytes(scale), _pack_nibbles(codes)], axis=1)


def encode_q4_1(x: Floats) -> Bytes:
    scale, low, codes = _affine_codes(x, 15)
    return np.concatenate([_half_bytes(scale), _half_bytes(low), _pack_nibbles(codes)], axis=1)


def encode_q5_0(x: Floats) -> Bytes:
    scale, codes = _symmetric_codes(x, 16)
    return np.concatenate([_half_bytes(scale), _pack_fifth_bits(codes), _pack_nibbles(codes & 0x0F)], axis=1)


def encode_q5_1(x: Floats) -> Bytes:
    scale, low, codes = _affine_codes(x, 31)
    parts = [_half_bytes(scale), _half_bytes(low), _pack_fifth_bits(codes), _pack_nibbles(codes & 0x0F)]
    return np.concatenate(parts, axis=1)


def encode_q8_0(x: Floats) -> Bytes:
    scale = np.abs(x).max(axis=1, keepdims=True) / 127
    scaled = x * _inverse(scale)
    codes = np.trunc(scaled + np.copysign(np.float32(0.5), scaled)).astype(np.int8)  # half away from zero
    return np.concatenate([_half_bytes(scale), codes.view(np.uint8)], axis=1)


def _affine_groups(x: Floats, group: int, steps: int, scale_steps: int) -> tuple[Floats, Floats, Bytes, Bytes, Bytes]:
    """Two-level affine codes: (d, dmin) per block, integer scale and minimum per group, codes per element."""
    groups = x.reshape(len(x), -1, group)
    low = np.minimum(groups.min(axis=2), 0)
    scale = (groups.max(axis=2) - low) / steps
    d = _as_half(scale.max(axis=1, keepdims=True) / scale_steps)
    dmin = _as_half((-low).max(axis=1, keepdims=True) / scale_steps)
    scales = np.rint(scale * _inverse(d)).clip(0, scale_steps)
    minimums = np.rint(-low * _inverse(dmin)).clip(0, scale_steps)
    shifted = groups + (dmin * minimums)[:, :, None]
    codes = np.rint(shifted * _inverse(d * scales)[:, :, None]).clip(0, steps).astype(np.uint8)
    return d, dmin, scales.astype(np.uint8), minimums.astype(np.uint8), codes.reshape(x.shape)


def _symmetric_groups(x: Floats, levels: int, scale_steps: int) -> tuple[Floats, Bytes, Bytes]:
    """Two-level symmetric codes of groups of 16: d per block, integer scale per group, code + levels per element."""
    groups = x.reshape(len(x), 16, 16)
    scale = np.abs(groups).max(axis=2) / (levels - 0.5)
    d = _as_half(scale.max(axis=1, keepdims=True) / scale_steps)
    scales = np.rint(scale * _inverse(d)).clip(0, scale_steps)
    codes = np.rint(groups * _inverse(d * scales)[:, :, None]).clip(-levels, levels - 1) + levels
    return d, scales.astype(np.int8), codes.astype(np.uint8).reshape(x.shape)


def _pack_two_bits(codes: Bytes) -> Bytes:
    """Inverse of halves of 32 bytes with bit pairs from low to high."""
    shifted = codes.reshape(-1, 2, 4, 32) << np.array([0, 2, 4, 6], dtype=np.uint8).reshape(1, 1, 4, 1)
    packed: Bytes = np.bitwise_or.reduce(shifted, axis=2).reshape(-1, 64)
    return packed


def encode_q2_k(x: Floats) -> Bytes:
    d, dmin, scales, minimums, codes = _affine_groups(x, 16, 3, 15)
    parts = [scales | (minimums << 4), _pack_two_bits(codes), _half_bytes(d), _half_bytes(dmin)]
    return np.concatenate(parts, axis=1)


def _pack_high_bits(codes: Bytes, shift: int) -> Bytes:
    """Bit `shift` of the codes of sub-block j of 32 becomes bit j of 32 bytes."""
    bits = (codes.reshape(-1, 8, 32) >> shift) & 1
    packed: Bytes = np.bitwise_or.reduce(bits << np.arange(8, dtype=np.uint8).reshape(1, 8, 1), axis=1)
    return packed


def encode_q3_k(x: Floats) -> Bytes:
    d, scales, codes = _symmetric_groups(x, 4, 31)
    raised = (scales.astype(np.int32) + 32).astype(np.uint8)
    high = (raised >> 4).reshape(-1, 4, 4) << np.array([0, 2, 4, 6], dtype=np.uint8).reshape(1, 4, 1)
    packed_scales = [_pack_nibbles(raised & 0x0F), np.bitwise_or.reduce(high, axis=1)]
    parts = [_pack_high_bits(codes, 2), _pack_two_bits(codes & 3), *packed_scales, _half_bytes(d)]
    return np.concatenate(parts, axis=1)


def pack_k_scales(scales: Bytes, minimums: Bytes) -> Bytes:
    first = scales[:, :4] | ((scales[:, 4:] >> 4) << 6)
    second = minimums[:, :4] | ((minimums[:, 4:] >> 4) << 6)
    last = (scales[:, 4:] & 0x0F) | ((minimums[:, 4:] & 0x0F) << 4)
    return np.concatenate([first, second, last], axis=1)


def _pack_nibbles_by_32(codes: Bytes) -> Bytes:
    pairs = codes.reshape(len(codes), -1, 2, 32)
    return (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).reshape(len(codes), -1)


def encode_q4_k(x: Floats) -> Bytes:
    d, dmin, scales, minimums, codes = _affine_groups(x, 32, 15, 63)
    parts = [_half_bytes(d), _half_bytes(dmin), pack_k_scales(scales, minimums), _pack_nibbles_by_32(codes)]
    return np.concatenate(parts, axis=1)


def encode_q5_k(x: Floats) -> Bytes:
    d, dmin, scales, minimums, codes = _affine_groups(x, 32, 31, 63)
    parts = [_half_bytes(d), _half_bytes(dmin), pack_k_scales(scales, minimums)]
    return np.concatenate([*parts, _pack_high_bits(codes, 4), _pack_nibbles_by_32(codes & 0x0F)], axis=1)


def encode_q6_k(x: Floats) -> Bytes:
    d, scales, codes = _symmetric_groups(x, 32, 127)
    low = (codes & 0x0F).reshape(-1, 2, 2, 64)
    packed_low = (low[:, :, 0] | (low[:, :, 1] << 4)).reshape(-1, 128)
    return np.concatenate([packed_low, _pack_two_bits(codes >> 4), scales.view(np.uint8), _half_bytes(d)], axis=1)
