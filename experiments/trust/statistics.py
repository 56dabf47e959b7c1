"""How well one number tells two groups of tasks apart, with standard errors in closed form."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


def midranks(values: FloatArray) -> FloatArray:
    """Return ranks from 1, ties sharing the mean of theirs.

    Example:
        >>> midranks(np.array([3.0, 1.0, 3.0])).tolist()
        [2.5, 1.0, 2.5]
    """
    ordered = np.sort(values)
    below, upto = np.searchsorted(ordered, values, "left"), np.searchsorted(ordered, values, "right")
    return np.asarray((below + upto + 1) / 2, dtype=np.float64)


def auc(positive: FloatArray, negative: FloatArray) -> tuple[float, float]:
    """Return P(positive > negative) + 1/2 P(equal), the area under the ROC curve, and its standard error.

    Arguments:
        positive: the diagnostic of the tasks to be found, larger meaning more alarming, with shape (m,).
        negative: of the others, with shape (n,).

    Returns:
        The area and DeLong's standard error, which is 0 where nothing overlaps; NaN for fewer than two tasks on a side.

    References:
        Comparing the areas under two or more correlated receiver operating characteristic curves (DeLong, DeLong and Clarke-Pearson, 1988).

    Example:
        >>> area, error = auc(np.array([1.0, 3.0]), np.array([0.0, 1.0]))
        >>> area, round(error, 4)
        (0.875, 0.1768)
    """
    m, n = len(positive), len(negative)
    if min(m, n) < 2:
        return math.nan, math.nan
    ranks = midranks(np.concatenate([positive, negative]))
    wins = (ranks[:m] - midranks(positive)) / n
    losses = 1.0 - (ranks[m:] - midranks(negative)) / m
    variance = wins.var(ddof=1) / m + losses.var(ddof=1) / n
    return float(wins.mean()), math.sqrt(variance)


def rank_correlation(a: FloatArray, b: FloatArray) -> tuple[float, float]:
    """Return Spearman's rank correlation and its standard error, (1 - r^2) sqrt((1 + r^2 / 2) / (n - 3)).

    NaN where one of the two is constant or there are fewer than four pairs.

    References:
        Sample size requirements for estimating Pearson, Kendall and Spearman correlations (Bonett and Wright, 2000).
    """
    if len(a) < 4 or np.ptp(midranks(a)) == 0 or np.ptp(midranks(b)) == 0:
        return math.nan, math.nan
    r = float(np.corrcoef(midranks(a), midranks(b))[0, 1])
    return r, (1.0 - r**2) * math.sqrt((1.0 + 0.5 * r**2) / (len(a) - 3))


def share(flags: NDArray[np.bool_]) -> tuple[float, float]:
    """Return the share of True and its standard error, sqrt(p (1 - p) / n); NaN for none."""
    if len(flags) == 0:
        return math.nan, math.nan
    p = float(flags.mean())
    return p, math.sqrt(p * (1.0 - p) / len(flags))


def mean(values: FloatArray) -> tuple[float, float]:
    """Return the mean and its standard error, s / sqrt(n); NaN for fewer than two."""
    if len(values) < 2:
        return math.nan, math.nan
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))
