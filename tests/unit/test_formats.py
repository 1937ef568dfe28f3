"""The numpy block codecs: sizes, round trips and hand-made blocks of every format."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from setpoint.quant.formats import FORMAT_BY_GGML_TYPE, FORMATS, bytes_per_row, dequantize, quantize

# Root mean square error of a round trip, relative to the standard deviation of a normal distribution.
WORST_ERROR = {
    "F32": 0.0, "F16": 5e-4, "BF16": 3e-3, "Q8_0": 0.01, "Q6_K": 0.025, "Q5_0": 0.05, "Q5_1": 0.05, "Q5_K": 0.05,
    "Q4_0": 0.1, "Q4_1": 0.09, "Q4_K": 0.09, "Q3_K": 0.22, "Q2_K": 0.38,
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_round_trip_error_is_small(name: str) -> None:
    x = np.random.default_rng(7).standard_normal((9, 512)).astype(np.float32)
    restored = dequantize(name, quantize(name, x))
    assert restored.dtype == np.float32
    assert np.sqrt(np.mean((restored - x) ** 2)) <= WORST_ERROR[name]


@pytest.mark.parametrize("name", FORMATS)
def test_zero_blocks_stay_zero(name: str) -> None:
    raw = quantize(name, np.zeros((2, 256), np.float32))
    assert raw.dtype == np.uint8
    assert raw.shape == (2, bytes_per_row(name, 256))
    assert not dequantize(name, raw).any()


@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_independent(name: str) -> None:
    raw = np.random.default_rng(3).integers(0, 256, (5, bytes_per_row(name, 512)), dtype=np.uint8)
    with np.errstate(all="ignore"):  # random bits make NaN and infinite scales, which must stay in their row
        whole = dequantize(name, raw)
        for i in range(5):
            np.testing.assert_array_equal(dequantize(name, raw[i : i + 1])[0], whole[i])


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([1e-3, 1.0, 100.0]))
def test_values_stay_within_a_step(name: str, seed: int, scale: float) -> None:
    x = (np.random.default_rng(seed).standard_normal((1, 64)) * scale).astype(np.float32)
    steps = {"F32": 2**23, "F16": 2**10, "BF16": 2**7, "Q8_0": 127, "Q5_0": 15, "Q5_1": 15, "Q4_0": 7, "Q4_1": 7}
    assert np.abs(dequantize(name, quantize(name, x)) - x).max() <= 1.01 * np.abs(x).max() / steps[name] + 1e-6


def test_q4_0_block_by_hand() -> None:
    codes = (np.arange(32) * 7) % 16
    block = np.concatenate([np.frombuffer(np.float16(0.5).tobytes(), np.uint8),
                            (codes[:16] | (codes[16:] << 4)).astype(np.uint8)])  # fmt: skip
    np.testing.assert_array_equal(dequantize("Q4_0", block[None])[0], 0.5 * (codes - 8))


def test_q4_k_scales_by_hand() -> None:
    block = np.zeros(144, np.uint8)
    block[:2] = np.frombuffer(np.float16(1).tobytes(), np.uint8)
    block[2:4] = np.frombuffer(np.float16(0.5).tobytes(), np.uint8)
    block[4] = 7 | 0b10 << 6  # scale 0 is 7; scale 4 has the high bits 10
    block[8] = 9 | 0b01 << 6  # minimum 0 is 9; minimum 4 has the high bits 01
    block[12] = 0x5 | 0x3 << 4  # low bits of scale 4 and minimum 4
    block[16] = 0x2  # element 0, sub-block 0
    block[16 + 64] = 0x4  # element 0, sub-block 4
    x = dequantize("Q4_K", block[None])[0]
    assert x[0] == 7 * 2 - 0.5 * 9
    assert x[128] == 0b100101 * 4 - 0.5 * 0b010011
    assert x[1] == -4.5
    assert x[32] == 0


def test_q6_k_signs_by_hand() -> None:
    block = np.zeros(210, np.uint8)
    block[208:210] = np.frombuffer(np.float16(2).tobytes(), np.uint8)
    block[192:194] = np.array([3, -3], np.int8).view(np.uint8)
    block[0] = 0x0F  # element 0: low bits 15
    block[128] = 0b11  # element 0: high bits 3
    x = dequantize("Q6_K", block[None])[0]
    assert x[0] == 2 * 3 * (63 - 32)
    assert x[16] == 2 * -3 * -32


def test_table_is_consistent() -> None:
    assert {row.ggml_type: row.name for row in FORMATS.values()} == {t: r.name for t, r in FORMAT_BY_GGML_TYPE.items()}
    assert len(FORMATS) == 13


@pytest.mark.parametrize(("name", "cols"), [("Q4_0", 33), ("Q8_0", 0), ("Q4_K", 128), ("F32", -1), ("Q9_9", 32)])
def test_bad_sizes_raise(name: str, cols: int) -> None:
    with pytest.raises(ValueError, match=r"columns|unknown"):
        bytes_per_row(name, cols)


def test_partial_blocks_raise() -> None:
    with pytest.raises(ValueError, match="whole Q8_0 blocks"):
        dequantize("Q8_0", np.zeros((1, 35), np.uint8))
    with pytest.raises(ValueError, match="32"):
        quantize("Q8_0", np.zeros((1, 40), np.float32))
