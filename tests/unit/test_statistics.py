"""Certifying statistics: tables of the literature, and how often intervals hold what they promise (virtual data)."""

from __future__ import annotations

import math

import numpy as np
import pytest
from engine_support import scaled
from hypothesis import given, settings
from hypothesis import strategies as st

from setpoint.tune.statistics import (
    beta_cdf,
    beta_quantile,
    clopper_pearson,
    correlation_length,
    effective_n,
    hodges_lehmann,
    holm,
    is_gain,
    miss_rate_bound,
    paired_gain,
    requests_needed,
    slope,
    stationary_bootstrap,
    t_quantile,
    wilcoxon,
)


def binomial_cdf(k: int, n: int, p: float) -> float:
    return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1))


# --- distributions -----------------------------------------------------------------------------------------------


@given(st.integers(0, 40), st.integers(1, 40), st.floats(0.01, 0.99))
@settings(max_examples=scaled(200))
def test_the_beta_law_is_the_binomial_one(k: int, more: int, p: float) -> None:
    n = k + more
    assert 1 - beta_cdf(p, k + 1, n - k) == pytest.approx(binomial_cdf(k, n, p), abs=1e-10)


@given(st.floats(1e-6, 1 - 1e-6), st.floats(1, 500), st.floats(1, 500))  # below 1, quantiles crowd against the end
@settings(max_examples=scaled(100))
def test_quantiles_turn_the_law_around(p: float, a: float, b: float) -> None:
    assert beta_cdf(beta_quantile(p, a, b), a, b) == pytest.approx(p, abs=1e-8)


def test_quantiles_of_students_t() -> None:
    for p, degrees, value in ((0.975, 1, 12.7062), (0.975, 4, 2.7764), (0.95, 10, 1.8125), (0.995, 30, 2.7500)):
        assert t_quantile(p, degrees) == pytest.approx(value, abs=2e-4)
    assert t_quantile(0.975, 1e6) == pytest.approx(1.95996, abs=1e-4)
    assert t_quantile(0.025, 4) == -t_quantile(0.975, 4)


# --- shares ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("level", "confidence", "table"),
    [
        (0.95, 0.95, {0: 59, 1: 93, 2: 124, 5: 208, 10: 336, 20: 577}),
        (0.95, 0.99, {0: 90, 1: 130, 5: 259, 10: 398, 20: 656}),
        (0.99, 0.95, {0: 299, 1: 473, 5: 1049, 10: 1693, 20: 2902}),
        (0.99, 0.99, {0: 459, 1: 662, 5: 1307, 10: 2010, 20: 3304}),
    ],
)
def test_requests_that_a_certificate_needs(level: float, confidence: float, table: dict[int, int]) -> None:
    """The reference's table; 459 is the early stopping of MLPerf."""
    assert {misses: requests_needed(level, misses, confidence) for misses in table} == table


@given(st.integers(1, 300), st.floats(0, 1), st.sampled_from([0.9, 0.95, 0.99]))
@settings(max_examples=scaled(100))
def test_bounds_enclose_the_share(n: int, share: float, confidence: float) -> None:
    misses = round(share * n)
    found = clopper_pearson(misses, n, confidence)
    assert 0 <= found.low <= found.estimate <= found.high <= 1
    assert miss_rate_bound(misses, n, confidence) <= found.high + 1e-12
    assert clopper_pearson(misses * 2, n * 2, confidence).high <= found.high + 1e-12


def test_exact_bounds_cover_at_least_as_often_as_they_promise() -> None:
    for n, p in ((30, 0.05), (100, 0.05), (60, 0.3)):
        weights = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
        assert sum(w for k, w in enumerate(weights) if p in clopper_pearson(k, n)) >= 0.95
        assert sum(w for k, w in enumerate(weights) if p <= miss_rate_bound(k, n)) >= 0.95


# --- correlated series -------------------------------------------------------------------------------------------


def autoregressive(n: int, rho: float, rng: np.random.Generator) -> np.ndarray:
    noise = rng.normal(size=n + 200)
    series = np.empty(n + 200)
    series[0] = noise[0]
    for i in range(1, len(series)):
        series[i] = rho * series[i - 1] + math.sqrt(1 - rho**2) * noise[i]
    return series[200:]


def test_correlated_values_count_for_fewer() -> None:
    rng = np.random.default_rng(1)
    independent = [effective_n(rng.normal(size=2000)) for _ in range(20)]
    assert np.mean(independent) > 1500
    correlated = [effective_n(autoregressive(2000, 0.8, rng)) for _ in range(20)]
    assert np.mean(correlated) == pytest.approx(2000 / 9, rel=0.5)  # (1 + rho) / (1 - rho) = 9
    assert np.mean([correlation_length(autoregressive(2000, 0.8, rng)) for _ in range(20)]) == pytest.approx(9, rel=0.3)
    assert effective_n([1.0] * 100) == 100


