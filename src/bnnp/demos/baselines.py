"""What image completion costs without a learned network: rivals that a reader would try first.

Every rival is a joint Gaussian over the pixels of an image, conditioned exactly on the pixels that are seen. They
differ in where the Gaussian comes from: the pixels of the training images one by one (`PixelNormal`), their means and
covariances (`MultivariateNormal64`), smoothness learned from the seen pixels of the one image (`ImageGP`) or from the
training images (`TrainedGP`). All score the same unseen pixels of the same dequantised images, in the same units:
`Completion`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bnnp.data.images import pixel_grid

__all__ = ["Completion", "ImageGP", "MultivariateNormal64", "PixelNormal", "TrainedGP", "condition_gaussian"]

FloatArray = np.ndarray[Any, np.dtype[np.float64]]
BoolArray = np.ndarray[Any, np.dtype[np.bool_]]

SHRINKAGES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0)
LOG_2PI = math.log(2.0 * math.pi)
# Of variances and of the lengthscale, where the square of the image has side 2. Chosen on validation images in favour
# of the Gaussian process: with wider bounds a handful of seen pixels is fitted with far too much confidence, and
# scores are worse.
AMPLITUDE_BOUNDS, LENGTHSCALE_BOUNDS, NOISE_BOUNDS = (0.05, 1.0), (0.1, 1.0), (0.05**2, 0.5**2)


@dataclass(frozen=True, eq=False)
class Completion:
    """Hold what a method predicts for the unseen pixels of m images of D pixels, and how that scores.

    Densities are per unit of grey value, where paper is 0 and ink is 1, so a log-density of 0 is that of the uniform
    guess. Arrays with shape (m, D) hold NaN at seen pixels where nothing is predicted there (`pit`, `crps`).

    Arguments:
        truth: the images with shape (m, D).
        unseen: True where a pixel was predicted, with shape (m, D).
        mean: predictive mean with shape (m, D); at seen pixels, what was seen.
        std: predictive standard deviation of the grey value, noise included, with shape (m, D); 0 at seen pixels.
        joint: log-density of all unseen pixels of an image together, divided by their number, with shape (m,).
        marginal: log-density of an unseen pixel taken alone, mean over those of an image, with shape (m,).
        pit: predictive probability of a value below the true one, with shape (m, D); uniform if calibrated.
        crps: continuous ranked probability score in grey value, lower is better, with shape (m, D).
    """

    truth: FloatArray
    unseen: BoolArray
    mean: FloatArray
    std: FloatArray
    joint: FloatArray
    marginal: FloatArray
    pit: FloatArray
    crps: FloatArray

    @staticmethod
    def gaussian(truth: FloatArray, unseen: BoolArray, mean: FloatArray, std: FloatArray, joint: FloatArray) -> Completion:
        """Score a predictive whose marginals are Gaussian.

        CRPS(N(mean, std^2), y) = std (z (2 Phi(z) - 1) + 2 phi(z) - 1 / sqrt(pi)), z = (y - mean) / std.

        Arguments:
            truth: the images with shape (m, D).
            unseen: True where a pixel was predicted, with shape (m, D).
            mean: predictive mean with shape (m, D).
            std: predictive standard deviation with shape (m, D); what stands at seen pixels is not used.
            joint: log-density of all unseen pixels of an image together (not divided), with shape (m,).

        Returns:
            The scores.

        References:
            Strictly proper scoring rules, prediction, and estimation, Gneiting and Raftery, 2007, section 4.2.
        """
        count = unseen.sum(axis=1)
        scale = np.where(unseen, std, 1.0)
        z = (truth - mean) / scale
        log_prob = -0.5 * (z**2 + LOG_2PI) - np.log(scale)
        below = torch.special.ndtr(torch.from_numpy(z)).numpy()
        density = np.exp(-0.5 * (z**2 + LOG_2PI))
        crps = scale * (z * (2.0 * below - 1.0) + 2.0 * density - 1.0 / math.sqrt(math.pi))
        return Completion(
            truth=truth,
            unseen=unseen,
            mean=np.where(unseen, mean, truth),
            std=np.where(unseen, std, 0.0),
            joint=joint / count,
            marginal=np.where(unseen, log_prob, 0.0).sum(axis=1) / count,
            pit=np.where(unseen, below, np.nan),
            crps=np.where(unseen, crps, np.nan),
        )

    def pooled_pit(self) -> FloatArray:
        """Return the PIT values of all unseen pixels of all images, with shape (K,)."""
        return self.pit[self.unseen]

    def coverage(self, level: float) -> float:
        """Return the share of unseen pixels inside the central predictive interval of a level, such as 0.8."""
        return float(np.mean(np.abs(self.pooled_pit() - 0.5) <= 0.5 * level))

    def crps_per_image(self) -> FloatArray:
        """Return the mean CRPS over the unseen pixels of each image, with shape (m,)."""
        scores: FloatArray = np.nanmean(self.crps, axis=1)
        return scores

    def rmse_per_image(self) -> FloatArray:
        """Return the root mean squared error of the mean over the unseen pixels of each image, with shape (m,)."""
        squares = (self.mean - self.truth) ** 2
        errors: FloatArray = np.sqrt(squares.sum(axis=1) / self.unseen.sum(axis=1))
        return errors

    def summary(self) -> dict[str, tuple[float, float]]:
        """Return mean and standard error over images of "joint", "marginal", "crps" and "rmse"."""
        scores = {
            "joint": self.joint,
            "marginal": self.marginal,
            "crps": self.crps_per_image(),
            "rmse": self.rmse_per_image(),
        }
        root = math.sqrt(max(len(self.joint), 1))
        spread = {name: float(v.std(ddof=1)) if len(v) > 1 else math.nan for name, v in scores.items()}
        return {name: (float(v.mean()), spread[name] / root) for name, v in scores.items()}


def condition_gaussian(
    mean: FloatArray, covariance: FloatArray, image: FloatArray, seen: BoolArray
) -> tuple[FloatArray, FloatArray, float]:
    """Predict the unseen pixels u of one image from the seen pixels s under N(mean, covariance).

        y_u | y_s ~ N(mean_u + C_us C_ss^-1 (y_s - mean_s),  C_uu - C_us C_ss^-1 C_su)

    Costs one Cholesky factorisation of the D x D covariance with the seen pixels first: the lower right block of its
    factor is the factor of the conditional covariance.

    Arguments:
        mean: with shape (D,).
        covariance: positive definite, with shape (D, D).
        image: with shape (D,).
        seen: True where a pixel is seen, with shape (D,).

    Returns:
        Mean and standard deviation of the unseen pixels, both with shape (U,), and the log-density of all of them
        together.
    """
    order = np.concatenate([np.flatnonzero(seen), np.flatnonzero(~seen)])
    n = int(seen.sum())
    factor = np.linalg.cholesky(covariance[np.ix_(order, order)])
    residual = (image - mean)[order]
    white_seen = np.linalg.solve(factor[:n, :n], residual[:n])
    shift = factor[n:, :n] @ white_seen
    inner = factor[n:, n:]
    white = np.linalg.solve(inner, residual[n:] - shift)
    joint = -0.5 * float(white @ white) - float(np.log(np.diag(inner)).sum()) - 0.5 * len(white) * LOG_2PI
    return mean[order[n:]] + shift, np.sqrt((inner**2).sum(axis=1)), joint


class PixelNormal:
    """Predict every pixel by the mean and variance that it has over the training images, whatever is seen.

    Arguments:
        train: training images with shape (n, D).
    """

    def __init__(self, train: FloatArray) -> None:
        self.mean: FloatArray = train.mean(axis=0)
        self.variance: FloatArray = train.var(axis=0)

    def complete(self, images: FloatArray, seen: BoolArray) -> Completion:
        """Score the unseen pixels; pixels are independent, so joint and marginal log-densities agree.

        Arguments:
            images: with shape (m, D).
            seen: True where a pixel is seen, with shape (m, D).

        Returns:
            The predictions and their scores.
        """
        log_prob = -0.5 * ((images - self.mean) ** 2 / self.variance + LOG_2PI + np.log(self.variance))
        joint = np.where(seen, 0.0, log_prob).sum(axis=1)
        mean = np.broadcast_to(self.mean, images.shape)
        std = np.broadcast_to(np.sqrt(self.variance), images.shape)
        return Completion.gaussian(images, ~seen, mean, std, joint)


class MultivariateNormal64:
    """Predict by one Gaussian over all pixels together (64 for the digits), conditioned on the seen pixels.

    Mean and covariance S are those of the training images; shrinkage makes the covariance usable when images are few,

        C_a = (1 - a) S + a diag(S),

    with the a of a small grid that gives the validation images the highest log-density.

    Arguments:
        train: training images with shape (n, D).
        validation: validation images with shape (v, D).
        shrinkages: the values of a that are tried, in (0, 1].
    """

    def __init__(self, train: FloatArray, validation: FloatArray, shrinkages: Sequence[float] = SHRINKAGES) -> None:
        self.mean: FloatArray = train.mean(axis=0)
        empirical = np.cov(train, rowvar=False, bias=True)
        diagonal = np.diag(np.diag(empirical))
        candidates = {a: (1.0 - a) * empirical + a * diagonal for a in shrinkages}
        self.validation_scores = {a: _mean_log_density(validation - self.mean, c) for a, c in candidates.items()}
        self.shrinkage: float = max(self.validation_scores, key=lambda a: self.validation_scores[a])
        self.covariance: FloatArray = candidates[self.shrinkage]

    def complete(self, images: FloatArray, seen: BoolArray) -> Completion:
        """Score the unseen pixels given the seen. See `condition_gaussian`.

        Arguments:
            images: with shape (m, D).
            seen: True where a pixel is seen, with shape (m, D).

        Returns:
            The predictions and their scores.
        """
        return _complete_each(images, seen, [(self.mean, self.covariance)] * len(images))


class ImageGP:
    """Predict by a Gaussian process on the pixel grid whose hyper-parameters are fitted to each image's seen pixels.

        k(x, x') = amplitude^2 exp(-|x - x'|^2 / (2 lengthscale^2)) + noise^2 [x = x'],  mean = mean of the seen pixels

    Amplitude, lengthscale and noise maximise the marginal likelihood of the seen pixels, with restarts; no other
    image is used. Bounds keep them to what suits grey values in [0, 1]. Costs about 30 ms an image of 8 x 8 pixels.

    Arguments:
        height: number of rows.
        width: number of columns.
        restarts: further starting points of the optimiser, drawn from the bounds.
        seed: of the restarts.
        unit: how much of the images' own scale corresponds to one unit of grey value, for images that were transformed.
    """

    def __init__(self, height: int = 8, width: int = 8, restarts: int = 2, seed: int = 0, unit: float = 1.0) -> None:
        self.unit = unit
        self.grid: FloatArray = pixel_grid(height, width, dtype=torch.float64).numpy()
        self.restarts = restarts
        self.seed = seed

    def fit(self, places: FloatArray, values: FloatArray) -> tuple[float, Any]:
        """Fit one image.

        Arguments:
            places: coordinates of the seen pixels with shape (N, 2).
            values: their grey values with shape (N,).

        Returns:
            The constant mean, and the fitted kernel of values divided by `unit`, a function of coordinates.
        """
        mean = float(values.mean())
        return mean, _fit_kernel(places, (values - mean) / self.unit, self.restarts, self.seed)

    def complete(self, images: FloatArray, seen: BoolArray) -> Completion:
        """Fit every image to its seen pixels and score the unseen; the joint density includes the noise.

        Arguments:
            images: with shape (m, D).
            seen: True where a pixel is seen, with shape (m, D).

        Returns:
            The predictions and their scores.
        """
        gaussians = []
        for image, mask in zip(images, seen, strict=True):
            mean, kernel = self.fit(self.grid[mask], image[mask])
            gaussians.append((np.full(len(image), mean), self.unit**2 * np.asarray(kernel(self.grid))))
        return _complete_each(images, seen, gaussians)


class TrainedGP:
    """Predict by the Gaussian process of `ImageGP` with one set of hyper-parameters, fitted to whole training images.

    What a smoothness prior can learn from many images: one mean grey value, amplitude, lengthscale and noise for all,
    and no place where ink is likelier than elsewhere.

    Arguments:
        train: training images with shape (n, height * width).
        height: number of rows.
        width: number of columns.
        restarts: further starting points of the optimiser.
        seed: of the restarts.
    """

    def __init__(self, train: FloatArray, height: int = 8, width: int = 8, restarts: int = 2, seed: int = 0) -> None:
        grid = pixel_grid(height, width, dtype=torch.float64).numpy()
        level = float(train.mean())
        self.kernel: Any = _fit_kernel(grid, (train - level).T, restarts, seed)
        self.mean: FloatArray = np.full(len(grid), level)
        self.covariance: FloatArray = np.asarray(self.kernel(grid))

    def complete(self, images: FloatArray, seen: BoolArray) -> Completion:
        """Score the unseen pixels given the seen. See `condition_gaussian`.

        Arguments:
            images: with shape (m, D).
            seen: True where a pixel is seen, with shape (m, D).

        Returns:
            The predictions and their scores.
        """
        return _complete_each(images, seen, [(self.mean, self.covariance)] * len(images))


def _fit_kernel(places: FloatArray, centred: FloatArray, restarts: int, seed: int) -> Any:
    """Return the kernel of highest marginal likelihood; columns of `centred` are independent draws of one process."""
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
    except ImportError as error:
        raise ImportError('The Gaussian-process rival needs scikit-learn. Run: pip install "bnnp[data]".') from error
    signal = ConstantKernel(0.1, AMPLITUDE_BOUNDS) * RBF(0.5, LENGTHSCALE_BOUNDS)
    kernel = signal + WhiteKernel(0.01, NOISE_BOUNDS)
    # alpha is a jitter on top of the noise of the kernel; the noise has a lower bound already, so none is needed.
    model = GaussianProcessRegressor(kernel, alpha=0.0, n_restarts_optimizer=restarts, random_state=seed)
    # A hyper-parameter on its bound is a normal outcome for six seen pixels.
    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
        model.fit(places, centred)
    return model.kernel_


def _complete_each(images: FloatArray, seen: BoolArray, gaussians: Sequence[tuple[FloatArray, FloatArray]]) -> Completion:
    """Condition the Gaussian (mean, covariance) of each image on its seen pixels."""
    mean, std, joint = images.copy(), np.zeros(images.shape), np.zeros(len(images))
    for i, (prior_mean, covariance) in enumerate(gaussians):
        unseen = ~seen[i]
        mean[i, unseen], std[i, unseen], joint[i] = condition_gaussian(prior_mean, covariance, images[i], seen[i])
    return Completion.gaussian(images, ~seen, mean, std, joint)


def _mean_log_density(residual: FloatArray, covariance: FloatArray) -> float:
    """Return the mean over rows of log N(residual; 0, covariance), or minus infinity if the covariance is singular."""
    try:
        factor = np.linalg.cholesky(covariance)
    except np.linalg.LinAlgError:
        return -math.inf
    white = np.linalg.solve(factor, residual.T)
    squares = (white**2).sum(axis=0)
    return float(-0.5 * squares.mean() - np.log(np.diag(factor)).sum() - 0.5 * len(factor) * LOG_2PI)
