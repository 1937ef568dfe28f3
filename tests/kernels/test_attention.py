"""Paged attention: the cache formats, float64 softmax attention, and equality of every way to compute a row."""

from dataclasses import dataclass

import numpy as np
import pytest

from setpoint import _native as native

PAGE, SPLIT = 16, 512
FLOATS = ("f32", "f16", "bf16")
FORMATS = (*FLOATS, "s16")
LARGEST_CODE = np.float32(8191)


def available(isa: str) -> bool:
    try:
        native.kernels_exp(isa, np.zeros(1, np.float32))
    except RuntimeError:
        return False
    return True


FAST = [isa for isa in ("avx2", "avx512_vnni") if available(isa)]


def assert_same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.shape == expected.shape
    assert not np.isnan(actual).any()
    np.testing.assert_array_equal(actual.view(np.uint32), expected.view(np.uint32))


def to_bf16(x: np.ndarray) -> np.ndarray:
    u = x.view(np.uint32)
    return ((u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def codes_and_scale(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The s16 form of vectors x [..., head_dim]."""
    top = np.abs(x).max(axis=-1, keepdims=True)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        lost = ~(np.isfinite(top) & (top >= np.float32(2**-100)))
        codes = np.where(lost, 0, np.rint(x * (LARGEST_CODE / top)))
        scale = np.where(lost, np.where(np.isfinite(top), np.float32(0), np.float32(np.nan)), top / LARGEST_CODE)
    return codes.astype(np.int16), scale.astype(np.float32)


def page_bytes(kv_format: str, head_dim: int) -> int:
    return PAGE * head_dim * (4 if kv_format == "f32" else 2) + (PAGE * 4 if kv_format == "s16" else 0)


def through_format(x: np.ndarray, kv_format: str) -> np.ndarray:
    if kv_format == "s16":
        codes, scale = codes_and_scale(x)
        return codes * scale
    if kv_format == "f16":
        return x.astype(np.float16).astype(np.float32)
    if kv_format == "bf16":
        return (to_bf16(x).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return x


@dataclass
class Sequence:
    """k, v [tokens, kv_heads, head_dim] of one sequence, stored in shuffled pages of a cache full of NaN."""

    kv_format: str
    kv_heads: int
    group: int
    head_dim: int
    k: np.ndarray
    v: np.ndarray
    q: np.ndarray  # [tokens, kv_heads * group * head_dim]
    k_cache: np.ndarray
    v_cache: np.ndarray
    block_table: np.ndarray

    def attention(self, isa: str, position: int, rows: int, **options) -> np.ndarray:
        options.setdefault("scale", self.head_dim**-0.5)
        return native.kernels_attention(
            isa, self.kv_format, self.k_cache, self.v_cache, self.kv_heads, self.head_dim,
            options.pop("block_table", self.block_table), position, self.q[position : position + rows],
            options.pop("scale"), **options,
        )  # fmt: skip

    def exact(self, position: int, rows: int, window: int = 0) -> np.ndarray:
        k = np.repeat(through_format(self.k, self.kv_format).astype(np.float64), self.group, axis=1)
        v = np.repeat(through_format(self.v, self.kv_format).astype(np.float64), self.group, axis=1)
        q = self.q.astype(np.float64).reshape(len(self.q), -1, self.head_dim)
        out = []
        for t in range(position, position + rows):
            first = max(0, t - window + 1) if window else 0
            score = np.einsum("hd,thd->ht", q[t], k[first : t + 1]) * self.head_dim**-0.5
            p = np.exp(score - score.max(axis=1, keepdims=True))
            out.append(np.einsum("ht,thd->hd", p / p.sum(axis=1, keepdims=True), v[first : t + 1]).ravel())
        return np.array(out)


def nan_caches(kv_format: str, blocks: int, kv_heads: int, head_dim: int) -> list[np.ndarray]:
    """k and v caches in which every slot is NaN, in each of the formats."""
    return [np.full(blocks * kv_heads * page_bytes(kv_format, head_dim), 0xFF, np.uint8) for _ in "kv"]


def make_sequence(
    tokens: int, *, kv_format: str = "f16", kv_heads: int = 1, group: int = 3, head_dim: int = 64, seed: int = 0,
    spread: float = 2.0,
) -> Sequence:  # fmt: skip
    rng = np.random.default_rng((seed, tokens, kv_heads, group, head_dim))
    k = (rng.normal(size=(tokens, kv_heads, head_dim)) * spread).astype(np.float32)
    v = rng.normal(size=(tokens, kv_heads, head_dim)).astype(np.float32)
    q = rng.normal(size=(tokens, kv_heads * group * head_dim)).astype(np.float32)
    pages = -(-tokens // PAGE)
    caches = nan_caches(kv_format, pages + 5, kv_heads, head_dim)
    block_table = rng.permutation(pages + 5)[:pages].astype(np.int32)
    flat = (k.reshape(tokens, -1), v.reshape(tokens, -1))
    native.kernels_kv_store("ref", kv_format, *caches, kv_heads, block_table, 0, *flat)
    return Sequence(kv_format, kv_heads, group, head_dim, k, v, q, *caches, block_table)


# ----------------------------------------------------------------------------------------------------- the cache
def awkward_floats() -> np.ndarray:
    """Values around every rounding border of the 16-bit formats, and a walk over all floats."""
    halves = np.arange(2**16, dtype=np.uint32)
    f16 = halves.astype(np.uint16).view(np.float16).astype(np.float32)
    bf16 = (halves << np.uint32(16)).view(np.float32)
    walk = np.arange(0, 2**32, 20_011, dtype=np.uint64).astype(np.uint32).view(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        between = [((x[:-1].astype(np.float64) + x[1:]) / 2).astype(np.float32) for x in (f16, bf16)]
        near = [np.nextafter(x, np.float32(s) * np.float32(np.inf)) for x in between for s in (-1, 1)]
    x = np.concatenate([f16, bf16, walk, *between, *near])
    return np.resize(x, -(-len(x) // 64) * 64)


def stored(isa: str, kv_format: str, x: np.ndarray, kv_heads: int, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """The bit patterns of k and v [tokens, kv_heads, head_dim] after a store of x as both."""
    tokens = x.size // (kv_heads * head_dim)
    pages = -(-tokens // PAGE)
    dtype = np.uint32 if kv_format == "f32" else np.uint16
    caches = [np.zeros(pages * kv_heads * PAGE * head_dim * dtype().itemsize, np.uint8) for _ in "kv"]
    rows = x.reshape(tokens, kv_heads * head_dim)
    native.kernels_kv_store(isa, kv_format, *caches, kv_heads, np.arange(pages, dtype=np.int32), 0, rows, rows)
    k = caches[0].view(dtype).reshape(pages, kv_heads, head_dim, PAGE).transpose(0, 3, 1, 2)
    v = caches[1].view(dtype).reshape(pages, kv_heads, PAGE, head_dim).transpose(0, 2, 1, 3)
    return tuple(a.reshape(pages * PAGE, kv_heads, head_dim)[:tokens] for a in (k, v))


@pytest.mark.parametrize("isa", ["ref", *FAST])
@pytest.mark.parametrize("kv_format", FLOATS)
def test_store_rounds_to_nearest_even_and_saturates(isa: str, kv_format: str) -> None:
    x = awkward_floats()
    k, v = stored(isa, kv_format, x, 2, 32)
    nan = np.isnan(x)
    with np.errstate(over="ignore"):
        if kv_format == "f32":
            expected = x.view(np.uint32)
        elif kv_format == "f16":
            expected = np.clip(x, -65504, 65504).astype(np.float16).view(np.uint16)
        else:
            largest = np.uint32(0x7F7F0000).view(np.float32)
            expected = to_bf16(np.clip(x, -largest, largest))
    for actual in (k.ravel(), v.ravel()):
        np.testing.assert_array_equal(actual[~nan], expected[~nan])
        if kv_format != "f32":
            infinity = 0x7C00 if kv_format == "f16" else 0x7F80
            assert np.all((actual[nan] & 0x7FFF) > infinity)


@pytest.mark.parametrize("isa", ["ref", *FAST])
@pytest.mark.parametrize("head_dim", [8, 64, 80])
def test_store_of_integers(isa: str, head_dim: int) -> None:
    """One scale per (token, head), codes to nearest even; nothing that is lost is hidden."""
    rng = np.random.default_rng(3)
    x = (rng.normal(size=(33, 2, head_dim)) * 10.0 ** rng.integers(-20, 20, size=(33, 2, 1))).astype(np.float32)
    x[1, 0] = 0
    x[2, 1, 3:5] = 1e-35  # below what 16 bits beside the others can hold
    x[3, 0] = 1e-38
    x[4, 1, 5] = np.inf
    x[5, 0, 7] = np.nan
    x[6, 1, :2] = -np.inf, np.nan
    x[7] = np.arange(2 * head_dim).reshape(2, -1) - 8190.5  # halves, with a greatest magnitude of 8191
    x[7, :, 0] = 8191
    caches = nan_caches("s16", 3, 2, head_dim)
    rows = x.reshape(33, -1)
    native.kernels_kv_store(isa, "s16", *caches, 2, np.arange(3, dtype=np.int32), 0, rows, rows)
    codes, scale = codes_and_scale(x)
    pages = [cache.reshape(3, 2, -1) for cache in caches]
    halves = [page[..., :-64].copy().view(np.int16) for page in pages]
    k = halves[0].reshape(3, 2, head_dim // 2, PAGE, 2).transpose(0, 3, 1, 2, 4).reshape(48, 2, head_dim)
    v = halves[1].reshape(3, 2, PAGE // 2, head_dim, 2).transpose(0, 2, 4, 1, 3).reshape(48, 2, head_dim)
    for stored_codes, page in ((k, pages[0]), (v, pages[1])):
        np.testing.assert_array_equal(stored_codes[:33], codes)
        assert np.all(stored_codes[33:] == -1)  # neighbours untouched
        scales = page[..., -64:].copy().view(np.float32).transpose(0, 2, 1).reshape(48, 2)
        np.testing.assert_array_equal(scales[:33], scale[..., 0])
        assert np.all(np.isnan(scales[33:]))


@pytest.mark.parametrize("isa", FAST)
@pytest.mark.parametrize("kv_format", FORMATS)
def test_store_has_the_bytes_of_ref_at_any_offset(isa: str, kv_format: str) -> None:
    rng = np.random.default_rng(0)
    for head_dim, kv_heads in ((8, 3), (24, 1), (64, 2), (80, 2)):
        k, v = rng.normal(size=(2, 40, kv_heads * head_dim)).astype(np.float32)
        results = []
        for name in (isa, "ref"):
            caches = nan_caches(kv_format, 8, kv_heads, head_dim)
            table = np.array([6, 0, 3, 5], np.int32)
            native.kernels_kv_store(name, kv_format, *caches, kv_heads, table, 13, k, v)
            results.append(caches)
        np.testing.assert_array_equal(results[0], results[1])


@pytest.mark.parametrize("isa", ["ref", *FAST])
def test_f16_values_are_read_exactly(isa: str) -> None:
    """One visible token has probability 1: attention returns v as the cache holds it, subnormals included."""
    halves = np.arange(2**16, dtype=np.uint16)
    halves = halves[np.isfinite(halves.view(np.float16))].reshape(-1, 64)
    k_cache = np.zeros(PAGE * 64 * 2, np.uint8)
    for row in halves[::7]:
        v_cache = np.full((PAGE, 64), 0xFFFF, np.uint16)
        v_cache[0] = row
        table, q = np.zeros(1, np.int32), np.ones((1, 64), np.float32)
        out = native.kernels_attention(isa, "f16", k_cache, v_cache.view(np.uint8).ravel(), 1, 64, table, 0, q, 1.0)
        np.testing.assert_array_equal(out[0], row.view(np.float16).astype(np.float32))


# ------------------------------------------------------------------------------------------------ the right answer
SHAPES = [  # head_dim, kv_heads, group
    (8, 2, 1), (16, 1, 4), (20, 1, 2), (24, 1, 2), (64, 2, 3), (64, 1, 7), (64, 1, 16), (80, 1, 2), (96, 1, 1),
    (128, 1, 5), (256, 1, 4),
]  # fmt: skip
SPANS = [(0, 1), (5, 1), (0, 16), (15, 2), (48, 16), (63, 1), (64, 1), (60, 9), (130, 16)]
LONG_SPANS = [(500, 16), (511, 1), (512, 1), (505, 16), (1020, 16), (1099, 1)]
WINDOWS = (0, 1, 7, 64, 100)


@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_ref_is_softmax_attention(shape: tuple[int, int, int], kv_format: str) -> None:
    head_dim, kv_heads, group = shape
    s = make_sequence(150, kv_format=kv_format, head_dim=head_dim, kv_heads=kv_heads, group=group)
    for position, rows in SPANS:
        for window in WINDOWS:
            actual = s.attention("ref", position, rows, window=window)
            np.testing.assert_allclose(actual, s.exact(position, rows, window), rtol=0, atol=tolerance(kv_format))


def tolerance(kv_format: str) -> float:
    """s16 rounds queries and probabilities too, to 14 bits of the greatest."""
    return 4e-3 if kv_format == "s16" else 1e-5


@pytest.mark.parametrize("kv_format", ["f16", "s16"])
def test_ref_is_softmax_attention_across_splits(kv_format: str) -> None:
    s = make_sequence(1100, group=2, kv_format=kv_format)
    for position, rows in LONG_SPANS:
        for window in (0, 300, 512, 600):
            actual = s.attention("ref", position, rows, window=window)
            np.testing.assert_allclose(actual, s.exact(position, rows, window), rtol=0, atol=tolerance(kv_format))


# ------------------------------------------------------------------------------------------------- the same answer
def assert_equals_ref(s: Sequence, isa: str, position: int, rows: int, window: int = 0) -> None:
    ref = s.attention("ref", position, rows, window=window)
    assert_same_bits(s.attention(isa, position, rows, window=window), ref)


@pytest.mark.parametrize("isa", FAST)
@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_fast_attention_has_the_bits_of_ref(isa: str, shape: tuple[int, int, int], kv_format: str) -> None:
    head_dim, kv_heads, group = shape
    s = make_sequence(150, kv_format=kv_format, head_dim=head_dim, kv_heads=kv_heads, group=group)
    for position, rows in SPANS:
        for window in WINDOWS:
            assert_equals_ref(s, isa, position, rows, window)


@pytest.mark.parametrize("isa", FAST)
@pytest.mark.parametrize("group", range(1, 17))
@pytest.mark.parametrize("kv_format", ["f16", "s16"])
def test_every_group_size(isa: str, group: int, kv_format: str) -> None:
    s = make_sequence(90, head_dim=32, group=group, kv_heads=2, kv_format=kv_format)
    for position, rows in ((77, 1), (70, 5)):
        assert_equals_ref(s, isa, position, rows)


@pytest.mark.parametrize("isa", FAST)
@pytest.mark.parametrize("kv_format", FORMATS)
def test_fast_attention_has_the_bits_of_ref_across_splits(isa: str, kv_format: str) -> None:
    s = make_sequence(1100, kv_format=kv_format, head_dim=32)
    for position, rows in LONG_SPANS:
        for window in (0, 300, 512, 600):
            assert_equals_ref(s, isa, position, rows, window)


@pytest.mark.parametrize("isa", ["ref", *FAST])
@pytest.mark.parametrize("window", [0, 5, 64, 200])
@pytest.mark.parametrize("kv_format", ["f16", "s16"])
def test_a_row_is_the_same_alone_and_in_any_chunk(isa: str, window: int, kv_format: str) -> None:
    s = make_sequence(580, head_dim=16, group=2, spread=4.0, kv_format=kv_format)
    alone = np.concatenate([s.attention(isa, t, 1, window=window) for t in range(580)])
    for chunk in (2, 3, 7, 16):
        chunked = [s.attention(isa, t, min(chunk, 580 - t), window=window) for t in range(0, 580, chunk)]
        assert_same_bits(np.concatenate(chunked), alone)


@pytest.mark.parametrize("isa", FAST)
@pytest.mark.parametrize("kv_format", ["f32", "s16"])
def test_extreme_scores_keep_the_bits_of_ref(isa: str, kv_format: str) -> None:
    """Large spreads make most probabilities underflow, and rescale by zero."""
    for seed, spread in enumerate((30.0, 300.0, 3000.0)):
        s = make_sequence(600, kv_format=kv_format, head_dim=16, spread=spread, seed=seed)
        s.v[:] = 0
        for position, rows in ((590, 9), (63, 3), (127, 16)):
            assert_same_bits(s.attention(isa, position, rows), s.attention("ref", position, rows))
            alone = np.concatenate([s.attention(isa, position + i, 1) for i in range(rows)])
            assert_same_bits(s.attention(isa, position, rows), alone)


@pytest.mark.parametrize("isa", ["ref", *FAST])
@pytest.mark.parametrize("spread", [1e-45, 30.0])
def test_signed_zeros_do_not_depend_on_the_tile(isa: str, spread: float) -> None:
    """Scores and values that underflow to -0 must not tell a row alone from a row whose tile adds 0 * v terms."""
    rng = np.random.default_rng(8)
    s = make_sequence(48, kv_format="f32", head_dim=16, group=1, spread=spread)
    v = rng.choice(np.float32([-1e-45, -0.0, 0.0, 1e-45]), size=(48, 16))
    native.kernels_kv_store("ref", "f32", s.k_cache, s.v_cache, 1, s.block_table, 0, s.k.reshape(48, 16), v)
    for partial in (False, True):
        alone = np.concatenate([s.attention(isa, t, 1, partial=partial) for t in range(48)])
        chunked = [s.attention(isa, t, 16, partial=partial) for t in range(0, 48, 16)]
        ref = [s.attention("ref", t, 16, partial=partial) for t in range(0, 48, 16)]
        assert_same_bits(np.concatenate(chunked), alone)
        assert_same_bits(np.array(chunked), np.array(ref))


@pytest.mark.parametrize("isa", ["ref", *FAST])
def test_the_maximum_of_zero_scores_is_plus_zero(isa: str) -> None:
    """Which of -0 and +0 a maximum returns depends on the order of its operands, so the definition fixes it."""
    s = make_sequence(20, kv_format="f32", head_dim=8, spread=0.0)
    partial = s.attention(isa, 17, 3, scale=-1.0, partial=True)
    np.testing.assert_array_equal(partial[..., 0].view(np.uint32), 0)


@pytest.mark.parametrize("isa", ["ref", *FAST])
@pytest.mark.parametrize("kv_format", ["f16", "s16"])
def test_pages_below_the_window_are_never_read(isa: str, kv_format: str) -> None:
    s = make_sequence(700, head_dim=32, kv_format=kv_format)
    for position, rows, window in ((699, 1, 100), (600, 16, 64), (530, 16, 10), (512, 2, 1)):
        table = s.block_table.copy()
        table[: (position - window + 1) // PAGE] = -1
        table[(position + rows - 1) // PAGE + 1 :] = -1
        freed = s.attention(isa, position, rows, window=window, block_table=table)
        assert_same_bits(freed, s.attention("ref", position, rows, window=window))


@pytest.mark.parametrize("isa", ["ref", *FAST])
def test_garbage_in_unwritten_slots_never_reaches_an_output(isa: str) -> None:
    """make_sequence leaves NaN behind the last token; here the tail of the table is rewritten with other garbage."""
    s = make_sequence(40, head_dim=16, kv_format="f32")
    clean = s.attention(isa, 33, 3)
    k, v = (c.view(np.float32).reshape(-1, PAGE * 16) for c in (s.k_cache, s.v_cache))
    last = s.block_table[2]
    for garbage in (np.nan, np.inf, -np.inf, 3e38):
        k[last].reshape(16, PAGE)[:, 4:] = garbage  # tokens 36 and later
        v[last].reshape(PAGE, 16)[4:] = garbage
        assert_same_bits(s.attention(isa, 33, 3), clean)


@pytest.mark.parametrize("isa", ["ref", *FAST])
@pytest.mark.parametrize("kv_format", FORMATS)
def test_partial_then_merge_is_the_direct_result(isa: str, kv_format: str) -> None:
    s = make_sequence(1100, kv_format=kv_format, kv_heads=2, group=2, head_dim=24)
    for position, rows in LONG_SPANS:
        for window in (0, 300):
            direct = s.attention(isa, position, rows, window=window)
            whole = s.attention(isa, position, rows, window=window, partial=True)
            assert_same_bits(native.kernels_attention_merge(isa, whole), direct)
            last = (position + rows - 1) // SPLIT
            pieces = [
                s.attention(isa, position, rows, window=window, partial=True, split_begin=i, split_end=i + 1)
                for i in range(last + 1)
            ]
            assert_same_bits(native.kernels_attention_merge(isa, np.concatenate(pieces, axis=2)), direct)
            assert_same_bits(native.kernels_attention_merge("ref", np.concatenate(pieces, axis=2)), direct)
            shared = sum(  # one buffer that several threads would fill, a split each
                s.attention(isa, position, rows, window=window, partial=True, partial_splits=last + 1, split_begin=i,
                            split_end=i + 1)
                for i in range(last + 1)
            )  # fmt: skip
            assert_same_bits(native.kernels_attention_merge(isa, shared), direct)


@pytest.mark.parametrize("isa", ["ref", *FAST])
@pytest.mark.parametrize("kv_format", ["f16", "s16"])
def test_heads_may_be_shared_out(isa: str, kv_format: str) -> None:
    """A call for some of the heads writes what the call for all of them writes there, and nothing else."""
    s = make_sequence(700, kv_heads=3, group=3, head_dim=24, kv_format=kv_format)
    for position, rows in ((699, 1), (600, 16)):
        for window in (0, 100):
            whole = s.attention(isa, position, rows, window=window)
            partial = s.attention(isa, position, rows, window=window, partial=True)
            for begin, end in ((0, 1), (1, 3), (2, 3)):
                width = slice(begin * 3 * 24, end * 3 * 24)
                some = s.attention(isa, position, rows, window=window, head_begin=begin, head_end=end)
                assert_same_bits(some[:, width], whole[:, width])
                assert not np.delete(some, np.arange(width.start, width.stop), axis=1).any()
                some = s.attention(isa, position, rows, window=window, head_begin=begin, head_end=end, partial=True)
                assert_same_bits(some, partial[:, begin * 3 : end * 3])


@pytest.mark.parametrize("isa", ["ref", *FAST])
def test_integer_slots_without_a_token_never_reach_an_output(isa: str) -> None:
    """A token's codes share words with its neighbour's, which may not be there yet."""
    s = make_sequence(40, head_dim=16, kv_format="s16")
    clean = {position: s.attention(isa, position, 1) for position in (32, 33, 38)}
    for position, expected in clean.items():
        short = nan_caches("s16", len(s.k_cache) // page_bytes("s16", 16), 1, 16)
        flat = (s.k[: position + 1].reshape(position + 1, -1), s.v[: position + 1].reshape(position + 1, -1))
        native.kernels_kv_store(isa, "s16", *short, 1, s.block_table, 0, *flat)
        s.k_cache, s.v_cache = short
        assert_same_bits(s.attention(isa, position, 1), expected)


@pytest.mark.parametrize("isa", ["ref", *FAST])
@pytest.mark.parametrize("poisoned", ["k", "v"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_integers_cannot_hold_is_not_hidden(isa: str, poisoned: str, value: float) -> None:
    s = make_sequence(100, head_dim=16, kv_format="s16", kv_heads=2)
    getattr(s, poisoned)[70, 1, 3] = value
    flat = (s.k.reshape(100, -1), s.v.reshape(100, -1))
    native.kernels_kv_store(isa, "s16", s.k_cache, s.v_cache, 2, s.block_table, 0, *flat)
    out = s.attention(isa, 68, 4).reshape(4, 2, 3, 16)
    assert np.isnan(out[2:, 1]).all()
    assert not np.isnan(out[:2]).any()
    assert not np.isnan(out[:, 0]).any()


@pytest.mark.parametrize("isa", ["ref", *FAST])
@pytest.mark.parametrize("outlier", [20.0, 100.0])
def test_outlier_channels_cost_no_more_than_f16(isa: str, outlier: float) -> None:
    """Two K channels far above the others, as biases make them: the one scale is theirs."""
    errors = {}
    for kv_format in ("f16", "s16"):
        s = make_sequence(300, kv_heads=2, kv_format=kv_format, spread=1.0)
        s.k[..., [5, 40]] *= outlier
        s.q.reshape(300, -1, 64)[..., [5, 40]] /= outlier / 20
        flat = (s.k.reshape(300, -1), s.v.reshape(300, -1))
        native.kernels_kv_store(isa, kv_format, s.k_cache, s.v_cache, 2, s.block_table, 0, *flat)
        exact = Sequence("f32", 2, 3, 64, s.k, s.v, s.q, s.k_cache, s.v_cache, s.block_table).exact(290, 8)
        errors[kv_format] = np.linalg.norm(s.attention(isa, 290, 8) - exact) / np.linalg.norm(exact)
    assert errors["s16"] <= max(2 * errors["f16"], outlier * 1e-4)


@pytest.mark.parametrize("isa", ["ref", *FAST])
@pytest.mark.parametrize("kv_format", ["f32", "s16"])
def test_nan_in_a_visible_token_is_not_hidden(isa: str, kv_format: str) -> None:
    s = make_sequence(20, head_dim=16, kv_format=kv_format)
    s.q[19, :16] = np.nan  # one head of the last row
    out = s.attention(isa, 17, 3).reshape(3, 3, 16)
    assert np.isnan(out[2, 0]).all()
    assert not np.isnan(out[:2]).any()
    assert not np.isnan(out[2, 1:]).any()
