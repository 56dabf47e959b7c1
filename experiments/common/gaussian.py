"""Rivals that are one Gaussian over the points of a task, conditioned exactly: Gaussian processes, and a normal over fixed places.

All are scored by `bnnp.evaluate`, through the same call as a learned model. They differ in where mean and covariance come from: the one task's
own context (`FittedGP`), training tasks (`learn`), training tasks place by place (`PlacesNormal`), or both (a mean of places with a kernel).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bnnp.data.synthetic import GaussianPosterior, GaussianProcess, centred_draw
from bnnp.linalg import NotPositiveDefiniteError, cholesky, log_det, solve_lower

__all__ = ["FittedGP", "Kernel", "PlacesNormal", "Smooth", "learn", "log_marginal", "nearest"]

_FLOAT = torch.float64
Pair = tuple[Tensor, Tensor]
Mean = Callable[[Tensor], Tensor]
SHAPES = ("squared_exponential", "matern32", "matern12")
NOISE_FLOOR = 0.003  # of the amplitude's unit: a handful of points can be explained without any noise
JITTER = 1e-6


@dataclass(frozen=True)
class Kernel:
    """Hold a^2 k(|x - x'| / l) with a length for each input, and the noise.

    Arguments:
        shape: "squared_exponential", "matern32" or "matern12".
        amplitude: a, a scalar.
        lengths: l with shape (d_x,).
        noise: standard deviation of the noise, a scalar.
        level: constant mean, a scalar.
        level_std: standard deviation of a task's own level around it, a scalar.
    """

    shape: str
    amplitude: Tensor
    lengths: Tensor
    noise: Tensor
    level: Tensor
    level_std: Tensor

    def __call__(self, x1: Tensor, x2: Tensor) -> Tensor:
        """Return the covariance of f with shape (*T, N1, N2)."""
        a, b = x1 / self.lengths, x2 / self.lengths
        square = (a.unsqueeze(-2) - b.unsqueeze(-3)).square().sum(-1)
        if self.shape == "squared_exponential":
            smooth = torch.exp(-0.5 * square)
        else:
            r = (square + 1e-12).sqrt()  # the root has no slope at zero
            r = r * math.sqrt(3.0) if self.shape == "matern32" else r
            smooth = (1 + r) * torch.exp(-r) if self.shape == "matern32" else torch.exp(-r)
        return self.amplitude**2 * smooth + self.level_std**2

    @property
    def numbers(self) -> dict[str, Any]:
        """Return the numbers, for a file."""
        plain = {k: getattr(self, k).tolist() for k in ("amplitude", "lengths", "noise", "level", "level_std")}
        return {"shape": self.shape, **plain}


def learn(tasks: Sequence[Pair], shape: str, own_level: bool = True, steps: int = 60, noise_floor: float = NOISE_FLOOR) -> Kernel:
    """Return the kernel of highest marginal likelihood of all tasks together, by L-BFGS from two starting points.

    Arguments:
        tasks: pairs (x, y), all with the same number of points.
        shape: of the kernel.
        own_level: let each task have a level of its own; of a single task the level itself is fitted.
        steps: of L-BFGS.
        noise_floor: smallest noise, in standard deviations of y.
    """
    x, y = (torch.stack([task[i] for task in tasks]).to(_FLOAT) for i in (0, 1))
    wide, scale, centre = x.flatten(0, 1).std(0).clamp_min(1e-9), y.std().clamp_min(1e-9), y.mean()
    found: list[tuple[float, Kernel]] = []
    for length in (0.5, 0.1):
        raw = {"amplitude": 0.0, "noise": math.log(0.1), "level": 0.0, "level_std": 0.0 if own_level else -20.0}
        free = {k: torch.full((), v, dtype=_FLOAT, requires_grad=k != "level_std" or own_level) for k, v in raw.items()}
        free["lengths"] = torch.full((x.shape[-1],), math.log(length), dtype=_FLOAT, requires_grad=True)
        build = partial(_kernel, shape, free, wide, scale, centre, noise_floor)
        optimiser = torch.optim.LBFGS([p for p in free.values() if p.requires_grad], lr=0.5, max_iter=steps, line_search_fn="strong_wolfe")

        def loss(build: Callable[[], Kernel] = build, optimiser: Any = optimiser) -> Tensor:
            optimiser.zero_grad()
            try:
                value = -log_marginal(build(), x, y) / y.numel()
            except NotPositiveDefiniteError:
                return torch.full((), torch.inf, dtype=_FLOAT)
            value.backward()
            return value

        optimiser.step(loss)
        with torch.no_grad():
            kernel = build()
            value = float(log_marginal(kernel, x, y))
        found.append((value if math.isfinite(value) else -math.inf, kernel))
    return max(found, key=lambda pair: pair[0])[1]


def _kernel(shape: str, free: dict[str, Tensor], wide: Tensor, scale: Tensor, centre: Tensor, noise_floor: float) -> Kernel:
    # Bounds that no sensible fit meets keep the search where covariances can be factorised.
    size = {k: v.clamp(-20.0, 4.0).exp() * scale for k, v in free.items() if k not in ("lengths", "level")}
    noise = (size["noise"] ** 2 + (noise_floor * scale) ** 2).sqrt()
    lengths = free["lengths"].clamp(-5.0, 3.0).exp() * wide
    return Kernel(shape, size["amplitude"], lengths, noise, centre + free["level"] * scale, size["level_std"])


def log_marginal(kernel: Kernel, x: Tensor, y: Tensor) -> Tensor:
    """Return the sum over tasks of log p(y) with x (T, N, d_x) and y (T, N, 1)."""
    eye = torch.eye(x.shape[-2], dtype=x.dtype)
    R = cholesky(kernel(x, x) + (kernel.noise**2 + JITTER * kernel.amplitude.detach() ** 2) * eye)
    square = solve_lower(R, y - kernel.level).square().sum()
    return -0.5 * (square + log_det(R).sum() + y.numel() * math.log(2 * math.pi))


@dataclass(frozen=True, kw_only=True, eq=False)
class Smooth(GaussianProcess):
    """Be the Gaussian process of one kernel, around its level or around a mean that is given.

    Arguments:
        form: the kernel with its numbers.
        around: mean of y at x (*T, N, d_x), with shape (*T, N, 1), to which the kernel's level is added; 0 where not given.
    """

    form: Kernel
    around: Mean | None = None

    @staticmethod
    def of(form: Kernel, around: Mean | None = None) -> Smooth:
        """Return the process of a kernel with the kernel's noise."""
        noise = math.hypot(float(form.noise), math.sqrt(JITTER) * float(form.amplitude))
        return Smooth(form=form, around=around, noise_std=noise)

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean with shape (*T, N, 1)."""
        level = self.form.level.expand(*x.shape[:-1], 1)
        return level if self.around is None else level + self.around(x)

    def kernel(self, x1: Tensor, x2: Tensor) -> Tensor:
        """Return the kernel with shape (*T, N1, N2)."""
        return self.form(x1, x2)

    def _draw(self, x: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.mean(x) + centred_draw(self.kernel(x, x), count, generator, JITTER), ()


@dataclass(frozen=True)
class FittedGP:
    """Fit a Gaussian process to the context of each task alone, by maximum likelihood, and condition it on that context.

    Arguments:
        shape: of the kernel.
        around: mean of y at x that is taken off first; none where not given.
        steps: of L-BFGS.
    """

    shape: str
    around: Mean | None = None
    steps: int = 60

    def condition(self, xc: Tensor, yc: Tensor, mask: Tensor | None = None, num_samples: int = 64, seed: int = 0) -> GaussianPosterior:
        """Return the posterior of one task, (1, N, d_x), all of whose points are observed."""
        if xc.shape[0] != 1 or (mask is not None and not bool(mask.all())):
            raise ValueError(f"Expected one whole task at once: a kernel is fitted to each. Got {tuple(xc.shape)}. Use batch_size=1.")
        y = yc.to(_FLOAT) - (0 if self.around is None else self.around(xc.to(_FLOAT)))
        kernel = learn([(xc[0].to(_FLOAT), y[0])], self.shape, own_level=False, steps=self.steps)
        return Smooth.of(kernel, self.around).condition(xc, yc, mask)


@dataclass(frozen=True, kw_only=True, eq=False)
class PlacesNormal(GaussianProcess):
    """Be a normal distribution over fixed places with the mean and the covariance of training tasks there.

    C_a = (1 - a) S + a diag(S) with S the covariance over training tasks; a is for validation tasks to choose. It knows the places by heart and
    can say nothing between them. With a = 1 it predicts mean and variance of each place, whatever is seen.

    Arguments:
        places: with shape (P, d_x).
        level: mean of each place with shape (P,).
        covariance: C_a with shape (P, P).
    """

    places: Tensor
    level: Tensor
    covariance: Tensor

    @staticmethod
    def of(places: Tensor, values: Tensor, shrinkage: float) -> PlacesNormal:
        """Return the distribution of training values (T, P) at places (P, d_x) with shrinkage a."""
        S = torch.cov(values.to(_FLOAT).mT)
        covariance = (1 - shrinkage) * S + shrinkage * torch.diag(S.diagonal())
        noise = 1e-3 * float(S.diagonal().mean().sqrt())
        return PlacesNormal(places=places.to(_FLOAT), level=values.to(_FLOAT).mean(0), covariance=covariance, noise_std=noise)

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean with shape (*T, N, 1)."""
        return self.level[nearest(x, self.places)].unsqueeze(-1)

    def kernel(self, x1: Tensor, x2: Tensor) -> Tensor:
        """Return the covariance with shape (*T, N1, N2)."""
        return self.covariance[nearest(x1, self.places).unsqueeze(-1), nearest(x2, self.places).unsqueeze(-2)]

    def _draw(self, x: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.mean(x) + centred_draw(self.kernel(x, x), count, generator, JITTER), ()


def nearest(x: Tensor, places: Tensor) -> Tensor:
    """Return the number of the place nearest to each x (*T, N, d_x), with shape (*T, N)."""
    flat = torch.cdist(x.to(_FLOAT).flatten(0, -2), places, compute_mode="donot_use_mm_for_euclid_dist").argmin(-1)
    return flat.reshape(x.shape[:-1])
