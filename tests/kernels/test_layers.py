"""Row operations: every ISA bit-equal to ref, ref close to the float64 formula."""

import numpy as np
import pytest

from setpoint import _native as native


def available(isa: str) -> bool:
    try:
        native.kernels_exp(isa, np.zeros(1, np.float32))
    except RuntimeError:
        return False
    return True


FAST = [isa for isa in ("avx2", "avx512_vnni") if available(isa)]
WIDTHS = [1, 7, 8, 15, 16, 17, 63, 64, 65, 576, 640, 1543]
EVERY_FLOAT_STEP = 10_007  # a prime: walks all exponents and both signs


def assert_same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.shape == expected.shape
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(actual), nan)
    np.testing.assert_array_equal(actual.view(np.uint32)[~nan], expected.view(np.uint32)[~nan])


def all_floats() -> np.ndarray:
    return np.arange(0, 2**32, EVERY_FLOAT_STEP, dtype=np.uint64).astype(np.uint32).view(np.float32)


def ulps(actual: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Distance in units of the last place of the exact value, subnormals included."""
    spacing = np.spacing(np.maximum(np.abs(exact), np.finfo(np.float32).tiny).astype(np.float32)).astype(np.float64)
    return np.abs(actual.astype(np.float64) - exact) / spacing


def test_exp_is_within_one_ulp_on_its_whole_range() -> None:
    x = np.linspace(-104.5, 89.5, 2_000_003).astype(np.float32)
    with np.errstate(over="ignore"):
        exact = np.exp(x.astype(np.float64))
        finite = np.isfinite(exact.astype(np.float32))
    y = native.kernels_exp("ref", x)
    assert ulps(y[finite], exact[finite]).max() < 1.0
    assert np.all(np.isinf(y[~finite]) & (y[~finite] > 0))


def test_exp_special_values() -> None:
    x = np.array([-np.inf, -1e30, -104.0, -0.0, 0.0, 89.0, np.inf, np.nan], np.float32)
    y = native.kernels_exp("ref", x)
    np.testing.assert_array_equal(y, np.array([0, 0, 0, 1, 1, np.inf, np.inf, np.nan], np.float32))
    assert not np.signbit(y[:3]).any()


@pytest.mark.parametrize("isa", FAST)
def test_exp_has_the_bits_of_ref(isa: str) -> None:
    for x in (all_floats(), np.linspace(-104.5, 89.5, 300_001).astype(np.float32), np.float32([0.5] * 5)):
        assert_same_bits(native.kernels_exp(isa, x), native.kernels_exp("ref", x))


def test_rms_norm_is_the_formula() -> None:
    rng = np.random.default_rng(1)
    for n in WIDTHS:
        x = rng.normal(size=(3, n)).astype(np.float32) * np.float32([[1e-3], [1], [100]])
        w = rng.normal(size=n).astype(np.float32)
        wide = x.astype(np.float64)
        exact = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-5) * w
        np.testing.assert_allclose(native.kernels_rms_norm("ref", x, w, 1e-5), exact, rtol=1e-6)


@pytest.mark.parametrize("isa", FAST)
def test_rms_norm_has_the_bits_of_ref(isa: str) -> None:
    rng = np.random.default_rng(2)
    for n in WIDTHS:
        x = rng.normal(size=(5, n)).astype(np.float32)
        w = rng.normal(size=n).astype(np.float32)
        assert_same_bits(native.kernels_rms_norm(isa, x, w, 1e-6), native.kernels_rms_norm("ref", x, w, 1e-6))


ROPE_SHAPES = [  # heads, head_dim, half
    (1, 8, 4), (3, 16, 8), (1, 20, 5), (2, 64, 32), (2, 80, 16), (3, 80, 40), (1, 96, 48), (4, 128, 64), (1, 256, 128),
]  # fmt: skip


def rope_case(heads: int, head_dim: int, half: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    angle = rng.uniform(-4, 4, size=(5, half))
    x = rng.normal(size=(5, heads, head_dim)).astype(np.float32)
    return x, np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


@pytest.mark.parametrize("shape", ROPE_SHAPES)
def test_rope_is_the_formula(shape: tuple[int, int, int]) -> None:
    x, cos, sin = rope_case(*shape)
    half = shape[2]
    first, second = x[..., :half].astype(np.float64), x[..., half : 2 * half].astype(np.float64)
    c, s = cos[:, None, :].astype(np.float64), sin[:, None, :].astype(np.float64)
    exact = np.concatenate([first * c - second * s, second * c + first * s, x[..., 2 * half :]], axis=-1)
    actual = native.kernels_rope("ref", x, cos, sin)
    np.testing.assert_allclose(actual, exact, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(actual[..., 2 * half :], x[..., 2 * half :])


@pytest.mark.parametrize("isa", FAST)
@pytest.mark.parametrize("shape", ROPE_SHAPES)
def test_rope_has_the_bits_of_ref(isa: str, shape: tuple[int, int, int]) -> None:
    case = rope_case(*shape)
    assert_same_bits(native.kernels_rope(isa, *case), native.kernels_rope("ref", *case))


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS = [(native.kernels_silu_mul, silu), (native.kernels_gelu_tanh_mul, gelu_tanh)]


@pytest.mark.parametrize(("kernel", "formula"), ACTIVATIONS, ids=["silu", "gelu_tanh"])
def test_activation_is_the_formula(kernel, formula) -> None:
    rng = np.random.default_rng(4)
    gate = np.linspace(-12, 12, 30_000).astype(np.float32)[None, :]
    up = rng.normal(size=gate.shape).astype(np.float32)
    exact = formula(gate.astype(np.float64)) * up
    # The exponent u carries the rounding of a cubic, so exp(u) is off by up to |u| ulp.
    np.testing.assert_allclose(kernel("ref", gate, up), exact, rtol=2e-5 if formula is gelu_tanh else 1e-6, atol=1e-12)


@pytest.mark.parametrize(("kernel", "formula"), ACTIVATIONS, ids=["silu", "gelu_tanh"])
def test_activation_of_large_inputs_stays_finite(kernel, formula) -> None:
    gate = np.float32([[-3e38, -1e20, -1000, -89, 89, 1000, 1e20, 3e38]])
    out = kernel("ref", gate, np.ones_like(gate))
    np.testing.assert_allclose(out, np.maximum(gate, 0), atol=1e-30)


@pytest.mark.parametrize("isa", FAST)
@pytest.mark.parametrize(("kernel", "formula"), ACTIVATIONS, ids=["silu", "gelu_tanh"])
def test_activation_has_the_bits_of_ref(isa: str, kernel, formula) -> None:
    everything = all_floats()[None, :]
    ones = np.ones_like(everything)
    assert_same_bits(kernel(isa, everything, ones), kernel("ref", everything, ones))
    rng = np.random.default_rng(5)
    for n in WIDTHS:
        gate, up = rng.normal(scale=4, size=(2, 3, n)).astype(np.float32)
        assert_same_bits(kernel(isa, gate, up), kernel("ref", gate, up))


@pytest.mark.parametrize("isa", ["ref", *FAST])
def test_add_is_float_addition(isa: str) -> None:
    rng = np.random.default_rng(6)
    for n in WIDTHS:
        x, y = rng.normal(size=(2, 3, n)).astype(np.float32)
        assert_same_bits(native.kernels_add(isa, x, y), x + y)


@pytest.mark.parametrize("isa", ["ref", *FAST])
def test_a_row_does_not_depend_on_its_neighbours(isa: str) -> None:
    rng = np.random.default_rng(7)
    x, up = rng.normal(size=(2, 9, 200)).astype(np.float32)
    w = rng.normal(size=200).astype(np.float32)
    for row in range(9):
        one = slice(row, row + 1)
        assert_same_bits(native.kernels_rms_norm(isa, x[one], w, 1e-5), native.kernels_rms_norm(isa, x, w, 1e-5)[one])
        assert_same_bits(native.kernels_silu_mul(isa, x[one], up[one]), native.kernels_silu_mul(isa, x, up)[one])
