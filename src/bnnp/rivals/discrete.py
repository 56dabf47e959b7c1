"""Rivals for class labels and counts: frequencies and rates, of all tasks or of the task, in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnnp.data.collection import Collection
from bnnp.rivals.gaussian import clean, gathered
from bnnp.seeds import seeded

__all__ = ["ClassFrequencies", "CountRates"]

STRENGTHS = torch.logspace(-2, 5, 281, dtype=torch.float64)  # how many points the experience with other tasks is worth
COUNT_TASKS, COUNT_POINTS = 300, 20_000


class ClassFrequencies:
    """Predict labels by their frequencies: those of all training tasks, or of the task, where these count as some points more.

    The frequencies of a task have a Dirichlet distribution about those of all tasks, whose strength is fitted to the training tasks.

    Arguments:
        train: tasks.
        classes: number K of classes of one column of labels 0 to K - 1; None: columns of 0 and 1 (or values between), each on its own.
        per_task: whether the context is used.
    """

    def __init__(self, train: Collection, classes: int | None, per_task: bool) -> None:
        self.classes, self.per_task = classes, per_task
        counts = torch.stack([self._counts(y, mask) for _, y, mask in gathered(train, 0, COUNT_TASKS, COUNT_POINTS)])  # (T, d, K)
        total = counts.sum(0) + 0.5  # nothing is impossible because it was not seen yet
        self.base = total / total.sum(-1, keepdim=True)
        log_lik = torch.stack([_dirichlet_multinomial(s * self.base, counts).sum() for s in STRENGTHS])
        self.strength = float(STRENGTHS[log_lik.argmax()])

    def _soft(self, y: Tensor) -> Tensor:
        """Return labels (..., d) as shares of the classes (..., d, K)."""
        if self.classes is None:
            return torch.stack([1.0 - y, y], dim=-1)
        return torch.nn.functional.one_hot(y.long().clamp(0, self.classes - 1), self.classes).double()

    def _counts(self, y: Tensor, seen: Tensor) -> Tensor:
        return torch.where(seen.unsqueeze(-1), self._soft(y), 0.0).sum(-3)

    def condition(self, xc: Tensor, yc: Tensor, mask: Tensor | None = None, num_samples: int = 64, seed: int = 0) -> _Labels:
        """Return the posterior of the frequencies."""
        _, y, seen = clean(xc, yc, mask)
        alpha = self.strength * self.base + self._counts(y, seen)
        return _Labels(self, alpha if self.per_task else self.base.expand_as(alpha))


def _dirichlet_multinomial(alpha: Tensor, counts: Tensor) -> Tensor:
    """Return the log probability of labels with these counts (..., d, K), in the order they came, with shape (..., d)."""
    a, n = alpha.sum(-1), counts.sum(-1)
    return a.lgamma() - (a + n).lgamma() + ((alpha + counts).lgamma() - alpha.lgamma()).sum(-1)


@dataclass(frozen=True, eq=False)
class _Labels:
    """Hold the parameters (*T, d, K) of the frequencies, or the frequencies where they are the same for all tasks; predict anywhere."""

    rival: ClassFrequencies
    alpha: Tensor
    points: int = 0

    is_discrete = True

    def predict(self, xt: Tensor) -> _Labels:
        """Return the prediction at xt with shape (*T, M, d_x)."""
        return _Labels(self.rival, self.alpha, xt.shape[-2])

    @property
    def probs(self) -> Tensor:
        """Return probabilities with shape (*T, M, d_y), of the label 1; or (*T, M, K)."""
        p = (self.alpha / self.alpha.sum(-1, keepdim=True)).unsqueeze(-3).expand(*self.alpha.shape[:-2], self.points, -1, -1)
        return p[..., 1] if self.rival.classes is None else p.squeeze(-2)

    @property
    def mean(self) -> Tensor:
        """Return `probs`."""
        return self.probs

    def log_prob(self, yt: Tensor, joint: bool = False, mask: Tensor | None = None) -> Tensor:
        """Return log probabilities, (*T, M) summed over outputs, or (*T,) of all observed points together."""
        _, y, seen = clean(yt, yt, mask)
        if joint and self.rival.per_task:
            return _dirichlet_multinomial(self.alpha, self.rival._counts(y, seen)).sum(-1)
        p = self.alpha / self.alpha.sum(-1, keepdim=True)
        each = torch.where(seen, (self.rival._soft(y) * p.log().unsqueeze(-3)).sum(-1), 0.0).sum(-1)
        return each.sum(-1) if joint else each

    def cdf(self, yt: Tensor) -> Tensor:
        """Return P(Y <= yt) with shape (*T, M, d_y)."""
        p = (self.alpha / self.alpha.sum(-1, keepdim=True)).unsqueeze(-3)
        ladder = torch.arange(p.shape[-1], dtype=p.dtype)
        return (p * (ladder <= yt.double().unsqueeze(-1))).sum(-1)

    def sample(self, n: int, noisy: bool = True, seed: int = 0) -> Tensor:
        """Return draws of labels with shape (n, *T, M, d_y), or of their probabilities."""
        rng = np.random.default_rng(int(seeded(seed, "rival").initial_seed()))
        alpha = self.alpha.unsqueeze(-3)
        if self.rival.per_task:
            drawn = torch.from_numpy(rng.gamma(alpha.numpy(), size=(n, *alpha.shape)))
            p = drawn / drawn.sum(-1, keepdim=True)
        else:
            p = alpha.expand(n, *alpha.shape)
        p = p.expand(*p.shape[:-3], self.points, *p.shape[-2:])
        if not noisy:
            return p[..., 1] if self.rival.classes is None else p.squeeze(-2)
        below = p.cumsum(-1)[..., :-1]
        u = torch.from_numpy(rng.random(p.shape[:-1]))
        return (u.unsqueeze(-1) > below).sum(-1).double()


class CountRates:
    """Predict counts by negative binomials: y ~ Poisson(rate), and the rate has a Gamma distribution, over tasks or over all points.

    Arguments:
        train: tasks.
        per_task: the points of a task share a rate, and the context tells of it; otherwise every point has its own.
    """

    def __init__(self, train: Collection, per_task: bool) -> None:
        self.per_task = per_task
        tasks = gathered(train, 0, COUNT_TASKS, COUNT_POINTS)
        if per_task:
            counts = torch.stack([mask.sum(0) for _, _, mask in tasks]).double()
            sums = torch.stack([y.sum(0) for _, y, _ in tasks])
        else:
            mask, sums = torch.cat([mask for _, _, mask in tasks]), torch.cat([y for _, y, _ in tasks])
            counts = mask.double()
        mean = sums.sum(0).clamp(min=0.5) / counts.sum(0).clamp(min=1)
        log_lik = torch.stack([_gamma_poisson(a, a / mean, sums, counts).sum(0) for a in STRENGTHS])  # (G, d)
        self.shape = STRENGTHS[log_lik.argmax(0)]
        self.rate = self.shape / mean

    def condition(self, xc: Tensor, yc: Tensor, mask: Tensor | None = None, num_samples: int = 64, seed: int = 0) -> _Counts:
        """Return the posterior of the rate."""
        _, y, seen = clean(xc, yc, mask)
        shape, rate = self.shape.expand(*y.shape[:-2], -1), self.rate.expand(*y.shape[:-2], -1)
        if self.per_task:
            shape, rate = shape + y.sum(-2), rate + seen.sum(-2)
        return _Counts(self.per_task, shape, rate)


def _gamma_poisson(shape: Tensor, rate: Tensor, total: Tensor, count: Tensor) -> Tensor:
    """Return log p of counts that share a rate ~ Gamma(shape, rate), from their sum and number, without the terms log y!."""
    value: Tensor = (shape + total).lgamma() - shape.lgamma() + shape * rate.log() - (shape + total) * (rate + count).log()
    return value


@dataclass(frozen=True, eq=False)
class _Counts:
    """Hold shape and rate (*T, d_y) of the Gamma distribution of the rate; predict anywhere."""

    per_task: bool
    shape: Tensor
    rate: Tensor
    points: int = 0

    is_discrete = True

    def predict(self, xt: Tensor) -> _Counts:
        """Return the prediction at xt with shape (*T, M, d_x)."""
        return _Counts(self.per_task, self.shape, self.rate, xt.shape[-2])

    @property
    def mean(self) -> Tensor:
        """Return the mean with shape (*T, M, d_y)."""
        mean: Tensor = (self.shape / self.rate).unsqueeze(-2).expand(*self.shape.shape[:-1], self.points, -1)
        return mean

    def log_prob(self, yt: Tensor, joint: bool = False, mask: Tensor | None = None) -> Tensor:
        """Return log probabilities, (*T, M) summed over outputs, or (*T,) of all observed points together."""
        _, y, seen = clean(yt, yt, mask)
        factorials = torch.where(seen, (y + 1.0).lgamma(), 0.0)
        if joint and self.per_task:
            return (_gamma_poisson(self.shape, self.rate, y.sum(-2), seen.sum(-2)) - factorials.sum(-2)).sum(-1)
        each = _gamma_poisson(self.shape.unsqueeze(-2), self.rate.unsqueeze(-2), y, seen.double()) - factorials
        each = torch.where(seen, each, 0.0).sum(-1)
        return each.sum(-1) if joint else each

    def cdf(self, yt: Tensor) -> Tensor:
        """Return P(Y <= yt) with shape (*T, M, d_y), by summing probabilities from 0 on."""
        y = yt.double()
        ladder = torch.arange(int(y.max().clamp(min=0)) + 1, dtype=torch.float64)
        log_p = _gamma_poisson(self.shape.unsqueeze(-1), self.rate.unsqueeze(-1), ladder, torch.ones(1)) - (ladder + 1.0).lgamma()
        below = log_p.exp().cumsum(-1).unsqueeze(-3).expand(*y.shape, -1)  # (*T, M, d_y, K)
        at = below.gather(-1, y.clamp(min=0).long().unsqueeze(-1)).squeeze(-1).clamp(max=1.0)
        return torch.where(y < 0, 0.0, at)

    def pit(self, yt: Tensor, mask: Any = None, seed: int = 0) -> Tensor:
        """Return values drawn between P(Y < yt) and P(Y <= yt), uniform if the prediction is right, with shape (*T, M, d_y)."""
        _, y, _ = clean(yt, yt, mask)
        high, low = self.cdf(y), self.cdf(y - 1.0)
        u = torch.rand(y.shape, generator=seeded(seed, "pit"), dtype=torch.float64)
        return low + u * (high - low)

    def sample(self, n: int, noisy: bool = True, seed: int = 0) -> Tensor:
        """Return draws of counts with shape (n, *T, M, d_y), or of their rates."""
        rng = np.random.default_rng(int(seeded(seed, "rival").initial_seed()))
        points = 1 if self.per_task else self.points
        size = (n, *self.shape.shape[:-1], points, self.shape.shape[-1])
        rate = rng.gamma(self.shape.unsqueeze(-2).numpy(), 1.0 / self.rate.unsqueeze(-2).numpy(), size=size)
        rate = np.broadcast_to(rate, (*size[:-2], self.points, size[-1]))
        return torch.from_numpy(rng.poisson(np.minimum(rate, 1e15)).astype(np.float64) if noisy else rate.copy())
