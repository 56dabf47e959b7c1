"""Uniform ranks stay in the band as often as it says, others leave it, and on tiny cases every set of ranks is counted."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from bnnp.calibration import _pointwise, ecdf_bands, uniformity

Array = np.ndarray[Any, np.dtype[np.int64]]


def draw(a: float, b: float, R: int, D: int, sets: int, seed: int = 0) -> Array:
    """Return ranks of truths that lie at Beta(a, b) quantiles of the posterior, with shape (R, sets)."""
    rng = np.random.default_rng(seed)
    return rng.binomial(D, rng.beta(a, b, size=(R, sets)))


def shares(ranks: Array, D: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the share of ranks <= i with shape (D + 1, sets)."""
    return np.stack([(ranks <= i).mean(0) for i in range(D + 1)])


@pytest.mark.parametrize(("R", "z"), [(1, 0.5), (7, 1e-3), (100, 0.25), (400, 0.99), (5000, 0.4)])
def test_pointwise_probability_is_that_of_the_binomial(R: int, z: float) -> None:
    c = np.arange(R + 1)
    expected = 2 * np.minimum(stats.binom.cdf(c, R, z), stats.binom.sf(c - 1, R, z))
    np.testing.assert_allclose(_pointwise(R, z), np.minimum(expected, 1.0), rtol=1e-8, atol=1e-300)


@pytest.mark.parametrize(("R", "D"), [(3, 2), (5, 1), (4, 3), (2, 9), (1, 20)])
def test_every_set_of_a_tiny_case_gets_its_exact_probability(R: int, D: int) -> None:
    sets = np.array(list(itertools.product(range(D + 1), repeat=R))).T
    statistic = np.ones(sets.shape[1])
    for i in range(D):
        count, z = (sets <= i).sum(0), (i + 1) / (D + 1)
        statistic = np.minimum(statistic, 2 * np.minimum(stats.binom.cdf(count, R, z), stats.binom.sf(count - 1, R, z)))
    exact = np.array([np.mean(statistic <= own * (1 + 1e-9)) for own in statistic])
    p = uniformity(sets, D).numpy()
    assert np.all(np.abs(p - exact) < 4.5 * np.sqrt(exact * (1 - exact) / 9999) + 1e-4)
    for level in (0.5, 0.8, 0.95):
        lower, upper = (edge.numpy()[:, None] for edge in ecdf_bands(R, D, level))
        line = shares(sets, D)
        covered = np.mean(np.all((line >= lower - 1e-12) & (line <= upper + 1e-12), axis=0))
        assert covered > level - 4.5 * math.sqrt(level * (1 - level) / 9999)


@pytest.mark.parametrize(("R", "D", "sets"), [(150, 63, 3000), (40, 200, 3000), (500, 9, 3000)])
def test_uniform_ranks_are_rejected_as_often_as_the_level_says(R: int, D: int, sets: int) -> None:
    ranks = np.random.default_rng(1).integers(0, D + 1, size=(R, sets))
    p = uniformity(ranks, D).numpy()
    for level in (0.05, 0.2, 0.5):
        # Four and a half standard errors of the share, and of the simulation behind the p-values; the statistic is discrete.
        tolerance = 4.5 * math.sqrt(level * (1 - level) * (1 / sets + 1 / 9999))
        assert level - tolerance - 0.01 < np.mean(p <= level) < level + tolerance


@pytest.mark.parametrize("level", [0.8, 0.9, 0.95, 0.99])
def test_leaving_the_band_is_a_small_p_value(level: float) -> None:
    R, D = 80, 24
    ranks = np.concatenate([draw(1.0, 1.0, R, D, 400), draw(0.6, 0.6, R, D, 400)], axis=1)
    lower, upper = (edge.numpy()[:, None] for edge in ecdf_bands(R, D, level))
    line = shares(ranks, D)
    leaves = np.any((line < lower - 1e-12) | (line > upper + 1e-12), axis=0)
    np.testing.assert_array_equal(leaves, uniformity(ranks, D).numpy() <= 1 - level + 1e-12)
    assert 0.05 < leaves.mean() < 0.95


