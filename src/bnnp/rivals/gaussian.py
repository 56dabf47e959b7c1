"""Gaussian rivals that are linear in what they do not know: one Gaussian, the level of a task, a regression with a level for each task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnnp.data.collection import Collection
from bnnp.linalg import cholesky, eigh, log_det, solve_lower
from bnnp.seeds import seeded

__all__ = ["GaussianPrediction", "Levels", "Marginal", "PooledRegression", "TaskMean", "clean", "gathered"]

LOG_2PI = math.log(2.0 * math.pi)
MOST_TASKS, MOST_POINTS = 300, 6000
FEATURES, FOLDS = 150, 5
REACHES = (0.3, 1.0, 3.0)  # lengths of the random features, in units of sqrt(d_x) deviations of the inputs
RIDGES = tuple(float(r) for r in np.logspace(-4, 3, 15))


class GaussianPrediction:
    """Predict outputs that are jointly Gaussian over points, each output on its own: N(mean, F F^T + K + diag(noise)).

    Arguments:
        mean: with shape (*T, M, d_y).
        noise: variance of what is independent from point to point, broadcastable to (*T, M, d_y).
        factor: F with shape (*T, d_y, M, r), of a few common causes; or None.
        covariance: K with shape (*T, d_y, M, M); or None.
    """

    def __init__(self, mean: Tensor, noise: Tensor, factor: Tensor | None = None, covariance: Tensor | None = None) -> None:
        self._mean, self.noise = mean, noise.expand_as(mean)
        self.factor = mean.new_zeros((*mean.mT.shape, 0)) if factor is None else factor
        self.covariance = covariance

    @property
    def mean(self) -> Tensor:
        """Return the mean with shape (*T, M, d_y)."""
        return self._mean

    @property
    def std(self) -> Tensor:
        """Return the standard deviation, noise included, with the shape of `mean`."""
        shared = self.factor.square().sum(-1).mT
        if self.covariance is not None:
            shared = shared + self.covariance.diagonal(dim1=-2, dim2=-1).mT
        return (self.noise + shared).sqrt()

    def log_prob(self, yt: Tensor, joint: bool = False, mask: Tensor | None = None) -> Tensor:
        """Return log-densities: (*T, M) summed over outputs, zero where masked; or (*T,) of all observed points together."""
        y, seen = _targets(yt, mask)
        if joint:
            return self._log_joint((y - self.mean).mT * seen.mT, seen.mT).sum(-1)
        each = -0.5 * (((y - self.mean) / self.std).square() + LOG_2PI) - self.std.log()
        return torch.where(seen, each, 0.0).sum(-1)

    def _log_joint(self, residual: Tensor, seen: Tensor) -> Tensor:
        """Return the log-density of residuals (*T, d_y, M), zero where nothing was seen, with shape (*T, d_y)."""
        noise = self.noise.mT
        if self.covariance is not None:
            both = seen.unsqueeze(-1) & seen.unsqueeze(-2)
            full = self.covariance + self.factor @ self.factor.mT + torch.diag_embed(noise)
            root = cholesky(torch.where(both, full, torch.eye(full.shape[-1], dtype=full.dtype)))
            squares, volume = solve_lower(root, residual.unsqueeze(-1)).square().sum((-2, -1)), log_det(root)
        else:
            weight = seen / noise
            causes = self.factor.mT * weight.unsqueeze(-2)  # (*T, d_y, r, M)
            root = cholesky(torch.eye(self.factor.shape[-1], dtype=noise.dtype) + causes @ self.factor)
            explained = solve_lower(root, causes @ residual.unsqueeze(-1)).square().sum((-2, -1))
            squares = (residual.square() * weight).sum(-1) - explained
            volume = torch.where(seen, noise.log(), 0.0).sum(-1) + log_det(root)
        return -0.5 * (squares + volume + LOG_2PI * seen.sum(-1).double())

    def cdf(self, yt: Tensor) -> Tensor:
        """Return P(Y <= yt) with shape (*T, M, d_y)."""
        return torch.special.ndtr((yt.double() - self.mean) / self.std)

    def crps(self, yt: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the continuous ranked probability score in closed form, with shape (*T, M, d_y); zero where masked."""
        y, seen = _targets(yt, mask)
        z = (y - self.mean) / self.std
        density = (-0.5 * (z.square() + LOG_2PI)).exp()
        score = self.std * (z * (2.0 * torch.special.ndtr(z) - 1.0) + 2.0 * density - 1.0 / math.sqrt(math.pi))
        return torch.where(seen, score, 0.0)

    def sample(self, n: int, noisy: bool = True, seed: int = 0) -> Tensor:
        """Return draws with shape (n, *T, M, d_y), each coherent over the points."""
        generator = seeded(seed, "rival")

        def normal(shape: Sequence[int]) -> Tensor:
            return torch.randn((n, *shape), generator=generator, dtype=torch.float64)

        drawn = self.factor @ normal([*self.factor.shape[:-2], self.factor.shape[-1], 1])
        if self.covariance is not None:
            size = self.covariance.shape[-1]
            root = cholesky(self.covariance + 1e-9 * self.std.square().mean() * torch.eye(size, dtype=torch.float64))
            drawn = drawn + root @ normal([*self.covariance.shape[:-1], 1])
        function = self.mean + drawn.squeeze(-1).mT
        return function + self.noise.sqrt() * normal(self.mean.shape) if noisy else function


