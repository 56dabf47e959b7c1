"""Rivals that are one Gaussian over the points of a task, conditioned exactly: Gaussian processes, and a normal over fixed places.

All are scored by `bnnp.evaluate`, through the same call as a learned model. They differ in where mean and covariance come from: the one
task's own context (`FittedGP`), training tasks (`learn`), training tasks place by place (`PlacesNormal`), or both (a mean of places with a
kernel).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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
LENGTHS = (0.5, 0.1)  # where the search for the lengths starts, in standard deviations of x


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

    @staticmethod
    def of(numbers: Mapping[str, Any]) -> Kernel:
        """Return the kernel of such numbers as `numbers` gives."""
        return Kernel(numbers["shape"], **{k: torch.tensor(v, dtype=_FLOAT) for k, v in numbers.items() if k != "shape"})

    @property
    def numbers(self) -> dict[str, Any]:
        """Return the numbers, for a file."""
        plain = {k: getattr(self, k).tolist() for k in ("amplitude", "lengths", "noise", "level", "level_std")}
        return {"shape": self.shape, **plain}


def learn(
    tasks: Sequence[Pair], shape: str, own_level: bool = True, steps: int = 60, floor: float | None = None, towards: Kernel | None = None
) -> Kernel:
    """Return the kernel of highest marginal likelihood of all tasks together, by L-BFGS.

    Arguments:
        tasks: pairs (x, y), all with the same number of points.
        shape: of the kernel.
        own_level: let each task have a level of its own; of a single task the level itself is fitted.
        steps: of L-BFGS.
        floor: smallest noise, in the units of y; a share of the deviation of y where not given.
        towards: a kernel to start from and to stay near: amplitude, lengths and noise have log-normal priors around its numbers, with
            deviation 1 of the logarithm, and the level keeps its own.
    """
    x, y = (torch.stack([task[i] for task in tasks]).to(_FLOAT) for i in (0, 1))
    if x.shape[1] < 2:
        raise ValueError("Expected at least 2 points, to fit a kernel to. Got 1. Show more of each task.")
    starts = [_start(x, y, length, own_level) for length in LENGTHS] if towards is None else [towards]
    least = NOISE_FLOOR * float(y.std()) if floor is None else floor
    found: list[tuple[float, Kernel]] = []
    for start in starts:
        moves = {k: torch.zeros_like(getattr(start, k), requires_grad=True) for k in ("amplitude", "noise", "lengths")}
        if towards is None:
            moves |= {k: torch.zeros((), dtype=_FLOAT, requires_grad=True) for k in ("level", *(["level_std"] if own_level else []))}
        build = partial(_moved, start, moves, max(least, 1e-9), shape)
        optimiser = torch.optim.LBFGS(list(moves.values()), lr=0.5, max_iter=steps, line_search_fn="strong_wolfe")

        def value(build: Callable[[], Kernel] = build, moves: dict[str, Tensor] = moves) -> Tensor:
            prior = 0.0 if towards is None else sum(0.5 * move.square().sum() for move in moves.values())
            return (log_marginal(build(), x, y) - prior) / y.numel()

        def loss(value: Callable[[], Tensor] = value, optimiser: Any = optimiser) -> Tensor:
            optimiser.zero_grad()
            try:
                worth = -value()
            except NotPositiveDefiniteError:
                return torch.full((), torch.inf, dtype=_FLOAT)
            worth.backward()
            return worth

        optimiser.step(loss)
        with torch.no_grad():
            reached = float(value())
            found.append((reached if math.isfinite(reached) else -math.inf, build()))
    return max(found, key=lambda pair: pair[0])[1]


def _start(x: Tensor, y: Tensor, length: float, own_level: bool) -> Kernel:
    """Return where the search starts: the scales of the data."""
    scale, wide = y.std().clamp_min(1e-9), x.flatten(0, 1).std(0).clamp_min(1e-9)
    return Kernel("", scale, length * wide, 0.1 * scale, y.mean(), scale if own_level else torch.zeros_like(scale))


def _moved(start: Kernel, moves: Mapping[str, Tensor], floor: float, shape: str) -> Kernel:
    # Bounds that no sensible fit meets keep the search where covariances can be factorised.
    sizes = {k: getattr(start, k) * move.clamp(-6.0, 4.0).exp() for k, move in moves.items() if k != "level"}
    sizes["noise"] = (sizes["noise"] ** 2 + floor**2).sqrt()
    level = start.level + moves["level"] * start.amplitude if "level" in moves else start.level
    return Kernel(shape, **{"level_std": start.level_std, "level": level, **sizes})


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
        floor: smallest noise, in the units of y.
        towards: a kernel learned from training tasks, near which the numbers stay; with it the most probable ones are taken.
    """

    shape: str
    around: Mean | None = None
    steps: int = 60
    floor: float | None = None
    towards: Kernel | None = None

    def condition(self, xc: Tensor, yc: Tensor, mask: Tensor | None = None, num_samples: int = 64, seed: int = 0) -> GaussianPosterior:
        """Return the posterior of one task, (1, N, d_x), all of whose points are observed."""
        if xc.shape[0] != 1 or (mask is not None and not bool(mask.all())):
            raise ValueError(f"Expected one whole task at once: a kernel is fitted to each. Got {tuple(xc.shape)}. Use batch_size=1.")
        y = yc.to(_FLOAT) - (0 if self.around is None else self.around(xc.to(_FLOAT)))
        kernel = learn([(xc[0].to(_FLOAT), y[0])], self.shape, False, self.steps, self.floor, self.towards)
        return Smooth.of(kernel, self.around).condition(xc, yc, mask)


@dataclass(frozen=True, kw_only=True, eq=False)
class PlacesNormal(GaussianProcess):
    """Be a normal distribution over fixed places with the mean and the covariance of training tasks there.

    C_a = (1 - a) S + a diag(S) with S the covariance over training tasks; a is for validation tasks to choose. It knows the places by heart
    and can say nothing between them. With a = 1 it predicts mean and variance of each place, whatever is seen.

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