def test_the_block_bootstrap_covers_the_mean_of_a_correlated_series() -> None:
    """Where resampling single values covers far too seldom."""
    rng, repeats = np.random.default_rng(2), 200
    held = {"blocks": 0, "single": 0}
    for repeat in range(repeats):
        series = autoregressive(400, 0.7, rng)
        held["blocks"] += 0.0 in stationary_bootstrap(series, np.mean, resamples=200, seed=repeat)
        held["single"] += 0.0 in stationary_bootstrap(series, np.mean, mean_block=1, resamples=200, seed=repeat)
    assert held["blocks"] / repeats >= 0.88
    assert held["single"] / repeats < 0.75


def test_the_bootstrap_repeats_with_its_seed() -> None:
    series = np.random.default_rng(1).normal(size=100)
    one, two, other = (stationary_bootstrap(series, np.mean, resamples=50, seed=seed) for seed in (1, 1, 2))
    assert one == two != other


def test_a_slope_is_found_and_none_is_not() -> None:
    rng, x = np.random.default_rng(3), np.arange(60.0)
    assert slope(x, 0.1 * x + rng.normal(size=60)).low > 0
    flat = sum(slope(x, rng.normal(size=60)).low > 0 for _ in range(400))
    assert flat / 400 <= 0.045  # 2.5 % promised


# --- pairs (T1) --------------------------------------------------------------------------------------------------


def test_equal_configurations_seldom_win_and_gains_cover_nothing() -> None:
    """1,000 decisions between a configuration and itself, five pairs each, 3 % noise: T1 on virtual data."""
    rng, noise = np.random.default_rng(4), 0.03
    wins = covered = 0
    for _ in range(1000):
        day = rng.normal(0, 0.1, 5)  # what a pair has in common
        first, second = (np.exp(day + rng.normal(0, noise, 5)) for _ in range(2))
        gain = paired_gain(first, second)
        covered += 0.0 in gain
        wins += is_gain(gain, noise=0.0, threshold=0.0) or gain.high < 0
    assert wins <= 65
    assert 0.935 <= covered / 1000 <= 0.965
    practical = 0
    for _ in range(1000):
        first, second = (np.exp(rng.normal(0, noise, 5)) for _ in range(2))
        practical += is_gain(paired_gain(first, second), noise=noise)
    assert practical <= 5  # with the practical threshold on top


def test_a_gain_is_what_was_planted() -> None:
    rng = np.random.default_rng(5)
    held = 0
    for _ in range(400):
        base = np.exp(rng.normal(0, 0.02, 6))
        held += 0.12 in paired_gain(base, base * 1.12 * np.exp(rng.normal(0, 0.02, 6)))
    assert 0.92 <= held / 400 <= 0.98
    with pytest.raises(ValueError, match="two pairs"):
        paired_gain([1.0], [1.1])


def test_signed_ranks_against_known_values() -> None:
    assert wilcoxon([1, 2, 3, 4, 5]) == pytest.approx(2 / 32)
    assert wilcoxon([1, 2, 3, 4, 5, 6]) == pytest.approx(2 / 64)
    assert wilcoxon([1, -2, 3, -4, 5, 6, 7, 8]) == pytest.approx(0.109375)
    assert wilcoxon([0.0, 0.0]) == 1.0
    ties = [1, 1, 1, 1, 1, 1, 1, 1, 1, -1]
    assert 0.005 < wilcoxon(ties) < 0.05


def test_the_median_of_pairwise_means() -> None:
    found = hodges_lehmann([1.0, 2.0, 3.0])
    assert found.estimate == 2.0
    assert found.low == -math.inf
    rng = np.random.default_rng(6)
    held = sum(0.5 in hodges_lehmann(rng.standard_t(3, size=12) + 0.5) for _ in range(400))
    assert 0.93 <= held / 400 <= 0.985
    large = sum(0.5 in hodges_lehmann(rng.standard_t(3, size=40) + 0.5) for _ in range(200))
    assert 0.91 <= large / 200 <= 0.99


@given(st.lists(st.floats(0, 1), max_size=12))
@settings(max_examples=scaled(100))
def test_holm_keeps_the_order_and_never_helps(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    assert all(after >= before for before, after in zip(p_values, adjusted, strict=True))
    assert all(value <= 1 for value in adjusted)
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    assert [adjusted[i] for i in order] == sorted(adjusted)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
