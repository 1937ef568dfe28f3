"""The matmul kernels: every ISA bit-equal to the reference, every row independent of its batch."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from setpoint import _native
from setpoint.quant.formats import FORMATS, dequantize, quantize

QUANTIZED = [name for name, row in FORMATS.items() if row.block_elements > 1]
ISAS = _native.available_isas()
FAST_ISAS = [isa for isa in ISAS if isa != "ref"] or ISAS
BATCHES = [1, 2, 3, 4, 6, 8, 16, 17, 32, 96, 256]


def normal(rows: int, cols: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)


@cache
def packed(name: str, n: int, k: int) -> object:
    return _native.Weight.pack(name, quantize(name, normal(n, k, seed=n)), k)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a.view(np.uint32), b.view(np.uint32))


def small_k(name: str) -> int:
    return max(96, FORMATS[name].block_elements)


@pytest.mark.parametrize("isa", FAST_ISAS)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("n", [1, 15, 16, 33, 83])
def test_isas_equal_the_reference(isa: str, name: str, n: int) -> None:
    k = small_k(name)
    x, bias, residual = normal(7, k, 1), normal(1, n, 2)[0], normal(7, n, 3)
    weight = packed(name, n, k)
    assert same_bits(_native.kernels_matmul(isa, weight, x), _native.kernels_matmul("ref", weight, x))
    fused = [_native.kernels_matmul(i, weight, x, bias, residual) for i in (isa, "ref")]
    assert same_bits(*fused)


@pytest.mark.parametrize("isa", FAST_ISAS)
@pytest.mark.parametrize("name", FORMATS)
def test_isas_equal_the_reference_for_every_k(isa: str, name: str) -> None:
    block = FORMATS[name].block_elements
    multiples = [1, 2, 3, 4, 5, 9] if block == 256 else [1, 2, 3, 7, 17, 18, 33, 48, 65, 70, 130]
    for k in [m * block for m in multiples]:
        x = normal(3, k, k)
        weight = packed(name, 18, k)
        assert same_bits(_native.kernels_matmul(isa, weight, x), _native.kernels_matmul("ref", weight, x)), k


@pytest.mark.parametrize("isa", FAST_ISAS)
@pytest.mark.parametrize("name", QUANTIZED)
def test_many_rows_equal_the_reference(isa: str, name: str) -> None:
    # Tiles of every height and width, several chunks of K, a partial last panel.
    k = FORMATS[name].block_elements * (4 if FORMATS[name].block_elements == 256 else 25)
    for rows, n in [(8, 16), (9, 31), (10, 48), (11, 64), (13, 75), (20, 112)]:
        x, bias, residual = normal(rows, k, rows), normal(1, n, 2)[0], normal(rows, n, 3)
        fused = [_native.kernels_matmul(i, packed(name, n, k), x, bias, residual) for i in (isa, "ref")]
        assert same_bits(*fused), (rows, n)


@pytest.mark.parametrize("isa", FAST_ISAS)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("k", [256, 1280])
def test_a_row_does_not_depend_on_its_batch(isa: str, name: str, k: int) -> None:
    x = normal(max(BATCHES), k, 4)
    weight = packed(name, 83, k)
    alone = np.concatenate([_native.kernels_matmul(isa, weight, x[i : i + 1]) for i in range(len(x))])
    for m in BATCHES:
        assert same_bits(_native.kernels_matmul(isa, weight, x[:m]), alone[:m]), m


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["F32", "BF16", "Q4_0", "Q4_K", "Q8_0", "Q6_K"])
def test_any_split_of_the_work_gives_the_same_bits(isa: str, name: str) -> None:
    weight = packed(name, 151, 256)  # 10 panels, the last one partial
    x, bias, residual = normal(41, 256, 21), normal(1, 151, 22)[0], normal(41, 151, 23)
    whole = _native.kernels_matmul(isa, weight, x, bias, residual)
    pieces = residual.copy()
    for rows in [(0, 5), (5, 6), (6, 41)]:
        for panels in [(0, 1), (1, 8), (8, 8), (8, 10)]:
            before = pieces.copy()
            pieces = _native.kernels_matmul(isa, weight, x, bias, pieces, rows=rows, panels=panels)
            touched = np.zeros(pieces.shape, bool)
            touched[rows[0] : rows[1], panels[0] * 16 : panels[1] * 16] = True
            assert same_bits(pieces[~touched], before[~touched])
    assert same_bits(pieces, whole)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", QUANTIZED)
def test_two_planes_equal_two_matmuls(isa: str, name: str) -> None:
    weight = packed(name, 83, 512)
    for m in [1, 2, 3, 4, 5, 8, 33]:
        x, fine, bias, residual = normal(m, 512, 31), normal(m, 512, 32) / 100, normal(1, 83, 33)[0], normal(m, 83, 34)
        first = _native.kernels_matmul(isa, weight, x, bias, residual)
        want = _native.kernels_matmul(isa, weight, fine, None, first)
        assert same_bits(_native.kernels_matmul(isa, weight, x, bias, residual, fine=fine), want), m


@pytest.mark.parametrize("isa", FAST_ISAS)
@pytest.mark.parametrize("name", QUANTIZED)
def test_long_inputs_equal_the_reference(isa: str, name: str) -> None:
    # So long that the activations of a call are gathered in several pieces, whatever the number of rows.
    k = 52736
    weight = packed(name, 18, k)
    x = normal(8, k, 41)
    want = _native.kernels_matmul("ref", weight, x[:3])
    for m in (1, 3, 8):
        assert same_bits(_native.kernels_matmul(isa, weight, x[:m])[:3], want[:m]), m


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_reference_is_close_to_float64(name: str) -> None:
    k = 512
    raw = quantize(name, normal(24, k, 5))
    x = normal(5, k, 6)
    codes, scales, _ = _native.kernels_quantize_rows("ref", x)
    restored = (codes.reshape(5, -1, 32) * scales[:, :, None].astype(np.float64)).reshape(5, k)
    got = _native.kernels_matmul("ref", _native.Weight.pack(name, raw, k), x)
    exact = restored @ dequantize(name, raw).astype(np.float64).T
    np.testing.assert_allclose(got, exact, atol=2e-4)  # float32 rounding of sums of about 512 products of size 1
    step = np.repeat(scales, 32, axis=1).astype(np.float64) / 2
    bound = step @ np.abs(dequantize(name, raw)).astype(np.float64).T  # half a step of every activation
    assert (np.abs(got - x.astype(np.float64) @ dequantize(name, raw).T.astype(np.float64)) <= bound + 2e-4).all()


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("k", [1, 7, 64, 65, 200])
def test_float_matmul_is_close_to_float64(name: str, k: int) -> None:
    raw = quantize(name, normal(19, k, 5))
    x, bias, residual = normal(5, k, 6), normal(1, 19, 7)[0], normal(5, 19, 8)
    exact = x.astype(np.float64) @ dequantize(name, raw).astype(np.float64).T + bias + residual
    for isa in ISAS:
        got = _native.kernels_matmul(isa, _native.Weight.pack(name, raw, k), x, bias, residual)
        np.testing.assert_allclose(got, exact, atol=5e-5)


@pytest.mark.parametrize("isa", ISAS)
def test_extreme_codes_are_exact(isa: str) -> None:
    # All products of one sign and the largest size: where 16-bit sums or saturating adds would go wrong.
    for name in QUANTIZED:
        k = max(64, FORMATS[name].block_elements)
        for sign in (-1, 1):
            x = np.full((4, k), sign * 127, np.float32)
            raw = quantize(name, np.full((16, k), -3, np.float32) * np.linspace(0, 1, k, dtype=np.float32))
            weight = _native.Weight.pack(name, raw, k)
            exact = x.astype(np.float64) @ dequantize(name, raw).astype(np.float64).T
            np.testing.assert_allclose(_native.kernels_matmul(isa, weight, x), exact, rtol=2e-6)
    raw = np.zeros((16, 34 * 2), np.uint8)
    raw[:, [1, 35]] = 0x3C  # scale 1; codes -128 and 127 once offset
    for byte in (0x80, 0x7F):
        for block in (0, 34):
            raw[:, block + 2 : block + 34] = byte
        weight = _native.Weight.pack("Q8_0", raw, 64)
        x = np.full((2, 64), -127, np.float32)
        exact = -127.0 * 64 * np.int8(np.uint8(byte).view(np.int8))
        np.testing.assert_array_equal(_native.kernels_matmul(isa, weight, x), np.full((2, 16), exact, np.float32))


@pytest.mark.parametrize("isa", ISAS)
def test_quantize_rows_matches_numpy(isa: str) -> None:
    x = normal(9, 320, 11) * np.logspace(-30, 30, 9, dtype=np.float32)[:, None]
    x[2, 32:64] = 0
    codes, scales, sums = _native.kernels_quantize_rows(isa, x)
    groups = x.reshape(9, -1, 32)
    want_scales = np.abs(groups).max(axis=2) / np.float32(127)
    np.testing.assert_array_equal(scales, want_scales)
    divisor = np.where(want_scales > 0, want_scales, 1)[:, :, None]
    np.testing.assert_array_equal(codes.reshape(groups.shape), np.rint(groups / divisor).astype(np.int8))
    np.testing.assert_array_equal(sums, codes.reshape(9, -1, 16).sum(axis=2, dtype=np.int32))


@pytest.mark.parametrize("isa", FAST_ISAS)
def test_quantize_rows_equals_the_reference_at_the_edges(isa: str) -> None:
    tiny, huge = np.float32(1e-45), np.finfo(np.float32).max
    x = normal(8, 96, 12)
    x[1] *= tiny  # subnormal scales are coarse: codes are clamped
    x[2, 5], x[3, 40], x[4, 0] = np.nan, np.inf, -np.inf
    x[5, 3], x[6], x[7, ::2] = huge, 0.5 * np.arange(96), -0.0  # row 6 is full of ties
    x[6, 95] = 127
    for a, b in zip(_native.kernels_quantize_rows(isa, x), _native.kernels_quantize_rows("ref", x), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("isa", ISAS)
def test_quantize_rows_by_columns(isa: str) -> None:
    x = normal(5, 224, 14)
    whole = _native.kernels_quantize_rows(isa, x)
    for begin, end in ((0, 64), (96, 128), (160, 224)):
        for part, full, per in zip(
            _native.kernels_quantize_rows(isa, x, (begin, end)), whole, (1, 32, 16), strict=True
        ):
            expected = np.zeros_like(full)
            expected[:, begin // per : end // per] = full[:, begin // per : end // per]
            np.testing.assert_array_equal(part, expected)
    with pytest.raises(ValueError, match="multiples of 32"):
        _native.kernels_quantize_rows(isa, x, (16, 64))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_inputs_spoil_only_their_row(isa: str, value: float) -> None:
    x = normal(5, 256, 13)
    clean = x.copy()
    x[2, 77] = value
    for name in FORMATS:
        weight = packed(name, 18, 256)
        got, want = _native.kernels_matmul(isa, weight, x), _native.kernels_matmul(isa, weight, clean)
        assert not np.isfinite(got[2]).any()
        keep = [0, 1, 3, 4]
        assert same_bits(got[keep], want[keep])


def test_bad_shapes_raise() -> None:
    weight = packed("Q8_0", 18, 96)
    x = normal(2, 96, 0)
    with pytest.raises(ValueError, match="k columns"):
        _native.kernels_matmul("ref", weight, normal(2, 64, 0))
    with pytest.raises(ValueError, match="bias"):
        _native.kernels_matmul("ref", weight, x, np.zeros(17, np.float32))
    with pytest.raises(ValueError, match="out"):
        _native.kernels_matmul("ref", weight, x, None, np.zeros((2, 17), np.float32))
    for ranges in ({"rows": (0, 3)}, {"rows": (-1, 2)}, {"panels": (2, 1)}, {"panels": (0, 3)}):
        with pytest.raises(ValueError, match="out of bounds"):
            _native.kernels_matmul("ref", weight, x, **ranges)
    with pytest.raises(ValueError, match="multiple of 32"):
        _native.kernels_quantize_rows("ref", normal(2, 40, 0))
    with pytest.raises(RuntimeError, match="unknown isa"):
        _native.kernels_matmul("sse9", weight, x)
