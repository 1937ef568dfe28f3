"""The native sampler against an oracle in float64: same uniform number, same token."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from setpoint import _native

INT_MIN, INT_MAX = -(1 << 31), (1 << 31) - 1
OUTSIDE = [-1, INT_MIN, INT_MAX]


def available_isas() -> list[str]:
    names = []
    for isa in ("ref", "avx2", "avx512_vnni"):
        try:
            _native.kernels_sample(np.zeros(1, np.float32), isa=isa)
        except RuntimeError:
            continue
        names.append(isa)
    return names


ISAS = available_isas()


def sample(logits, **fields):
    return _native.kernels_sample(np.asarray(logits, np.float32), **fields)


def token_of(logits, **fields) -> int:
    result = sample(logits, **fields)
    assert result["finite"]
    return result["token"]


# ------------------------------------------------------------------------------------------------------ the oracle


WORDS = st.integers(0, (1 << 32) - 1)


def unpacked(mask, vocab):
    return np.unpackbits(np.array(mask, np.uint32).view(np.uint8), bitorder="little")[:vocab].astype(bool)


def processed(
    logits, *, mask=None, allowed=None, banned=(), bias_ids=(), bias_values=(), repetition=1.0, frequency=0.0,
    presence=0.0, penalty_ids=(), penalty_counts=(), **_,
):  # fmt: skip
    """The logits after all processors, with the roundings of float32, so that ties stay ties."""
    x = np.array(logits, np.float32)
    if mask is not None:
        x[~unpacked(mask, len(x))] = -np.inf
    if allowed is not None:
        x[[i for i in range(len(x)) if i not in set(allowed)]] = -np.inf
    x[list(banned)] = -np.inf
    for token, value in zip(bias_ids, bias_values, strict=True):
        x[token] += np.float32(value)
    for token, count in zip(penalty_ids, penalty_counts, strict=True):
        x[token] = x[token] / np.float32(repetition) if x[token] > 0 else x[token] * np.float32(repetition)
        if count > 0:
            x[token] = (x[token] - np.float32(count) * np.float32(frequency)) - np.float32(presence)
    return x


def distribution(x, *, temperature=1.0, min_p=0.0, top_k=0, top_p=1.0, **_):
    """Probabilities in float64 of processed logits; tokens rank by (logit descending, id ascending)."""
    ranked = np.lexsort((np.arange(len(x)), -x.astype(np.float64)))
    p = np.exp((x.astype(np.float64) - x.max()) / temperature)
    p[p < min_p * p.max()] = 0
    if 0 < top_k < len(x):
        p[ranked[top_k:]] = 0
    p /= p.sum()
    if top_p < 1:
        before = np.cumsum(p[ranked]) - p[ranked]
        p[ranked[1:][before[1:] >= top_p]] = 0
        p /= p.sum()
    return p


def expected_tokens(logits, **fields) -> set[int]:
    """The token the oracle draws with the same uniform number, or the few that rounding leaves open."""
    x = processed(logits, **fields)
    if not fields.get("temperature", 1.0):
        return {int(np.argmax(x))}
    uniform = _native.random_uniform(fields.get("seed", 0), fields.get("position", 0))
    tokens = set()
    for mass, least, shift in itertools.product((1 - 2e-6, 1, 1 + 2e-6), repeat=3):
        near = fields | {"top_p": fields.get("top_p", 1.0) * mass, "min_p": fields.get("min_p", 0.0) * least}
        if fields.get("top_p", 1.0) == 1:
            near["top_p"] = 1.0
        if near["min_p"] > 1:
            continue
        cumulative = np.cumsum(distribution(x, **near))
        last = np.flatnonzero(np.diff(cumulative, prepend=0))[-1]
        tokens.add(int(min(np.searchsorted(cumulative, uniform + (shift - 1), side="right"), last)))
    return tokens


def rows_and_fields():
    """Small rows on a coarse grid (many ties), every processor on or off."""

    @st.composite
    def build(draw):
        vocab = draw(st.integers(1, 40))
        grid = st.integers(-24, 24).map(lambda k: k / 4)
        logits = draw(st.lists(st.one_of(grid, st.just(-math.inf)), min_size=vocab, max_size=vocab))
        some_ids = st.lists(st.integers(0, vocab - 1), unique=True, max_size=8)
        fields = {
            "temperature": draw(st.sampled_from([0.0, 0.25, 0.7, 1.0, 2.0])),
            "top_k": draw(st.integers(0, vocab + 1)),
            "top_p": draw(st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.999, 1.0])),
            "min_p": draw(st.sampled_from([0.0, 0.01, 0.3, 1.0])),
            "seed": draw(st.integers(0, (1 << 64) - 1)),
            "position": draw(st.integers(0, 1 << 40)),
            "repetition": draw(st.sampled_from([0.5, 1.0, 1.3, 10.0])),
            "frequency": draw(st.sampled_from([-2.0, 0.0, 0.3])),
            "presence": draw(st.sampled_from([-0.5, 0.0, 2.0])),
            "banned": draw(some_ids),
            "allowed": draw(st.none() | some_ids),
            "mask": draw(st.none() | st.lists(WORDS, min_size=-(-vocab // 32), max_size=-(-vocab // 32))),
        }
        fields["penalty_ids"] = draw(some_ids)
        fields["penalty_counts"] = [draw(st.integers(0, 3)) for _ in fields["penalty_ids"]]
        fields["bias_ids"] = draw(some_ids)
        fields["bias_values"] = [draw(st.sampled_from([-100.0, -1.5, 0.25, 100.0])) for _ in fields["bias_ids"]]
        return logits, fields

    return build()


@given(rows_and_fields())
@settings(max_examples=250, deadline=None)
def test_any_combination_draws_the_token_of_the_oracle(case):
    logits, fields = case
    for isa in ISAS:
        result = sample(logits, isa=isa, **fields)
        if np.isneginf(logits).all() or np.isneginf(processed(logits, **fields)).all():
            assert not result["finite"]
            assert result["token"] == -1
        else:
            assert result["finite"]
            assert result["token"] in expected_tokens(logits, **fields)


PROCESSORS = [
    {},
    {"temperature": 0.3},
    {"temperature": 1.7},
    {"min_p": 0.02},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 3000},
    {"top_p": 0.05},
    {"top_p": 0.9},
    {"top_p": 0.999, "temperature": 2.0},
    {"top_k": 300, "top_p": 0.8, "min_p": 0.001, "temperature": 1.2},
    {"allowed": [3, 700, 4999], "banned": [700]},
    {"mask": [0x0F0F0F0F] * 100 + [0] * 56 + [0xFFFFFFFF]},
    {"bias_ids": [17, 4000], "bias_values": [12.5, -100.0]},
    {"repetition": 1.5, "penalty_ids": list(range(0, 5000, 3)), "penalty_counts": [0] * 1667},
    {"frequency": 0.4, "presence": 1.0, "penalty_ids": list(range(0, 5000, 2)), "penalty_counts": [0, 1, 7, 2] * 625},
]


@pytest.mark.parametrize("fields", PROCESSORS, ids=lambda fields: "+".join(fields) or "unfiltered")
def test_a_real_vocabulary_draws_the_token_of_the_oracle(fields):
    logits = np.random.default_rng(7).normal(0, 3, 5000).astype(np.float32)
    logits[[41, 4242]] += 9
    tokens = set()
    for position in range(40):
        token = token_of(logits, seed=5, position=position, **fields)
        assert token in expected_tokens(logits, seed=5, position=position, **fields)
        tokens.add(token)
    if distribution(processed(logits, **fields), **fields).max() < 0.9:
        assert len(tokens) > 1


# ------------------------------------------------------------------------------------------------------------ draws


@pytest.mark.parametrize(
    "fields",
    [{}, {"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 6, "top_p": 0.9, "min_p": 0.1}],
    ids=lambda fields: "+".join(fields) or "unfiltered",
)
def test_draws_follow_the_distribution(fields):
    logits = np.array([0.0, 1.5, -1.0, 2.0, 0.5, 0.5, -3.0, 1.0, -math.inf, 2.5], np.float32)
    num_draws = 20_000
    counts = np.zeros(len(logits))
    for position in range(num_draws):
        counts[token_of(logits, seed=99, position=position, **fields)] += 1
    expected = distribution(logits, **fields) * num_draws
    possible = expected > 0
    assert not counts[~possible].any()
    chi_square = float(((counts - expected)[possible] ** 2 / expected[possible]).sum())
    freedom = int(possible.sum()) - 1
    # Wilson and Hilferty's normal approximation; 3.3 sigma is a chance of 1 in 2000, and the seed is fixed
    bound = freedom * (1 - 2 / (9 * freedom) + 3.3 * math.sqrt(2 / (9 * freedom))) ** 3
    assert chi_square < bound


def philox4x32(counter: list[int], key: list[int]) -> list[int]:
    low = (1 << 32) - 1
    for _ in range(10):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [(b >> 32) ^ counter[1] ^ key[0], b & low, (a >> 32) ^ counter[3] ^ key[1], a & low]
        key = [(key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low]
    return counter


def test_the_generator_is_philox():
    # known answers of Random123 1.14 (kat_vectors, philox4x32 10)
    assert philox4x32([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    assert philox4x32(pi, [0xA4093822, 0x299F31D0]) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]
    for seed, position in [(0, 0), (1, 0), (0, 1), (0x299F31D0A4093822, (1 << 63) - 1), ((1 << 64) - 1, 1 << 33)]:
        low = (1 << 32) - 1
        words = philox4x32([position & low, position >> 32, 0, 0], [seed & low, seed >> 32])
        assert _native.random_uniform(seed, position) == ((words[0] << 32 | words[1]) >> 11) * 2.0**-53


def test_a_draw_depends_on_seed_and_position_alone():
    logits = np.random.default_rng(1).normal(0, 1, 1000).astype(np.float32)

    def draws(seed):
        return [token_of(logits, seed=seed, position=position) for position in range(50)]

    assert draws(3) == draws(3)
    assert draws(3) != draws(4)
    assert len(set(draws(3))) > 40


def test_every_isa_gives_the_same_bits():
    generator = np.random.default_rng(2)
    for vocab in (1, 15, 255, 257, 5003):
        logits = generator.normal(0, 4, vocab).astype(np.float32)
        for fields in ({"temperature": 0.0}, {}, {"top_p": 0.9}, {"top_k": 30, "min_p": 0.01}):
            for position in range(10):
                fields |= {"position": position, "num_logprobs": 20}
                assert all(sample(logits, isa=isa, **fields) == sample(logits, isa="ref", **fields) for isa in ISAS)


def test_extreme_temperatures():
    logits = np.array([1.0, 1.0001, -5.0, 0.0], np.float32)
    for position in range(200):
        assert token_of(logits, temperature=1e-45, position=position) == 1
    assert {token_of(logits, temperature=3e38, position=position) for position in range(200)} == {0, 1, 2, 3}
    tied = np.array([-3e38, 3e38, 3e38], np.float32)
    assert {token_of(tied, temperature=1e-30, position=position) for position in range(200)} == {1, 2}


# ------------------------------------------------------------------------------------------------------- exact cases


@pytest.mark.parametrize("vocab", [1, 2, 16, 255, 256, 257, 1000])
def test_greedy_ties_go_to_the_lowest_id(vocab):
    generator = np.random.default_rng(vocab)
    for _ in range(20):
        logits = generator.integers(-2, 2, vocab).astype(np.float32)
        assert token_of(logits, temperature=0.0) == int(np.argmax(logits))
        assert token_of(logits, top_k=1, position=vocab) == int(np.argmax(logits))
        assert token_of(logits, top_p=1e-9, position=vocab) == int(np.argmax(logits))
    assert token_of(np.zeros(vocab), temperature=0.0) == 0
    assert token_of([-0.0, 0.0], top_k=1) == 0


def support(logits, **fields) -> set[int]:
    return {token_of(logits, position=position, **fields) for position in range(400)}


def test_the_sets_are_exact():
    halves = np.log(np.array([0.25, 0.5, 0.125, 0.125]))
    assert support(halves) == {0, 1, 2, 3}
    assert support(halves, top_k=2) == {0, 1}
    assert support(halves, top_k=3) == {0, 1, 2}  # of two equal tokens the lower id
    assert support(halves, top_p=0.49) == {1}
    assert support(halves, top_p=0.51) == {0, 1}
    assert support(halves, top_p=0.8) == {0, 1, 2}
    assert support(halves, min_p=0.4) == {0, 1}
    assert support(halves, min_p=1.0) == {1}
    assert support(np.zeros(4), top_p=0.5) == {0, 1}  # reached exactly: the smallest set
    assert support(halves, top_k=2, top_p=0.6) == {1}  # top_p weighs what top_k left: 2/3 and 1/3
    assert support(halves, min_p=0.4, top_p=0.6) == {1}
    assert support(np.zeros(1024), top_p=1 / 256) == {0, 1, 2, 3}
    assert support(np.zeros(1000), top_k=4) == {0, 1, 2, 3}


def test_penalties_and_bias_in_their_order():
    logits = [2.0, 1.9, -1.0, -1.1]
    greedy = {"temperature": 0.0}
    assert token_of(logits, **greedy, repetition=2.0, penalty_ids=[0], penalty_counts=[0]) == 1
    assert token_of(logits, **greedy, presence=0.2, penalty_ids=[0], penalty_counts=[1]) == 1
    assert token_of(logits, **greedy, presence=0.2, penalty_ids=[0], penalty_counts=[0]) == 0  # in the prompt only
    assert token_of(logits, **greedy, frequency=0.02, penalty_ids=[0], penalty_counts=[4]) == 0
    assert token_of(logits, **greedy, frequency=0.02, penalty_ids=[0], penalty_counts=[6]) == 1
    # negative logits are multiplied: -1.0 becomes -2.0
    assert token_of(logits, **greedy, banned=[0, 1], repetition=2.0, penalty_ids=[2], penalty_counts=[0]) == 3
    # bias comes before the repetition penalty: (2 + 2) / 2.5 = 1.6 < 1.9 < 2 / 2.5 + 2
    fields = {"bias_ids": [0], "bias_values": [2.0], "repetition": 2.5, "penalty_ids": [0], "penalty_counts": [0]}
    assert token_of(logits, **greedy, **fields) == 1
    assert token_of(logits, **greedy, banned=[0]) == 1
    assert token_of(logits, **greedy, allowed=[2, 3], bias_ids=[0], bias_values=[100.0]) == 2
    assert token_of(logits, **greedy, allowed=[0, 1], banned=[0]) == 1
    # a penalty too small for float32 is no reason to fail
    assert token_of(logits, repetition=1e-45, penalty_ids=[1], penalty_counts=[1], position=3) == 1


# --------------------------------------------------------------------------------------------------------- logprobs


@pytest.mark.parametrize("vocab", [1, 3, 20, 300, 49152])
def test_logprobs_are_those_of_the_raw_logits(vocab):
    logits = np.random.default_rng(vocab).normal(0, 4, vocab).astype(np.float32)
    exact = logits.astype(np.float64) - logits.max()
    exact -= np.log(np.exp(exact).sum())
    ranked = np.lexsort((np.arange(vocab), -logits))
    biased = int(ranked[-1])
    fields = {"temperature": 0.5, "bias_ids": [biased], "bias_values": [100.0], "num_logprobs": 20}
    result = sample(logits, **fields)
    assert result["token"] == biased
    assert result["rank"] == vocab
    assert result["logprob"] == pytest.approx(exact[biased], abs=4e-6)
    assert result["top_ids"] == ranked[:20].tolist()
    np.testing.assert_allclose(result["top_logprobs"], exact[ranked[:20]], atol=4e-6)
    for target in ranked[[0, vocab // 2]].tolist():
        scored = sample(logits, target=target, banned=[target], num_logprobs=2)
        assert scored["token"] == target
        assert scored["rank"] == ranked.tolist().index(target) + 1
        assert scored["logprob"] == pytest.approx(exact[target], abs=4e-6)
        assert scored["top_ids"] == ranked[:2].tolist()


@given(st.lists(st.integers(-3, 3) | st.just(-math.inf), min_size=1, max_size=60), st.data())
@example([-math.inf, 0.0], None)
@settings(max_examples=200, deadline=None)
def test_ranks_and_top_ids_break_ties_by_id(logits, data):
    if all(x == -math.inf for x in logits):
        assert not sample(logits, num_logprobs=3)["finite"]
        return
    target = data.draw(st.integers(0, len(logits) - 1)) if data else 1
    count = data.draw(st.integers(0, 20)) if data else 20
    ranked = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    result = sample(logits, target=target, num_logprobs=count)
    assert result["rank"] == ranked.index(target) + 1
    assert result["top_ids"] == [i for i in ranked if logits[i] > -math.inf][:count]
    assert all(math.isfinite(value) for value in result["top_logprobs"])


def test_logprobs_do_not_change_the_draw():
    logits = np.random.default_rng(4).normal(0, 3, 2000).astype(np.float32)
    for position in range(50):
        fields = {"position": position, "top_p": 0.9, "banned": [5], "top_k": 100}
        assert sample(logits, num_logprobs=20, **fields)["token"] == sample(logits, **fields)["token"]


# ----------------------------------------------------------------------------------------------------------- guards


@pytest.mark.parametrize("vocab", [1, 7, 300, 1024])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_draws_nothing(vocab, bad):
    for place in {0, vocab // 2, vocab - 1}:
        logits = np.zeros(vocab, np.float32)
        logits[place] = bad
        for fields in ({}, {"temperature": 0.0}, {"banned": [place]}, {"target": 0}, {"num_logprobs": 1}, {"top_k": 2}):
            for isa in ISAS:
                result = sample(logits, isa=isa, **fields)
                assert not result["finite"]
                assert result["token"] == -1


def test_nothing_left_to_choose_draws_nothing():
    logits = np.zeros(300, np.float32)
    everything = list(range(300))
    for fields in ({"allowed": []}, {"banned": everything}, {"allowed": [7], "banned": [7]}, {"allowed": [300, -1]}):
        for temperature in (0.0, 1.0):
            assert not sample(logits, temperature=temperature, **fields)["finite"]
    assert not sample(np.full(300, -np.inf))["finite"]
    assert not sample(np.zeros(0))["finite"]


def test_ids_outside_the_vocabulary_are_ignored():
    logits = np.random.default_rng(3).normal(0, 1, 64).astype(np.float32)
    outside = [*OUTSIDE, 64, 65]
    for position in range(20):
        plain = token_of(logits, position=position)
        fields = {
            "banned": outside,
            "bias_ids": outside,
            "bias_values": [100.0] * 5,
            "penalty_ids": outside,
            "penalty_counts": [1] * 5,
            "repetition": 2.0,
            "presence": 2.0,
        }
        assert token_of(logits, position=position, **fields) == plain
        assert token_of(logits, position=position, allowed=[*outside, *range(64)]) == plain
    assert not sample(logits, target=64)["finite"]
    assert sample(logits, temperature=0.0, num_logprobs=10_000)["finite"]


any_float, any_int = st.floats(width=32), st.integers(INT_MIN, INT_MAX)


@given(any_float, any_int, any_float, any_float, any_int)
@settings(max_examples=300, deadline=None)
def test_wild_parameters_never_leave_the_row(temperature, top_k, top_p, min_p, num_logprobs):
    logits = np.array([0.5, -math.inf, 2.0, 1.0] * 80, np.float32)
    fields = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "num_logprobs": num_logprobs}
    result = sample(logits, **fields)
    assert result["finite"]
    assert logits[result["token"]] > -math.inf
    assert len(result["top_ids"]) <= 20