@pytest.mark.parametrize(
    ("name", "a", "b"),
    [("draws too narrow", 0.5, 0.5), ("draws too wide", 2.0, 2.0), ("draws too high", 0.7, 1.3), ("draws too low", 1.3, 0.7)],
)
def test_ranks_of_a_wrong_posterior_are_found(name: str, a: float, b: float) -> None:
    p = uniformity(draw(a, b, 200, 100, 200), 100)
    assert (p <= 0.01).double().mean() > 0.9, name


def test_band_holds_the_uniform_is_symmetric_and_narrows() -> None:
    widths = []
    for R in (50, 200, 800):
        lower, upper = ecdf_bands(R, 99)
        uniform = torch.arange(1, 101, dtype=torch.float64) / 100
        assert lower.shape == upper.shape == (100,) and lower[-1] == upper[-1] == 1.0
        assert bool((lower <= uniform).all()) and bool((uniform <= upper).all())
        torch.testing.assert_close(lower[:-1], 1.0 - upper[:-1].flip(0))
        assert bool((lower.diff() >= 0).all()) and bool((upper.diff() >= 0).all())
        widths.append(float((upper - lower).max()) * math.sqrt(R))
    # Three standard deviations of a share of one half each side, or a little less.
    assert all(2.7 < width < 3.3 for width in widths)
    inner = ecdf_bands(200, 99, 0.5)
    outer = ecdf_bands(200, 99, 0.99)
    assert bool((inner[0] >= outer[0]).all()) and bool((inner[1] <= outer[1]).all())


def test_ranks_come_as_lists_arrays_or_tensors_with_any_further_axes() -> None:
    ranks = torch.from_numpy(draw(1.0, 1.0, 60, 20, 6))
    p = uniformity(ranks.reshape(60, 2, 3), 20)
    assert p.shape == (2, 3)
    one = uniformity(ranks[:, 4].tolist(), 20)
    assert one.shape == () and one == p[1, 1] == uniformity(ranks[:, 4].double(), 20)


def test_the_same_seed_gives_the_same_and_nothing_global_is_drawn() -> None:
    before = np.random.get_state()[1].copy()  # type: ignore[union-attr]
    assert torch.equal(ecdf_bands(30, 10, seed=3)[0], ecdf_bands(30, 10, seed=3)[0])
    assert abs(uniformity([0] * 3 + list(range(11)), 10, seed=1) - uniformity([0] * 3 + list(range(11)), 10, seed=2)) < 0.03
    np.testing.assert_array_equal(before, np.random.get_state()[1])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: uniformity([0, 5], 4), "from 0 to num_ranks = 4.*Got shape .2,. with values from 0 to 5"),
        (lambda: uniformity([-1, 2], 4), "values from -1 to 2"),
        (lambda: uniformity([0.5, 2.0], 4), "integers"),
        (lambda: uniformity([math.nan, 2.0], 4), "integers"),
        (lambda: uniformity([], 4), "Got shape .0,."),
        (lambda: uniformity(3, 4), "Got shape"),
        (lambda: uniformity([0, 0], 0), "num_ranks as a positive integer. Got 0"),
        (lambda: ecdf_bands(0, 4), "repetitions as a positive integer. Got 0"),
        (lambda: ecdf_bands(10, 4.5), "num_ranks as a positive integer. Got 4.5"),  # type: ignore[arg-type]
        (lambda: ecdf_bands(10, 4, level=1.0), "between 0 and 1"),
        (lambda: ecdf_bands(10, 4, level=0.95, simulations=10), "at least 19 simulations"),
    ],
)
def test_errors_say_what_was_expected(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_the_fewest_simulations_suffice() -> None:
    lower, upper = ecdf_bands(10, 4, level=0.95, simulations=19)
    assert bool((lower <= upper).all())
