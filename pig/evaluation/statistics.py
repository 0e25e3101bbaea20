"""How sure a score is: the subjects, not the images, are what another benchmark would have drawn otherwise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats


def interval(per_subject: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Bootstrap interval of the mean over subjects (percentile, 10,000 draws of whole subjects): a cluster bootstrap.

    Also of a paired difference, where `per_subject` holds each subject's.
    """
    values = np.asarray(per_subject, dtype=np.float64)
    if len(values) < 2 or np.ptp(values) == 0:
        return float(values.mean()), float(values.mean())
    found = stats.bootstrap(
        (values,), np.mean, n_resamples=10_000, confidence_level=confidence, method="percentile", rng=0
    ).confidence_interval
    return float(found.low), float(found.high)
