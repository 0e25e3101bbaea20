"""How sure a score is: the subjects, not the images, are what another benchmark would have drawn otherwise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

UPPER = 0.975  # the upper end of a 95 % interval, as a quantile
FEW = 10  # subjects, below which the bootstrap has too few values to draw from


def expanded_level(n: int) -> float:
    """The share that percentiles of bootstrapped means of n values must span for a 95 % interval (Hesterberg 2015,
    "What Teachers Should Know About the Bootstrap", section 4.4): they make up for the bootstrap's deviation being
    sqrt(1 - 1/n) too small. n: at least 2."""
    t = float(stats.t.ppf(UPPER, n - 1))
    return 1 - 2 * float(stats.norm.cdf(-t * (n / (n - 1)) ** 0.5))


def interval(values: Sequence[float], weights: Sequence[float] | None = None) -> tuple[float, float]:
    """95 % interval of the mean over subjects.

    From 10 subjects on a cluster bootstrap (10,000 draws of whole subjects) with percentiles of `expanded_level`; below
    that Student's t. Plain percentiles cover .85 instead of .95 with 5 subjects. Of one subject nothing can be said:
    the mean twice.

    values: of each subject; also a paired difference of each. weights: how much each subject counts, alike by default.
    """
    of, counts = np.asarray(values, dtype=np.float64), np.ones(len(values)) if weights is None else np.asarray(weights)
    mean, error = _mean_and_error(of, counts)
    n = len(of)
    if n < 2 or error == 0:
        return mean, mean
    if n < FEW:
        t = float(stats.t.ppf(UPPER, n - 1))
        return mean - t * error, mean + t * error

    def mean_of(products: NDArray[np.float64], counts: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
        return products.sum(axis) / counts.sum(axis)

    found = stats.bootstrap(
        (of * counts, counts),
        mean_of,
        paired=True,
        n_resamples=10_000,
        confidence_level=expanded_level(n),
        method="percentile",
        rng=0,
    ).confidence_interval
    return float(found.low), float(found.high)


def rate_interval(rates: Sequence[float], counts: Sequence[float]) -> tuple[float, float]:
    """Wilson's 95 % interval of a rate over subjects, within [0, 1] and of some width also where all agree.

    The answers of one subject are not independent: they count as so many as the spread of the subjects' rates
    supports, at least one a subject and at most all.

    rates, counts: of each subject, the share of its answers that are yes, and how many it has.
    """
    of, each = np.asarray(rates, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    rate, error = _mean_and_error(of, each)
    spread = error**2
    effective = (
        len(of) if spread == 0 else float(np.clip(rate * (1 - rate) / spread, min(len(of), each.sum()), each.sum()))
    )
    z = float(stats.norm.ppf(UPPER) if spread == 0 else stats.t.ppf(UPPER, len(of) - 1))
    middle = (rate + z**2 / (2 * effective)) / (1 + z**2 / effective)
    half = z / (1 + z**2 / effective) * (rate * (1 - rate) / effective + z**2 / (4 * effective**2)) ** 0.5
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def _mean_and_error(values: NDArray[np.float64], weights: NDArray[np.float64]) -> tuple[float, float]:
    """The weighted mean over subjects and its standard error; 0 of one subject."""
    mean, n = float(np.average(values, weights=weights)), len(values)
    if n < 2 or np.ptp(values) == 0:
        return mean, 0.0
    squares = (weights * (values - mean)) ** 2
    return mean, float((n / (n - 1) * squares.sum()) ** 0.5 / weights.sum())


def sign_flip_p(differences: Sequence[float]) -> float:
    """Two-sided p-value of a paired permutation test over subjects: how often random signs give so large a mean.

    Exact for up to 13 subjects, 9,999 draws beyond. 1 for fewer than two subjects.
    """
    of = np.asarray(differences, dtype=np.float64)
    if len(of) < 2 or not of.any():
        return 1.0

    def mean_of(values: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
        return values.mean(axis)

    found = stats.permutation_test(
        (of,), mean_of, permutation_type="samples", n_resamples=9_999, vectorized=True, rng=0
    )
    return float(found.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for being several: the chance that any true null hypothesis is rejected stays below the level
    (Holm, A Simple Sequentially Rejective Multiple Test Procedure, 1979)."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda one: p_values[one])):
        largest = max(largest, (len(p_values) - rank) * p_values[index])
        corrected[index] = min(1.0, largest)
    return corrected
