"""Packing and embedding lookup against the numpy codecs, and the checks on sizes."""

from __future__ import annotations

import numpy as np
import pytest

from setpoint import _native
from setpoint.quant.formats import FORMATS, bytes_per_row, dequantize, quantize

# The codes' width once packed, and bits per weight, scales included.
PACKED = {
    "F32": ("f32", 32), "F16": ("f16", 16), "BF16": ("bf16", 16), "Q4_0": ("u4", 4.5), "Q4_1": ("u4", 5),
    "Q5_0": ("u5", 5.5), "Q5_1": ("u5", 6), "Q8_0": ("u8", 8.5), "Q2_K": ("u2", 3.125), "Q3_K": ("u3", 3.625),
    "Q4_K": ("u4", 4.625), "Q5_K": ("u5", 5.625), "Q6_K": ("u6", 6.625),
}  # fmt: skip


def raw_rows(name: str, rows: int, cols: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)
    return quantize(name, x)


def unpacked(weight: object, k: int) -> np.ndarray:
    """The float weights inside a packed float matrix: the reference kernel times the identity."""
    return _native.kernels_matmul("ref", weight, np.eye(k, dtype=np.float32)).T


@pytest.mark.parametrize("name", FORMATS)
def test_lookup_equals_numpy(name: str) -> None:
    raw = raw_rows(name, 11, 512)
    ids = np.array([3, 0, 10, 3], np.int32)
    np.testing.assert_array_equal(_native.dequantize_rows(name, raw, 512, ids), dequantize(name, raw)[ids])


@pytest.mark.parametrize("name", [n for n in FORMATS if FORMATS[n].block_elements > 1])
def test_lookup_of_any_bits_equals_numpy(name: str) -> None:
    # Every code and every integer scale, not only those our quantizers produce; f16 fields made small and finite.
    raw = np.random.default_rng(5).integers(0, 256, (6, bytes_per_row(name, 512)), dtype=np.uint8)
    fields = {"Q4_0": [0], "Q5_0": [0], "Q8_0": [0], "Q2_K": [80, 82], "Q3_K": [108], "Q6_K": [208]}
    for at in fields.get(name, [0, 2]):
        raw.reshape(-1, FORMATS[name].block_bytes)[:, at + 1] &= 0xBF  # clears the top exponent bit
    ids = np.arange(6, dtype=np.int32)
    np.testing.assert_array_equal(_native.dequantize_rows(name, raw, 512, ids), dequantize(name, raw))


def test_every_f16_is_read_exactly() -> None:
    raw = np.arange(65536, dtype=np.uint16).view(np.uint8).reshape(256, 512)
    got = _native.dequantize_rows("F16", raw, 256, np.arange(256, dtype=np.int32))
    np.testing.assert_array_equal(got, dequantize("F16", raw))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rows", [1, 16, 35])
def test_dequantized_panels_hold_the_weights(name: str, rows: int) -> None:
    raw = raw_rows(name, rows, 256)
    weight = _native.Weight.pack_dequantized(name, raw, 256)
    assert (weight.n, weight.k, weight.codes) == (rows, 256, "f32")
    assert weight.nbytes >= -(-rows // 16) * 16 * 256 * 4
    np.testing.assert_array_equal(unpacked(weight, 256), dequantize(name, raw))


@pytest.mark.parametrize("name", FORMATS)
def test_packed_kind_and_size(name: str) -> None:
    weight = _native.Weight.pack(name, raw_rows(name, 20, 512), 512)
    codes, bits = PACKED[name]
    assert (weight.n, weight.k, weight.codes) == (20, 512, codes)
    assert weight.nbytes == 32 * 512 * bits / 8


@pytest.mark.parametrize("name", ["F16", "Q4_1", "Q8_0", "Q4_K", "Q6_K"])
def test_stacked_sources_equal_one_matrix(name: str) -> None:
    raw = raw_rows(name, 45, 256)
    x = np.random.default_rng(1).standard_normal((3, 256)).astype(np.float32)
    whole = _native.Weight.pack(name, raw, 256)
    stacked = _native.Weight.pack_rows([(name, raw[:9].copy()), (name, raw[9:10].copy()), (name, raw[10:].copy())], 256)
    assert stacked.n == 45
    np.testing.assert_array_equal(_native.kernels_matmul("ref", stacked, x), _native.kernels_matmul("ref", whole, x))


def test_mixed_formats_stack_only_dequantized() -> None:
    sources = [
        ("Q4_0", raw_rows("Q4_0", 5, 256)),
        ("Q6_K", raw_rows("Q6_K", 7, 256)),
        ("BF16", raw_rows("BF16", 6, 256)),
    ]
    with pytest.raises(ValueError, match="Q4_0 and Q6_K"):
        _native.Weight.pack_rows(sources, 256)
    weight = _native.Weight.pack_rows_dequantized(sources, 256)
    want = np.concatenate([dequantize(name, raw) for name, raw in sources])
    np.testing.assert_array_equal(unpacked(weight, 256), want)


def test_packs_like() -> None:
    assert _native.packs_like("Q8_0", "Q8_0")
    assert not _native.packs_like("Q4_0", "Q4_1")
    assert not _native.packs_like("Q5_0", "Q8_0")  # different zero points


@pytest.mark.parametrize("pack", ["pack", "pack_dequantized"])
def test_bad_sizes_raise(pack: str) -> None:
    call = getattr(_native.Weight, pack)
    good = raw_rows("Q8_0", 4, 64)
    for name, raw, cols in [
        ("Q8_0", good, 96),  # rows too short
        ("Q8_0", good, 33),  # not whole blocks
        ("Q8_0", good, 0),
        ("Q8_0", good, -32),
        ("Q8_0", good, 2**40),
        ("Q8_0", good[:0], 64),  # no rows
        ("Q8_0", good[:, :-1].copy(), 64),
        ("Q9_9", good, 64),
        ("F32", raw_rows("F32", 4, 64), 63),
    ]:
        with pytest.raises(ValueError, match=r".+"):
            call(name, raw, cols)
    with pytest.raises(ValueError, match="no rows"):
        _native.Weight.pack_rows([], 64)


def test_bad_lookups_raise() -> None:
    raw = raw_rows("Q8_0", 4, 64)
    for ids in ([4], [-1], [0, 2**30]):
        with pytest.raises(ValueError, match="out of range"):
            _native.dequantize_rows("Q8_0", raw, 64, np.array(ids, np.int32))
    with pytest.raises(ValueError, match="bytes of 96"):
        _native.dequantize_rows("Q8_0", raw, 96, np.array([0], np.int32))
