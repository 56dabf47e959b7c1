"""Are ranks uniform? The test and the picture's band for simulation-based calibration.

Draw a truth from the prior and data from the truth, condition, and count how many of D posterior draws lie below the truth: if
the posterior is right, that rank is uniform on 0, ..., D. Repeated R times, the share of ranks <= i is a binomial count over R
with mean (i + 1) / (D + 1), at every i. Its two-sided tail probability, smallest over i, is the statistic of both functions
here, and its distribution for uniform ranks is simulated. So ranks leave the band of a level if and only if their p-value is at
most one less that level. Repetitions must be independent: ranks of tasks that share random numbers are not.

References:
    Graphical test for discrete uniformity and its applications in goodness-of-fit evaluation and multiple sample comparison
    (Säilynoja, Bürkner and Vehtari, 2022).
    Validating Bayesian inference algorithms with simulation-based calibration (Talts, Betancourt, Simpson, Vehtari and Gelman, 2018).
"""

from __future__ import annotations

import math
import operator
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

__all__ = ["ecdf_bands", "uniformity"]

ArrayLike: TypeAlias = Any  # a tensor, a NumPy array or a nested list of numbers
Vector: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]
Counts: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]

_SIMULATIONS = 9999  # with one more, the levels 0.05 and 0.01 are whole numbers of simulations
_TIE = 1.0 + 1e-9  # probabilities that are equal by symmetry differ by rounding


def ecdf_bands(
    repetitions: int, num_ranks: int, level: float = 0.95, simulations: int = _SIMULATIONS, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return the band that holds the whole line of uniform ranks with probability `level`.

    The line is the share of ranks <= i, i = 0, ..., num_ranks. At each i the band is the central interval of a binomial count at
    one level, the same for all i, adjusted so that no i is outside with probability `level`. Time grows as
    num_ranks * simulations: a tenth of a second for 100 ranks, a second for 1,000.

    Arguments:
        repetitions: number R of ranks.
        num_ranks: number D of draws that the truth is ranked among: ranks are 0, ..., D.
        level: of the band, in (0, 1).
        simulations: sets of uniform ranks drawn to adjust the level, which has a standard error of 0.002 with 9,999.
        seed: of the simulations.

    Returns:
        The smallest and the largest share inside the band, each with shape (num_ranks + 1,).

    Raises:
        ValueError: a number is out of range, or there are too few simulations for the level.

    Example:
        >>> lower, upper = ecdf_bands(100, 3)
        >>> lower.tolist()  # of 100 ranks, at least 15 should be 0, at least 39 should be 0 or 1, ...
        [0.15, 0.39, 0.65, 1.0]
    """
    R, D = _check_sizes(repetitions, num_ranks, simulations)
    if not 0.0 < level < 1.0:
        raise ValueError(f"Expected level between 0 and 1. Got {level}.")
    # Rounded, for 1 - 0.9 is a little less than a tenth.
    allowed = math.floor(round((1.0 - level) * (simulations + 1), 6))
    if allowed < 1:
        raise ValueError(
            f"Expected at least {math.ceil(1 / (1 - level)) - 1} simulations for the level {level}. Got {simulations}. "
            "Take more simulations."
        )
    adjusted = np.sort(_simulate(R, D, simulations, seed))[allowed - 1] / _TIE
    lower, upper = np.ones(D + 1), np.ones(D + 1)
    for i in range(D):
        inside = np.flatnonzero(_pointwise(R, (i + 1) / (D + 1)) >= adjusted)
        lower[i], upper[i] = inside[0] / R, inside[-1] / R
    return torch.from_numpy(lower), torch.from_numpy(upper)


def uniformity(ranks: ArrayLike, num_ranks: int, simulations: int = _SIMULATIONS, seed: int = 0) -> Tensor:
    """Return the p-value of ranks being uniform on 0, ..., num_ranks.

    p = (1 + #{simulated statistic <= observed}) / (1 + simulations), the statistic being the smallest two-sided binomial
    probability of the share of ranks <= i over all i. It sees ranks that are too low or high, too spread or too central; several
    quantities have a p-value each, of which one in twenty is below 0.05 by chance.

    Arguments:
        ranks: integers with shape (R, ...); further axes are quantities, each with a p-value of its own.
        num_ranks: number D of draws that the truth was ranked among.
        simulations: sets of uniform ranks drawn; no p-value is below 1 / (1 + simulations).
        seed: of the simulations.

    Returns:
        p-values with shape (...).

    Raises:
        ValueError: the ranks are not integers from 0 to num_ranks, or there are none.

    Example:
        >>> uniformity([0, 1, 2, 3] * 25, 3).item()
        1.0
    """
    values = ranks.numpy(force=True) if isinstance(ranks, Tensor) else np.asarray(ranks)
    if values.ndim < 1 or values.size < 1 or not np.all((values == np.floor(values)) & (values >= 0) & (values <= num_ranks)):
        raise ValueError(
            f"Expected ranks as integers from 0 to num_ranks = {num_ranks}, with shape (R, ...), R >= 1. Got shape {values.shape}"
            + (f" with values from {values.min()} to {values.max()}. " if values.size else ". ")
            + "A rank is the number of posterior draws below the truth."
        )
    R, D = _check_sizes(len(values), num_ranks, simulations)
    columns = values.astype(np.int64).reshape(R, -1)
    smallest = np.ones(columns.shape[1])
    for i in range(D):
        smallest = np.minimum(smallest, _pointwise(R, (i + 1) / (D + 1))[(columns <= i).sum(0)])
    simulated = np.sort(_simulate(R, D, simulations, seed))
    p = (1 + np.searchsorted(simulated, smallest * _TIE, side="right")) / (1 + simulations)
    return torch.from_numpy(p).reshape(values.shape[1:])


def _check_sizes(repetitions: int, num_ranks: int, simulations: int) -> tuple[int, int]:
    """Return R and D as positive integers."""
    numbers = []
    for name, value in (("repetitions", repetitions), ("num_ranks", num_ranks), ("simulations", simulations)):
        try:
            number = operator.index(value)
        except TypeError:
            number = 0
        if number < 1:
            raise ValueError(f"Expected {name} as a positive integer. Got {value!r}.")
        numbers.append(number)
    return numbers[0], numbers[1]


def _pointwise(R: int, z: float) -> Vector:
    """Return 2 min(P(X <= c), P(X >= c)), at most one, for X ~ Binomial(R, z) and c = 0, ..., R."""
    c = torch.arange(R + 1, dtype=torch.float64)
    choose = math.lgamma(R + 1) - torch.lgamma(c + 1) - torch.lgamma(R - c + 1)
    mass = (choose + c * math.log(z) + (R - c) * math.log1p(-z)).exp().numpy()
    # Summed from either end, so that small tails keep their digits.
    tails = np.minimum(np.cumsum(mass), np.cumsum(mass[::-1])[::-1])
    return np.minimum(2.0 * tails, 1.0)


def _simulate(R: int, D: int, simulations: int, seed: int) -> Vector:
    """Return the statistic of sets of R uniform ranks, with shape (simulations,).

    The number of ranks <= i, given the number <= i - 1, is binomial in the rest: no ranks need be drawn or kept.
    """
    rng = np.random.default_rng(seed)
    below: Counts = np.zeros(simulations, dtype=np.int64)
    smallest = np.ones(simulations)
    for i in range(D):
        below = below + rng.binomial(R - below, 1.0 / (D + 1 - i))
        smallest = np.minimum(smallest, _pointwise(R, (i + 1) / (D + 1))[below])
    return smallest