def _targets(yt: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    y = yt.double()
    seen = torch.ones_like(y, dtype=torch.bool) if mask is None else (mask if mask.ndim == y.ndim else mask.unsqueeze(-1)).expand_as(y)
    return torch.where(seen, y, 0.0), seen


def clean(xc: Any, yc: Any, mask: Any = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return a context as x, y and mask (*T, N, d_y), in float64, y being zero where nothing was observed."""
    x, y = (torch.as_tensor(part).double() for part in (xc, yc))
    y, seen = _targets(y, None if mask is None else torch.as_tensor(mask))
    seen = seen & y.isfinite()
    return x, torch.where(seen, y, 0.0), seen


def gathered(
    train: Collection, seed: int, most_tasks: int = MOST_TASKS, most_points: int = MOST_POINTS, most_each: int = MOST_POINTS
) -> list[tuple[Tensor, ...]]:
    """Return some tasks as tensors (x, y, mask), evenly spaced, each with its fair share of a number of points, at random."""
    count = min(len(train), most_tasks)
    generator, fair = seeded(seed, "rivals"), min(max(2, most_points // max(count, 1)), most_each)
    found: list[tuple[Tensor, ...]] = []
    for i in np.unique(np.linspace(0, len(train) - 1, count).round().astype(int)):
        x, y, mask = clean(*(np.ascontiguousarray(part) for part in train[int(i)]))
        keep = torch.randperm(len(x), generator=generator)[:fair]
        keep = keep[mask[keep].any(-1)]
        if len(keep):
            found.append((x[keep], y[keep], mask[keep]))
    if not found:
        raise ValueError("Expected training tasks with observed outputs, for rivals to learn from. Got none.")
    return found


@dataclass(frozen=True, eq=False)
class Levels:
    """Hold a hierarchical normal of one level for each task: y = level + noise, level ~ N(mean, between), noise ~ N(0, within).

    Arguments:
        mean: with shape (d_y,).
        between: variance of the levels of tasks, with shape (d_y,).
        within: variance about the level, with shape (d_y,).
        log_lik: of the tasks that it was fitted to, with shape (d_y,).
    """

    mean: Tensor
    between: Tensor
    within: Tensor
    log_lik: Tensor

    @staticmethod
    def fit(tasks: Sequence[tuple[Tensor, Tensor]]) -> Levels:
        """Maximise the likelihood of tasks (y, mask), over a fine grid of between / within; the other two have closed forms given it."""
        counts = torch.stack([mask.sum(0) for _, mask in tasks]).double()  # (T, d)
        sums = torch.stack([torch.where(mask, y, 0.0).sum(0) for y, mask in tasks])
        means = sums / counts.clamp(min=1)
        squares = torch.stack([torch.where(mask, y - m, 0.0).square().sum(0) for (y, mask), m in zip(tasks, means, strict=True)]).sum(0)
        ratio = torch.cat([torch.zeros(1), torch.logspace(-6, 6, 1201)]).double()[:, None, None]
        weight = counts / (1.0 + counts * ratio)  # (G, T, d): what a task's mean counts for
        mean = (weight * means).sum(1) / weight.sum(1).clamp(min=1e-12)
        total = counts.sum(0).clamp(min=1)
        spread = squares + (weight * (means - mean.unsqueeze(1)).square()).sum(1)
        # Of constant data the variance is a rounding error of their size, so that densities stay finite.
        within = (spread / total).clamp(min=1e-12 * float(means.square().mean() + 1e-12))
        log_lik = -0.5 * (total * (within.log() + LOG_2PI) + (1.0 + counts * ratio).log().sum(1) + spread / within)
        best = log_lik.argmax(0, keepdim=True)  # (1, d)
        mean, within, log_lik = (t.gather(0, best)[0] for t in (mean, within, log_lik))
        return Levels(mean, ratio[:, 0, 0][best[0]] * within, within, log_lik)

    def predict(self, residual: Tensor, seen: Tensor, about: Tensor) -> GaussianPrediction:
        """Predict given a context's residuals (*T, N, d_y) about a known function, whose values at the targets are `about`."""
        count = seen.sum(-2)
        mean = torch.where(seen, residual, 0.0).sum(-2) / count.clamp(min=1)
        share = self.between * count / (self.between * count + self.within)
        level = self.mean + share * (mean - self.mean)
        factor = (self.between * (1.0 - share)).sqrt()[..., None, None].expand(*share.shape, about.shape[-2], 1)
        return GaussianPrediction(about + level.unsqueeze(-2), self.within, factor)


@dataclass(frozen=True, eq=False)
class _Known:
    """Be a posterior whose prediction is a function of the targets' inputs."""

    rival: Any
    context: tuple[Tensor, Tensor, Tensor]

    def predict(self, xt: Tensor) -> GaussianPrediction:
        """Return the prediction at xt with shape (*T, M, d_x)."""
        found: GaussianPrediction = self.rival.predict(self.context, torch.as_tensor(xt).double())
        return found


class Marginal:
    """Predict every point by one Gaussian, with the mean and the variance of all outputs of the training tasks.

    Arguments:
        train: tasks.
    """

    def __init__(self, train: Collection) -> None:
        tasks = gathered(train, 0)
        y, mask = torch.cat([y for _, y, _ in tasks]), torch.cat([mask for _, _, mask in tasks])
        count = mask.sum(0).clamp(min=1)
        self.mean = y.sum(0) / count
        squares = torch.where(mask, y - self.mean, 0.0).square().sum(0)
        self.variance = (squares / count).clamp(min=1e-12 * float(self.mean.square().max() + 1e-12))

    def condition(self, xc: Tensor, yc: Tensor, mask: Tensor | None = None, num_samples: int = 64, seed: int = 0) -> _Known:
        """Return the posterior, which knows nothing of the context."""
        return _Known(self, clean(xc, yc, mask))

    def predict(self, context: tuple[Tensor, Tensor, Tensor], xt: Tensor) -> GaussianPrediction:
        """Return the same Gaussian at every point."""
        return GaussianPrediction(self.mean.expand(*xt.shape[:-1], -1), self.variance)


class TaskMean:
    """Predict every point of a task by the level of the task: the mean of its context, shrunk towards that of all tasks.

    Arguments:
        train: tasks, from which the variances between and within tasks are estimated. See `Levels`.
    """

    def __init__(self, train: Collection) -> None:
        self.levels = Levels.fit([(y, mask) for _, y, mask in gathered(train, 0)])

    def condition(self, xc: Tensor, yc: Tensor, mask: Tensor | None = None, num_samples: int = 64, seed: int = 0) -> _Known:
        """Return the posterior of the task's level."""
        return _Known(self, clean(xc, yc, mask))

    def predict(self, context: tuple[Tensor, Tensor, Tensor], xt: Tensor) -> GaussianPrediction:
        """Return the exact prediction, joint over points."""
        _, y, seen = context
        return self.levels.predict(y, seen, y.new_zeros((*xt.shape[:-1], y.shape[-1])))


class PooledRegression:
    """Predict by one regression over the points of all training tasks, and a level for each task about it.

    Ridge regression on the inputs and on random Fourier features of them. Their length and the ridge are chosen, and the variances between
    and within tasks estimated, by leaving out a fifth of the tasks at a time. At most 6,000 points of at most 300 tasks are used.

    Arguments:
        train: tasks.
        seed: of the features and of the points that are used.

    References:
        Random features for large-scale kernel machines (Rahimi and Recht, 2007).
    """

    def __init__(self, train: Collection, seed: int = 0) -> None:
        tasks = gathered(train, seed)
        x = torch.cat([x for x, _, _ in tasks])
        self.shift, self.scale = x.mean(0), x.std(0).clamp(min=1e-9) if len(x) > 1 else torch.ones(x.shape[1], dtype=x.dtype)
        generator = seeded(seed, "features")
        self.directions = torch.randn((x.shape[1], FEATURES), generator=generator, dtype=x.dtype) / math.sqrt(x.shape[1])
        self.phases = 2.0 * math.pi * torch.rand(FEATURES, generator=generator, dtype=x.dtype)
        fold = torch.cat([torch.full((len(x),), i % FOLDS) for i, (x, _, _) in enumerate(tasks)])
        if len(tasks) < 2:
            fold = torch.arange(len(x)) % 2
        sizes = [len(x) for x, _, _ in tasks]
        y, mask = torch.cat([y for _, y, _ in tasks]), torch.cat([mask for _, _, mask in tasks])
        self.parts = []
        for j in range(y.shape[1]):
            # First as if points of a task were independent, then given how alike those residuals are within tasks.
            first = self._choose(x, y[:, j], mask[:, j], fold, sizes, 0.0)[0]
            ratio = float(first.between / first.within)
            self.parts.append(self._choose(x, y[:, j], mask[:, j], fold, sizes, ratio))
        self.levels = Levels(*(torch.cat([getattr(part[0], name) for part in self.parts]) for name in Levels.__annotations__))

    def _features(self, x: Tensor, reach: float | None) -> Tensor:
        z = (x - self.shift) / self.scale
        if reach is None:
            return z
        return torch.cat([z, math.sqrt(2.0 / FEATURES) * (z @ self.directions / reach + self.phases).cos()], dim=-1)

    def _choose(
        self, x: Tensor, y: Tensor, seen: Tensor, fold: Tensor, sizes: list[int], ratio: float
    ) -> tuple[Levels, float | None, Tensor, Tensor]:
        """Return the levels, the length, coefficients and centre of the best regression of one output, given between / within."""
        found: list[Any] = []
        for reach in (None, *REACHES):
            A = self._features(x, reach)
            B, z = _told_apart(A, y, seen, sizes, ratio)
            out = torch.zeros(len(RIDGES), len(y), dtype=y.dtype)  # predictions of points by regressions that did not see their tasks
            for k in fold.unique():
                inside, outside = seen & (fold != k), fold == k
                coefficients = _ridge(B[inside], z[inside])
                # About the centre of the points that were fitted: levels of folds differ otherwise.
                out[:, outside] = ((A[outside] - A[inside].mean(0)) @ coefficients).T if inside.any() else 0.0
            for ridge, predicted in enumerate(out):
                residual = (y - predicted).unsqueeze(-1).split(sizes)
                levels = Levels.fit(list(zip(residual, seen.unsqueeze(-1).split(sizes), strict=True)))
                found.append((float(levels.log_lik), levels, reach, ridge))
        _, levels, reach, ridge = max(found, key=lambda row: row[0])
        B, z = _told_apart(self._features(x, reach), y, seen, sizes, ratio)
        centre = self._features(x, reach)[seen].mean(0)
        return levels, reach, _ridge(B[seen], z[seen])[:, ridge], centre

    def condition(self, xc: Tensor, yc: Tensor, mask: Tensor | None = None, num_samples: int = 64, seed: int = 0) -> _Known:
        """Return the posterior of the task's level about the regression."""
        return _Known(self, clean(xc, yc, mask))

    def regress(self, x: Tensor) -> Tensor:
        """Return the regression's values with shape (*T, N, d_y)."""
        return torch.stack([(self._features(x, reach) - centre) @ c for _, reach, c, centre in self.parts], dim=-1)

    def predict(self, context: tuple[Tensor, Tensor, Tensor], xt: Tensor) -> GaussianPrediction:
        """Return the exact prediction, joint over points, the regression taken as known."""
        x, y, seen = context
        return self.levels.predict(y - self.regress(x), seen, self.regress(xt))


def _told_apart(A: Tensor, y: Tensor, seen: Tensor, sizes: list[int], ratio: float) -> tuple[Tensor, Tensor]:
    """Return features and outputs less a share of their task's mean, after which residuals with levels of their own are independent.

    The share is 1 - (1 + n ratio)^(-1/2) for n points and ratio = between / within, as in generalised least squares.
    """
    rows = []
    for part, own in zip(torch.cat([A, y.unsqueeze(-1)], dim=-1).split(sizes), seen.split(sizes), strict=True):
        n = int(own.sum())
        share = 1.0 - (1.0 + n * ratio) ** -0.5
        rows.append(part - share * part[own].mean(0) if n else part)
    B = torch.cat(rows)
    return B[:, :-1], B[:, -1]


def _ridge(A: Tensor, y: Tensor) -> Tensor:
    """Return coefficients (p, R) of ridge regressions with an intercept, one for each of `RIDGES`; the intercept is left to the levels."""
    if len(A) == 0:
        return A.new_zeros((A.shape[1], len(RIDGES)))
    B = A - A.mean(0)
    values, vectors = eigh(B.mT @ B)
    along = vectors.mT @ (B.mT @ (y - y.mean()))
    return vectors @ (along.unsqueeze(-1) / (values.clamp(min=0.0).unsqueeze(-1) + A.new_tensor(RIDGES)))
