"""The statistics that decide: exact bounds on shares, resampling of what is correlated, paired gains, corrections.

numpy and the standard library only. Every function is pure; what draws takes a seed. Sources: Clopper and Pearson
1934; Politis and Romano 1994 (stationary bootstrap); Wilcoxon 1945, Hodges and Lehmann 1963; Holm 1979. Incomplete beta
by the continued fraction of Numerical Recipes, 6.4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], float]
NORMAL = NormalDist()


@dataclass(frozen=True, slots=True)
class Interval:
    estimate: float
    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def scaled(self, factor: float) -> Interval:
        return Interval(self.estimate * factor, self.low * factor, self.high * factor)


# --- distributions -----------------------------------------------------------------------------------------------


def beta_cdf(x: float, a: float, b: float) -> float:
    """The regularized incomplete beta function I_x(a, b)."""
    if x <= 0.0 or x >= 1.0:
        return 0.0 if x <= 0.0 else 1.0
    if x > (a + 1.0) / (a + b + 2.0):
        return 1.0 - beta_cdf(1.0 - x, b, a)
    front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(front) / a * _continued_fraction(x, a, b)


def _continued_fraction(x: float, a: float, b: float) -> float:
    """Lentz's method; converges in O(sqrt(max(a, b))) terms where `beta_cdf` calls it."""
    tiny = 1e-300
    c, d = 1.0, 1.0 - (a + b) * x / (a + 1.0)
    d = 1.0 / (d if abs(d) > tiny else tiny)
    value = d
    for m in range(1, 10_000):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1.0 + numerator * d
            c = 1.0 + numerator / c
            d = 1.0 / (d if abs(d) > tiny else tiny)
            c = c if abs(c) > tiny else tiny
            value *= c * d
        if abs(c * d - 1.0) < 1e-14:
            break
    return value


def beta_quantile(p: float, a: float, b: float) -> float:
    """By bisection, to the last bits."""
    low, high = 0.0, 1.0
    while True:
        middle = (low + high) / 2
        if middle in (low, high):
            return middle
        low, high = (middle, high) if beta_cdf(middle, a, b) < p else (low, middle)


@lru_cache(maxsize=4096)
def t_quantile(p: float, degrees: float) -> float:
    """Of Student's t: the value that a share `p` stays below."""
    if p < 0.5:
        return -t_quantile(1.0 - p, degrees)
    if p == 0.5:
        return 0.0
    share = beta_quantile(2.0 * (1.0 - p), degrees / 2.0, 0.5)  # degrees / (degrees + t^2)
    return math.sqrt(degrees * (1.0 - share) / share)


# --- shares ------------------------------------------------------------------------------------------------------


def clopper_pearson(misses: float, n: float, confidence: float = 0.95) -> Interval:
    """Exact two-sided bounds on the probability of a miss. `misses` and `n` need not be whole: effective counts."""
    if not 0 <= misses <= n or n <= 0:
        raise ValueError("misses must be in 0..n")
    tail = (1.0 - confidence) / 2.0
    low = 0.0 if misses <= 0 else beta_quantile(tail, misses, n - misses + 1.0)
    high = 1.0 if misses >= n else beta_quantile(1.0 - tail, misses + 1.0, n - misses)
    return Interval(misses / n, low, high)


def miss_rate_bound(misses: float, n: float, confidence: float = 0.95) -> float:
    """The one-sided upper bound: what the certificate of a percentile rests on."""
    return 1.0 if misses >= n else beta_quantile(confidence, misses + 1.0, n - misses)


def requests_needed(level: float, misses: int = 0, confidence: float = 0.95) -> int:
    """The fewest independent requests with so many misses that certify "a share `level` meets the bound"."""
    low, high = misses + 1, misses + 2
    while miss_rate_bound(misses, high, confidence) > 1.0 - level:
        low, high = high, high * 2
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if miss_rate_bound(misses, middle, confidence) <= 1.0 - level else (middle + 1, high)
    return low


# --- correlated series -------------------------------------------------------------------------------------------


def effective_n(values: Sequence[float] | Floats, num_batches: int | None = None) -> float:
    """How many independent values say as much about the mean, from the variance of batch means.

    About sqrt(n) batches unless given. At least 1 and at most n; a series without variance is taken as it is.
    """
    series = np.asarray(values, np.float64)
    n = len(series)
    num_batches = num_batches or int(math.sqrt(n))
    if not 4 <= num_batches <= n / 2:
        return float(n)
    size = n // num_batches
    variance = float(series.var(ddof=1))
    means = series[: num_batches * size].reshape(num_batches, size).mean(axis=1)
    inflation = float(means.var(ddof=1)) * size / variance if variance > 0 else 1.0
    return min(float(n), max(1.0, n / max(inflation, 1e-12)))


