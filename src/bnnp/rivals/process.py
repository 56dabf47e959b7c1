"""Gaussian processes: what smoothness alone says of a task, learned over all training tasks or fitted to the one task."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from bnnp.data.collection import Collection
from bnnp.linalg import cholesky, log_det, solve_lower
from bnnp.rivals.gaussian import LOG_2PI, GaussianPrediction, PooledRegression, clean, gathered
from bnnp.seeds import seeded

__all__ = ["TaskGP"]

TASKS, POINTS = 30, 50  # from which hyper-parameters are learned
MOST_CONTEXT, MOST_FITTED = 500, 100
FLOOR = 1e-6  # of the noise, as a share of the variance of all outputs
STARTS = (0.3, 1.0, 3.0)
REFIT_STEPS, REFIT_RATE = 50, 0.1


class TaskGP:
    """Predict each task by a Gaussian process on its context, each output on its own.

        k(x, x') = level^2 + amplitude^2 exp(-1/2 sum_i (x_i - x'_i)^2 / length_i^2) + noise^2 [x = x']

    The mean is that of all tasks, or a regression over them: what is common to tasks, such as mountains on a map, is then known.
    Hyper-parameters maximise the summed evidence of at most 30 training tasks, 1,500 points in all. Of a context of more than 500 points a
    random subset of 500 is used.

    Arguments:
        train: tasks.
        seed: of subsets.
        about: the regression that gives the mean; None for a constant.

    References:
        Gaussian Processes for Machine Learning (Rasmussen and Williams, 2006), chapters 2 and 5.
    """

    def __init__(self, train: Collection, seed: int = 0, about: PooledRegression | None = None) -> None:
        self.about = about
        pooled = [(x, self._less(x, y), mask) for x, y, mask in gathered(train, seed)]
        x, y = torch.cat([x for x, _, _ in pooled]), torch.cat([y for _, y, _ in pooled])
        mask = torch.cat([mask for _, _, mask in pooled])
        self.x_scale = x.std(0).clamp(min=1e-9) if len(x) > 1 else torch.ones(x.shape[1], dtype=x.dtype)
        count = mask.sum(0).clamp(min=1)
        self.mean = torch.where(mask, y, 0.0).sum(0) / count
        squares = torch.where(mask, y - self.mean, 0.0).square().sum(0) / count
        self.y_scale = squares.sqrt().clamp(min=1e-6 * float(self.mean.abs().max() + 1e-6))
        self.refit = False
        self.theta = self._learn(gathered(train, seed, TASKS, TASKS * POINTS, 2 * POINTS))

    def fitted_to_the_task(self) -> TaskGP:
        """Return a process whose hyper-parameters are fitted to each context anew.

        They maximise the evidence of at most 100 points of the context, times a log-normal prior of deviation 1 about those learned over
        tasks, without which a handful of points is fitted with far too much confidence.
        """
        other = copy.copy(self)
        other.refit = True
        return other

    def _less(self, x: Tensor, y: Tensor) -> Tensor:
        return y if self.about is None else y - self.about.regress(x)

    def _scaled(self, x: Tensor, y: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return inputs (*T, N, d_x), residuals and mask (*T, d_y, N), standardised."""
        return x / self.x_scale, (torch.where(seen, self._less(x, y) - self.mean, 0.0) / self.y_scale).mT, seen.mT

    def _learn(self, tasks: list[tuple[Tensor, ...]]) -> Tensor:
        """Return the logarithms of level, amplitude, noise and lengths with shape (d_y, 3 + d_x)."""
        most = max(len(x) for x, _, _ in tasks)
        padded = [torch.stack([torch.cat([t[i], t[i].new_zeros(most - len(t[i]), t[i].shape[1])]) for t in tasks]) for i in range(3)]
        x, y, seen = self._scaled(*padded)
        d_x, d_y = x.shape[-1], y.shape[-2]
        starts = [torch.tensor([-0.7, -0.3, -1.5] + [reach] * d_x, dtype=x.dtype).expand(d_y, -1) for reach in torch.tensor(STARTS).log()]
        with torch.enable_grad():
            theta = max(starts, key=lambda start: float(_evidence(start, x, y, seen).sum())).clone().requires_grad_()
            optimiser = torch.optim.LBFGS([theta], max_iter=60, line_search_fn="strong_wolfe")

            def loss() -> Tensor:
                optimiser.zero_grad()
                # A weak pull to 0 keeps lengths along constant inputs finite.
                value = 0.005 * theta.square().sum() - _evidence(theta, x, y, seen).sum() / len(tasks)
                value.backward()
                return value

            optimiser.step(loss)
        return _bounded(theta.detach())

    def _refit(self, x: Tensor, y: Tensor, seen: Tensor) -> Tensor:
        """Return hyper-parameters of each task with shape (*T, d_y, 3 + d_x)."""
        x, y, seen = x[..., :MOST_FITTED, :], y[..., :MOST_FITTED], seen[..., :MOST_FITTED]
        with torch.enable_grad():
            theta = self.theta.expand(*y.shape[:-1], -1).clone().requires_grad_()
            optimiser = torch.optim.Adam([theta], lr=REFIT_RATE)
            for _ in range(REFIT_STEPS):
                optimiser.zero_grad()
                loss = 0.5 * (theta - self.theta).square().sum() - _evidence(theta, x, y, seen).sum()
                loss.backward()
                optimiser.step()
        return _bounded(theta.detach())

    def condition(self, xc: Tensor, yc: Tensor, mask: Tensor | None = None, num_samples: int = 64, seed: int = 0) -> _Posterior:
        """Return the posterior process of each task."""
        x, y, seen = clean(xc, yc, mask)
        # In random order, observed points first: a subset is then a slice.
        key = torch.rand(x.shape[-2], generator=seeded(seed, "subset"), dtype=x.dtype) - 2.0 * seen.any(-1)
        order = key.argsort(-1)[..., :MOST_CONTEXT, None]
        x, y, seen = (part.gather(-2, order.expand(*order.shape[:-1], part.shape[-1])) for part in (x, y, seen))
        points = self._scaled(x, y, seen)
        return _Posterior(self, points, self._refit(*points) if self.refit else self.theta)


@dataclass(frozen=True, eq=False)
class _Posterior:
    """Hold a process, the standardised context and the hyper-parameters (*T, d_y, 3 + d_x)."""

    process: TaskGP
    context: tuple[Tensor, Tensor, Tensor]
    theta: Tensor

    def predict(self, xt: Tensor) -> GaussianPrediction:
        """Return the exact prediction at xt with shape (*T, M, d_x), joint over points."""
        x, y, seen = self.context
        process, xt = self.process, torch.as_tensor(xt).double()
        at, scale = xt / process.x_scale, process.y_scale
        mean = process.mean if process.about is None else process.mean + process.about.regress(xt)
        root, white = _factor(self.theta, x, y, seen)
        cross = _kernel(self.theta, x, at) * seen.unsqueeze(-1)
        told = solve_lower(root, cross)  # (*T, d_y, N, M)
        covariance = _kernel(self.theta, at, at) - told.mT @ told
        predicted = (told.mT @ white.unsqueeze(-1)).squeeze(-1).mT
        noise = ((2.0 * self.theta[..., 2]).exp() + FLOOR) * scale.square()
        return GaussianPrediction(mean + scale * predicted, noise.unsqueeze(-2), covariance=covariance * scale.square()[:, None, None])


def _bounded(theta: Tensor) -> Tensor:
    """Keep hyper-parameters to where the covariance can be factorised: no deviation above 20 of the outputs' own."""
    return torch.cat([theta[..., :3].clamp(-12.0, 3.0), theta[..., 3:].clamp(-5.0, 8.0)], dim=-1)


def _kernel(theta: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return k(a, b) without noise with shape (*T, d_y, N, M) for inputs (*T, N, d_x) and (*T, M, d_x)."""
    lengths = theta[..., None, 3:].exp()  # (*T, d_y, 1, d_x)
    u, v = a.unsqueeze(-3) / lengths, b.unsqueeze(-3) / lengths
    # |u - v|^2 by products: differences of all pairs in all inputs take far more memory. Rounding can leave it below 0.
    squared = (u.square().sum(-1).unsqueeze(-1) + v.square().sum(-1).unsqueeze(-2) - 2.0 * u @ v.mT).clamp(min=0.0)
    level, amplitude = (2.0 * theta[..., 0]).exp(), (2.0 * theta[..., 1]).exp()
    return level[..., None, None] + amplitude[..., None, None] * (-0.5 * squared).exp()


def _factor(theta: Tensor, x: Tensor, y: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factor R of the covariance of the observed points, the identity where nothing was, and R^{-1} y (*T, d_y, N)."""
    theta = _bounded(theta)
    eye = torch.eye(x.shape[-2], dtype=x.dtype)
    covariance = _kernel(theta, x, x) + ((2.0 * theta[..., 2]).exp() + FLOOR)[..., None, None] * eye
    root = cholesky(torch.where(seen.unsqueeze(-1) & seen.unsqueeze(-2), covariance, eye))
    return root, solve_lower(root, y.unsqueeze(-1)).squeeze(-1)


def _evidence(theta: Tensor, x: Tensor, y: Tensor, seen: Tensor) -> Tensor:
    """Return log N(y; 0, K) of the observed points of each task and output, with shape (*T, d_y)."""
    root, white = _factor(theta, x, y, seen)
    value: Tensor = -0.5 * (white.square().sum(-1) + log_det(root) + LOG_2PI * seen.sum(-1).double())
    return value
