"""How sure a score is: the subjects, not the images, are what another benchmark would have drawn otherwise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats


def interval(
    values: Sequence[float], weights: Sequence[float] | None = None, confidence: float = 0.95
) -> tuple[float, float]:
    """Bootstrap interval of the mean over subjects (percentile, 10,000 draws of whole subjects): a cluster bootstrap.

    values: of each subject; also a paired difference of each. weights: how much each subject counts, alike by default.
    """
    of, counts = np.asarray(values, dtype=np.float64), np.ones(len(values)) if weights is None else np.asarray(weights)
    if len(of) < 2 or np.ptp(of) == 0:
        mean = float(np.average(of, weights=counts))
        return mean, mean

    def mean_of(products: NDArray[np.float64], counts: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
        return products.sum(axis) / counts.sum(axis)

    found = stats.bootstrap(
        (of * counts, counts),
        mean_of,
        paired=True,
        n_resamples=10_000,
        confidence_level=confidence,
        method="percentile",
        rng=0,
    ).confidence_interval
    return float(found.low), float(found.high)


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