def correlation_length(values: Sequence[float] | Floats) -> float:
    """The integrated autocorrelation time in samples, at least 1 (sum to the first negative, as Geyer's)."""
    series = np.asarray(values, np.float64)
    centred = series - series.mean()
    variance = float(centred @ centred)
    total = 1.0
    if variance > 0:
        for lag in range(1, len(series) // 4):
            rho = float(centred[lag:] @ centred[:-lag]) / variance
            if rho <= 0:
                break
            total += 2 * rho
    return total


def stationary_bootstrap(
    values: Sequence[float] | Floats,
    statistic: Statistic,
    *,
    mean_block: float | None = None,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile interval of a statistic of a stationary series; blocks of geometric length, wrapped around.

    `values` may have columns: rows are drawn. `mean_block` is twice the correlation length (of the first column) unless
    given.
    """
    series = np.asarray(values, np.float64)
    n = len(series)
    first = series if series.ndim == 1 else series[:, 0]
    block = max(1.0, min(2 * correlation_length(first) if mean_block is None else mean_block, n / 2))
    rng = np.random.default_rng(seed)
    found = np.empty(resamples)
    for draw in range(resamples):
        starts = rng.random(n) < 1.0 / block
        starts[0] = True
        begins = rng.integers(0, n, n)
        origin = np.maximum.accumulate(np.where(starts, np.arange(n), 0))
        found[draw] = statistic(series[(begins[origin] + np.arange(n) - origin) % n])
    low, high = np.quantile(found, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(statistic(series), float(low), float(high))


def slope(x: Sequence[float] | Floats, y: Sequence[float] | Floats, confidence: float = 0.95) -> Interval:
    """Least squares with Student's interval."""
    xs, ys = np.asarray(x, np.float64), np.asarray(y, np.float64)
    centred = xs - xs.mean()
    spread = float(centred @ centred)
    if len(xs) < 4 or spread == 0:
        return Interval(0.0, -math.inf, math.inf)
    estimate = float(centred @ ys) / spread
    residuals = ys - ys.mean() - estimate * centred
    degrees = len(xs) - 2
    error = math.sqrt(float(residuals @ residuals) / degrees / spread)
    reach = t_quantile((1 + confidence) / 2, degrees) * error
    return Interval(estimate, estimate - reach, estimate + reach)


# --- pairs -------------------------------------------------------------------------------------------------------


def paired_gain(
    baseline: Sequence[float] | Floats, candidate: Sequence[float] | Floats, confidence: float = 0.95
) -> Interval:
    """The candidate's gain over the baseline, 0.1 = a tenth more, from runs in pairs.

    Student's interval on the logarithms of the ratios: resampling five pairs would promise too much.
    """
    ratios = np.log(np.asarray(candidate, np.float64) / np.asarray(baseline, np.float64))
    if len(ratios) < 2:
        raise ValueError("at least two pairs")
    mean = float(ratios.mean())
    error = float(ratios.std(ddof=1)) / math.sqrt(len(ratios))
    reach = t_quantile((1 + confidence) / 2, len(ratios) - 1) * error
    return Interval(math.expm1(mean), math.expm1(mean - reach), math.expm1(mean + reach))


def is_gain(gain: Interval, noise: float = 0.0, threshold: float = 0.02) -> bool:
    """Whether to claim it: the interval lies beyond the practical threshold and twice the noise between equal runs."""
    return gain.low > max(threshold, 2 * noise)


def wilcoxon(differences: Sequence[float] | Floats) -> float:
    """Two-sided p of the signed-rank test; exact up to 25 differences without ties, by the normal law beyond."""
    values = np.asarray(differences, np.float64)
    values = values[values != 0]
    n = len(values)
    if n == 0:
        return 1.0
    ranks = _ranks(np.abs(values))
    positive = float(ranks[values > 0].sum())
    smaller = min(positive, n * (n + 1) / 2 - positive)
    if n <= 25 and len(np.unique(np.abs(values))) == n:
        return min(1.0, 2.0 * _signed_rank_cdf(int(smaller), n))
    _, ties = np.unique(ranks, return_counts=True)
    variance = n * (n + 1) * (2 * n + 1) / 24 - float((ties**3 - ties).sum()) / 48
    return min(1.0, 2 * NORMAL.cdf((smaller + 0.5 - n * (n + 1) / 4) / math.sqrt(variance)))


def hodges_lehmann(differences: Sequence[float] | Floats, confidence: float = 0.95) -> Interval:
    """The median of the means of all pairs, with the interval that the signed-rank test leaves.

    With fewer than six differences no such interval has 95 %: then it is everything there is, and infinite beyond.
    """
    values = np.asarray(differences, np.float64)
    n = len(values)
    upper = np.triu_indices(n)
    walsh = np.sort((values[upper[0]] + values[upper[1]]) / 2)
    tail = (1 - confidence) / 2
    if n <= 25:
        cut = -1
        while _signed_rank_cdf(cut + 1, n) <= tail:
            cut += 1
    else:
        cut = math.floor(n * (n + 1) / 4 + NORMAL.inv_cdf(tail) * math.sqrt(n * (n + 1) * (2 * n + 1) / 24))
    median = float(np.median(walsh))
    if cut < 0:
        return Interval(median, -math.inf, math.inf)
    return Interval(median, float(walsh[cut]), float(walsh[len(walsh) - 1 - cut]))


@lru_cache(maxsize=32)
def _signed_rank_counts(n: int) -> tuple[int, ...]:
    """How many of the 2^n signs give each rank sum."""
    counts = [1]
    for rank in range(1, n + 1):
        longer = counts + [0] * rank
        for total, count in enumerate(counts):
            longer[total + rank] += count
        counts = longer
    return tuple(counts)


def _signed_rank_cdf(total: int, n: int) -> float:
    return sum(_signed_rank_counts(n)[: total + 1]) / float(1 << n)


def _ranks(values: Floats) -> Floats:
    """From 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray((ends - (counts - 1) / 2)[inverse], np.float64)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted for so many comparisons, in the order given; compare each with the one level."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
