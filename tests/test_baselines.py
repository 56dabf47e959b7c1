"""The rivals on image completion against slow, obvious twins."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from bnnp.data.images import load_digits, pixel_grid, random_pixels, split_images
from bnnp.demos.baselines import (
    Completion,
    ImageGP,
    MultivariateNormal64,
    PixelNormal,
    TrainedGP,
    condition_gaussian,
)

Array = np.ndarray[Any, np.dtype[Any]]
RIVALS: dict[str, Callable[[Array, Array], Any]] = {
    "pixel": lambda train, validation: PixelNormal(train),
    "gaussian": MultivariateNormal64,
    "image_gp": lambda train, validation: ImageGP(restarts=0),
    "trained_gp": lambda train, validation: TrainedGP(train[:50], restarts=0),
}


@pytest.fixture(scope="module")
def digits() -> tuple[Array, Array, Array, Array]:
    """Return training, validation and test images (flat) and the seen pixels of the test images."""
    flat = load_digits().images.reshape(-1, 64)
    split = split_images(len(flat), seed=0, sizes=(600, 100, 4))
    return flat[split.train], flat[split.validation], flat[split.test], random_pixels(4, 8, 8, 0.25).reshape(4, 64)


def _dense(mean: Array, covariance: Array) -> MultivariateNormal:
    return MultivariateNormal(torch.from_numpy(mean), torch.from_numpy(covariance))


def _marginal_by_dense_algebra(mean: Array, covariance: Array, image: Array, seen: Array) -> tuple[Array, Array]:
    """Condition by the textbook formula with an explicit inverse."""
    s, u = np.flatnonzero(seen), np.flatnonzero(~seen)
    gain = covariance[np.ix_(u, s)] @ np.linalg.inv(covariance[np.ix_(s, s)])
    rest = covariance[np.ix_(u, u)] - gain @ covariance[np.ix_(s, u)]
    return mean[u] + gain @ (image[s] - mean[s]), np.sqrt(np.diag(rest))


@pytest.mark.parametrize("count", [1, 3, 6])
def test_condition_gaussian_is_all_minus_seen(count: int) -> None:
    rng = np.random.default_rng(count)
    root = rng.normal(size=(7, 7))
    mean, covariance, image = rng.normal(size=7), root @ root.T + np.eye(7), rng.normal(size=7)
    seen = np.isin(np.arange(7), rng.permutation(7)[:count])
    got_mean, got_std, joint = condition_gaussian(mean, covariance, image, seen)
    whole = _dense(mean, covariance).log_prob(torch.from_numpy(image))
    part = _dense(mean[seen], covariance[np.ix_(seen, seen)]).log_prob(torch.from_numpy(image[seen]))
    assert joint == pytest.approx(float(whole - part), rel=1e-10)
    want_mean, want_std = _marginal_by_dense_algebra(mean, covariance, image, seen)
    np.testing.assert_allclose(got_mean, want_mean, rtol=1e-9)
    np.testing.assert_allclose(got_std, want_std, rtol=1e-9)


def test_scores_of_a_gaussian_completion() -> None:
    rng = np.random.default_rng(0)
    truth, mean, std = rng.random((3, 6)), rng.random((3, 6)), 0.1 + rng.random((3, 6))
    unseen = rng.random((3, 6)) < 0.6
    unseen[:, 0], unseen[:, 1] = True, False
    result = Completion.gaussian(truth, unseen, mean, std, joint=np.array([1.0, 2.0, 3.0]))
    draws = torch.randn(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).numpy()
    for i in range(3):
        count = int(unseen[i].sum())
        assert result.joint[i] == pytest.approx((i + 1) / count)
        log_probs, crps, squares = [], [], []
        for j in np.flatnonzero(unseen[i]):
            normal = Normal(torch.tensor(mean[i, j]), torch.tensor(std[i, j]))
            log_probs.append(float(normal.log_prob(torch.tensor(truth[i, j]))))
            assert result.pit[i, j] == pytest.approx(float(normal.cdf(torch.tensor(truth[i, j]))))
            # CRPS = E|Y - y| - E|Y - Y'| / 2, and E|Y - Y'| = 2 std / sqrt(pi).
            far = np.abs(mean[i, j] + std[i, j] * draws - truth[i, j]).mean()
            crps.append(far - std[i, j] / math.sqrt(math.pi))
            assert result.crps[i, j] == pytest.approx(crps[-1], abs=6 * std[i, j] / math.sqrt(len(draws)))
            squares.append((mean[i, j] - truth[i, j]) ** 2)
        assert result.marginal[i] == pytest.approx(sum(log_probs) / count)
        assert result.crps_per_image()[i] == pytest.approx(sum(crps) / count, abs=0.02)
        assert result.rmse_per_image()[i] == pytest.approx(math.sqrt(sum(squares) / count))
    assert np.all(np.isnan(result.pit[~unseen])) and np.all(np.isnan(result.crps[~unseen]))
    np.testing.assert_array_equal(result.mean[~unseen], truth[~unseen])
    np.testing.assert_array_equal(result.std[~unseen], 0.0)
    inside = np.abs((truth - mean) / std)[unseen] <= 1.2815515655446004
    assert result.coverage(0.8) == pytest.approx(inside.mean())
    assert result.pooled_pit().shape == (int(unseen.sum()),)
    mean_of, error_of = result.summary()["marginal"]
    assert mean_of == pytest.approx(result.marginal.mean())
    assert error_of == pytest.approx(result.marginal.std(ddof=1) / math.sqrt(3))


@pytest.mark.parametrize("name", RIVALS)
def test_every_rival_predicts_the_unseen_pixels_only(name: str, digits: tuple[Array, Array, Array, Array]) -> None:
    train, validation, test, seen = digits
    result = RIVALS[name](train, validation).complete(test, seen)
    assert result.mean.shape == result.std.shape == result.pit.shape == result.crps.shape == (4, 64)
    assert result.joint.shape == result.marginal.shape == (4,)
    np.testing.assert_array_equal(result.unseen, ~seen)
    np.testing.assert_array_equal(result.mean[seen], test[seen])
    assert np.all(result.std[~seen] > 0.0)
    assert np.all(np.isfinite(result.joint)) and np.all(np.isfinite(result.marginal))


@pytest.mark.parametrize("name", RIVALS)
def test_no_rival_looks_at_what_it_is_to_predict(name: str, digits: tuple[Array, Array, Array, Array]) -> None:
    train, validation, test, seen = digits
    rival = RIVALS[name](train, validation)
    one, two = rival.complete(test, seen), rival.complete(np.where(seen, test, 0.123), seen)
    np.testing.assert_array_equal(one.mean[~seen], two.mean[~seen])
    np.testing.assert_array_equal(one.std, two.std)


@pytest.mark.parametrize("name", RIVALS)
def test_rivals_are_repeatable_and_leave_global_randomness_alone(name: str, digits: tuple[Array, Array, Array, Array]) -> None:
    train, validation, test, seen = digits
    before = (torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"].copy(), random.getstate())
    one = RIVALS[name](train, validation).complete(test, seen)
    two = RIVALS[name](train, validation).complete(test, seen)
    np.testing.assert_array_equal(one.joint, two.joint)
    assert torch.equal(before[0], torch.get_rng_state())
    np.testing.assert_array_equal(before[1], np.random.get_state(legacy=False)["state"]["key"])
    assert before[2] == random.getstate()


def test_pixel_normal_is_the_mean_and_variance_of_each_pixel(digits: tuple[Array, Array, Array, Array]) -> None:
    train, _, test, seen = digits
    result = PixelNormal(train).complete(test, seen)
    normal = Normal(torch.from_numpy(train.mean(axis=0)), torch.from_numpy(train.std(axis=0)))
    log_prob = normal.log_prob(torch.from_numpy(test)).numpy()
    for i in range(len(test)):
        expected = log_prob[i, ~seen[i]].mean()
        assert result.joint[i] == pytest.approx(expected)
        assert result.marginal[i] == pytest.approx(expected)


def test_multivariate_normal_is_all_minus_seen(digits: tuple[Array, Array, Array, Array]) -> None:
    train, validation, test, seen = digits
    rival = MultivariateNormal64(train, validation)
    result = rival.complete(test, seen)
    for i, image in enumerate(test):
        s, u = seen[i], ~seen[i]
        whole = _dense(rival.mean, rival.covariance).log_prob(torch.from_numpy(image))
        part = _dense(rival.mean[s], rival.covariance[np.ix_(s, s)]).log_prob(torch.from_numpy(image[s]))
        assert result.joint[i] == pytest.approx(float(whole - part) / int(u.sum()), rel=1e-8)
        mean, std = _marginal_by_dense_algebra(rival.mean, rival.covariance, image, s)
        np.testing.assert_allclose(result.mean[i, u], mean, atol=1e-8)
        np.testing.assert_allclose(result.std[i, u], std, rtol=1e-6)


def test_shrinkage_is_the_one_that_suits_the_validation_images(digits: tuple[Array, Array, Array, Array]) -> None:
    train, validation, _, _ = digits
    rival = MultivariateNormal64(train, validation)
    empirical = np.cov(train.T, bias=True)
    scores = {}
    for a in rival.validation_scores:
        shrunk = (1 - a) * empirical + a * np.diag(np.diag(empirical))
        scores[a] = float(_dense(train.mean(axis=0), shrunk).log_prob(torch.from_numpy(validation)).mean())
        assert rival.validation_scores[a] == pytest.approx(scores[a], rel=1e-8)
    assert rival.shrinkage == max(scores, key=lambda a: scores[a])
    # Few training images need more shrinkage than many.
    assert MultivariateNormal64(train[:30], validation).shrinkage > rival.shrinkage


def test_shrinkage_passes_over_a_singular_covariance(digits: tuple[Array, Array, Array, Array]) -> None:
    train, validation, _, _ = digits
    rival = MultivariateNormal64(train[:10], validation, shrinkages=(0.0, 0.5))
    assert rival.shrinkage == 0.5


def test_image_gp_is_the_formula_with_the_fitted_kernel(digits: tuple[Array, Array, Array, Array]) -> None:
    _, _, test, seen = digits
    rival = ImageGP(restarts=1)
    result = rival.complete(test, seen)
    grid = pixel_grid(8, 8, dtype=torch.float64).numpy()
    for i, image in enumerate(test):
        s, u = seen[i], ~seen[i]
        level, kernel = rival.fit(grid[s], image[s])
        assert level == pytest.approx(image[s].mean())
        amplitude, scale = kernel.k1.k1.constant_value, kernel.k1.k2.length_scale
        noise = kernel.k2.noise_level
        squares = ((grid[:, None, :] - grid[None, :, :]) ** 2).sum(axis=-1)
        covariance = amplitude * np.exp(-0.5 * squares / scale**2) + noise * np.eye(64)
        mean, std = _marginal_by_dense_algebra(np.full(64, level), covariance, image, s)
        gain = covariance[np.ix_(u, s)] @ np.linalg.inv(covariance[np.ix_(s, s)])
        rest = covariance[np.ix_(u, u)] - gain @ covariance[np.ix_(s, u)]
        joint = _dense(mean, 0.5 * (rest + rest.T)).log_prob(torch.from_numpy(image[u]))
        assert result.joint[i] == pytest.approx(float(joint) / int(u.sum()), rel=1e-6)
        np.testing.assert_allclose(result.mean[i, u], mean, atol=1e-7)
        np.testing.assert_allclose(result.std[i, u], std, rtol=1e-6)


def test_gp_recovers_the_kernel_that_made_the_images() -> None:
    grid = pixel_grid(8, 8, dtype=torch.float64)
    covariance = 0.09 * torch.exp(-0.5 * torch.cdist(grid, grid) ** 2 / 0.5**2) + 0.01 * torch.eye(64)
    noise = torch.randn(200, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    images = (0.5 + noise @ torch.linalg.cholesky(covariance).T).numpy()
    kernel = TrainedGP(images, restarts=0).kernel
    assert kernel.k1.k1.constant_value == pytest.approx(0.09, rel=0.15)
    assert kernel.k1.k2.length_scale == pytest.approx(0.5, rel=0.05)
    assert kernel.k2.noise_level == pytest.approx(0.01, rel=0.05)
