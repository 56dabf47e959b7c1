"""Processes that generate tasks, with the exact answer where there is one.

A score means little without the best score that is possible. Each process here draws tasks from an explicit seed, gives
its noise-free functions on any grid, and, if it is Gaussian, is its own oracle: it has `condition`, as a learned model
has, so that both go through the same evaluation.

Random numbers and oracles are computed in float64; only what is handed out is cast to the `dtype` of the process.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from bnnp.linalg import cholesky, log_det, solve_lower

__all__ = [
    "GaussianPosterior",
    "GaussianPredictive",
    "GaussianProcess",
    "Heaviside",
    "KnownBNN",
    "Process",
    "Sawtooth",
    "SquaredExponentialGP",
    "SyntheticTask",
]

_CHUNK = 256  # tasks drawn at once
_JITTER = 1e-9  # added to the covariance of unit variance that noise-free functions are drawn from: a deviation of 3e-5
_FLOAT = torch.float64


class SyntheticTask(tuple[Tensor, Tensor]):
    """Hold one task: a pair (x, y) that also knows the noise-free values.

    It is a tuple of two, so `for x, y in tasks` works and it is accepted wherever a pair is.

    Arguments:
        x: inputs with shape (N, d_x).
        y: outputs with noise, with shape (N, d_y).
        f: noise-free outputs with shape (N, d_y).
        latents: what determines the function: (a, b) for `Sawtooth`, the weight matrices (d_out, p) of all layers for
            `KnownBNN`, empty where there is nothing finite to give.

    Example:
        >>> x, y = SyntheticTask(torch.zeros(3, 1), torch.ones(3, 1), torch.ones(3, 1))
        >>> x.shape, y.shape
        (torch.Size([3, 1]), torch.Size([3, 1]))
    """

    f: Tensor
    latents: tuple[Tensor, ...]

    def __new__(cls, x: Tensor, y: Tensor, f: Tensor, latents: tuple[Tensor, ...] = ()) -> SyntheticTask:
        task = super().__new__(cls, (x, y))
        task.f = f
        task.latents = latents
        return task

    @property
    def x(self) -> Tensor:
        """Return the inputs with shape (N, d_x)."""
        return self[0]

    @property
    def y(self) -> Tensor:
        """Return the outputs with noise, with shape (N, d_y)."""
        return self[1]

    def __reduce__(self) -> tuple[type[SyntheticTask], tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]]:
        return SyntheticTask, (self[0], self[1], self.f, self.latents)


@dataclass(frozen=True, kw_only=True)
class Process(ABC):
    """Describe a distribution over functions, inputs and noise: y = f(x) + noise_std * eps, x uniform on `x_range`.

    Arguments:
        x_range: lower and upper end of the inputs, the same in every dimension.
        noise_std: standard deviation of the observation noise.
        dtype: of the tasks and functions handed out.

    Raises:
        ValueError: `x_range` is empty or `noise_std` is not positive.
    """

    x_range: tuple[float, float] = (-2.0, 2.0)
    noise_std: float = 0.05
    dtype: torch.dtype = torch.float32
    x_dim: int = field(default=1, init=False)
    y_dim: int = field(default=1, init=False)

    def __post_init__(self) -> None:
        """Check the values."""
        if not self.x_range[0] < self.x_range[1]:
            raise ValueError(f"Expected x_range = (low, high) with low < high. Got {self.x_range}. Swap or widen it.")
        if not (math.isfinite(self.noise_std) and self.noise_std > 0):
            raise ValueError(f"Expected a positive noise_std. Got {self.noise_std}. Use a small number instead of 0.")

    @property
    def has_oracle(self) -> bool:
        """Say whether `log_prob`, `condition` and the exact posterior exist."""
        return isinstance(self, GaussianProcess)

    def _place(self, unit: Tensor) -> Tensor:
        """Return inputs for numbers that are uniform on (0, 1): the quantiles of the inputs' distribution."""
        return self.x_range[0] + (self.x_range[1] - self.x_range[0]) * unit

    @abstractmethod
    def _draw(self, x: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Draw one function for each row of x, float64 with shape (count, N, d_x) or (1, N, d_x).

        Returns the values (count, N, d_y) and the latents, each with leading axis `count`.
        """

    def tasks(self, num_tasks: int, seed: int, num_points: int | tuple[int, int] = (40, 100)) -> list[SyntheticTask]:
        """Draw tasks: inputs, a function of its own for each, and noise.

        Arguments:
            num_tasks: how many.
            seed: of everything drawn. The same seed, number and sizes give the same tasks.
            num_points: points of each task; a range (low, high) is drawn from uniformly, high excluded.

        Returns:
            A list of `SyntheticTask`, pairs (x, y) with shapes (N, d_x) and (N, d_y).

        Raises:
            ValueError: the range of `num_points` is empty.

        Example:
            >>> [len(x) for x, y in Sawtooth().tasks(3, seed=0, num_points=50)]
            [50, 50, 50]
        """
        low, high = (num_points, num_points + 1) if isinstance(num_points, int) else num_points
        if not 1 <= low < high:
            raise ValueError(f"Expected num_points = (low, high) with 1 <= low < high. Got ({low}, {high}).")
        generator = torch.Generator().manual_seed(seed)
        sizes = torch.randint(low, high, (num_tasks,), generator=generator).tolist()
        tasks: list[SyntheticTask] = []
        for start in range(0, num_tasks, _CHUNK):
            chunk = sizes[start : start + _CHUNK]
            # All tasks of a chunk get as many points as the largest; dropping some of independent points is harmless.
            shape = (len(chunk), max(chunk), self.x_dim)
            unit = torch.rand(shape, generator=generator, dtype=_FLOAT)
            # Cast first, so that y belongs to exactly the x that is handed out, also beside a jump.
            x = self._place(unit).to(self.dtype)
            f, latents = self._draw(x.to(_FLOAT), len(chunk), generator)
            y = f + self.noise_std * torch.randn(f.shape, generator=generator, dtype=_FLOAT)
            for i, n in enumerate(chunk):
                x_i, y_i, f_i = (v[i, :n].to(self.dtype, copy=True) for v in (x, y, f))
                tasks.append(SyntheticTask(x_i, y_i, f_i, tuple(v[i].to(self.dtype, copy=True) for v in latents)))
        return tasks

    def context_target_tasks(
        self, num_tasks: int, seed: int, context: tuple[int, int] = (0, 31), num_targets: int = 50
    ) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Draw tasks already split, with a fixed number of targets, as the AR-CNP suite scores them.

        Arguments:
            num_tasks: how many.
            seed: of everything drawn.
            context: range (low, high) of the number of context points, high excluded.
            num_targets: target points of each task.

        Returns:
            A list of (xc, yc, xt, yt).

        References:
            Autoregressive conditional neural processes (Bruinsma et al., 2023).
        """
        tasks = self.tasks(num_tasks, seed, (context[0] + num_targets, context[1] + num_targets))
        return [(x[:-num_targets], y[:-num_targets], x[-num_targets:], y[-num_targets:]) for x, y in tasks]

    def sample(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        """Draw n noise-free functions at the same inputs.

        Arguments:
            x: inputs with shape (N, d_x), or (N,) if d_x = 1.
            n: number of functions.
            generator: source of randomness.

        Returns:
            Values with shape (n, N, d_y).

        Example:
            >>> Heaviside().sample(torch.linspace(-1, 1, 5), 3, torch.Generator().manual_seed(0)).shape
            torch.Size([3, 5, 1])
        """
        grid = (x.unsqueeze(-1) if x.ndim == 1 else x).to(_FLOAT)
        return self._draw(grid.unsqueeze(0), n, generator)[0].to(self.dtype)


@dataclass(frozen=True, kw_only=True)
class GaussianProcess(Process, ABC):
    """Describe a process with Gaussian function values, and answer exactly for it.

    f ~ GP(mean, kernel), y = f + noise_std eps. Results are float64. Cost N^3 for N context points, M^3 for M targets.
    """

    @abstractmethod
    def mean(self, x: Tensor) -> Tensor:
        """Return the prior mean with shape (*T, N, 1) at x with shape (*T, N, d_x)."""

    @abstractmethod
    def kernel(self, x1: Tensor, x2: Tensor) -> Tensor:
        """Return the prior covariance of f with shape (*T, N1, N2)."""

    def condition(self, xc: Tensor, yc: Tensor, mask: Tensor | None = None, num_samples: int = 64, seed: int = 0) -> GaussianPosterior:
        """Return the exact posterior, through the same call as a learned model's.

        Arguments:
            xc: context inputs with shape (*T, N, d_x); N may be 0.
            yc: context outputs with shape (*T, N, 1).
            mask: True where a context point is observed, with shape (*T, N).
            num_samples: ignored, the posterior is closed form.
            seed: ignored.
        """
        x, y = xc.to(_FLOAT), yc.to(_FLOAT)
        m = torch.ones(x.shape[:-1], dtype=_FLOAT) if mask is None else mask.to(_FLOAT)
        # A padded point gets a row of the identity and a residual of 0: it changes neither mean nor determinant.
        K = self.kernel(x, x) * m.unsqueeze(-1) * m.unsqueeze(-2) + torch.diag_embed(self.noise_std**2 * m + (1.0 - m))
        R = cholesky(K)
        residual = torch.where(m.unsqueeze(-1) > 0, y - self.mean(x), torch.zeros_like(y))
        return GaussianPosterior(self, x, m, R, solve_lower(R, residual))

    def posterior(self, xc: Tensor, yc: Tensor, xt: Tensor) -> tuple[Tensor, Tensor]:
        """Return the exact posterior mean (*T, M, 1) and covariance (*T, M, M) of f at xt."""
        predictive = self.condition(xc, yc).predict(xt)
        return predictive.mean, predictive.cov

    def log_prob(self, xc: Tensor, yc: Tensor, xt: Tensor, yt: Tensor, joint: bool = True) -> Tensor:
        """Return the exact log p(yt | xt, xc, yc), noise included.

        Arguments:
            xc: context inputs with shape (*T, N, d_x); N = 0 gives the prior's density.
            yc: context outputs with shape (*T, N, 1).
            xt: target inputs with shape (*T, M, d_x).
            yt: target outputs with shape (*T, M, 1).
            joint: the density of all targets together, with shape (*T,); otherwise of each alone, with shape (*T, M).
        """
        return self.condition(xc, yc).predict(xt).log_prob(yt, joint=joint)


@dataclass(frozen=True)
class GaussianPosterior:
    """Hold a Gaussian process given its context, as `GaussianProcess.condition` returns it."""

    process: GaussianProcess
    xc: Tensor
    observed: Tensor
    factor: Tensor
    white_residual: Tensor

    def predict(self, xt: Tensor) -> GaussianPredictive:
        """Return the exact predictive at xt with shape (*T, M, d_x)."""
        x = xt.to(_FLOAT)
        cross = self.process.kernel(self.xc, x) * self.observed.unsqueeze(-1)  # (*T, N, M)
        V = solve_lower(self.factor, cross)
        mean = self.process.mean(x) + V.mT @ self.white_residual
        return GaussianPredictive(mean, self.process.kernel(x, x) - V.mT @ V, self.process.noise_std)


@dataclass(frozen=True)
class GaussianPredictive:
    """Hold an exact Gaussian predictive.

    Arguments:
        mean: of f and of y, with shape (*T, M, 1).
        cov: covariance of f with shape (*T, M, M).
        noise_std: standard deviation of the observation noise.
    """

    mean: Tensor
    cov: Tensor
    noise_std: float
    is_discrete: bool = False

    @property
    def epistemic_std(self) -> Tensor:
        """Return the standard deviation of f with shape (*T, M, 1)."""
        return self.cov.diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt().unsqueeze(-1)

    @property
    def std(self) -> Tensor:
        """Return the standard deviation of y with shape (*T, M, 1)."""
        return (self.epistemic_std**2 + self.noise_std**2).sqrt()

    def quantile(self, q: float) -> Tensor:
        """Return the q-quantile of y with shape (*T, M, 1)."""
        z: Tensor = torch.special.ndtri(torch.tensor(q, dtype=_FLOAT))
        return self.mean + self.std * z

    def cdf(self, yt: Tensor) -> Tensor:
        """Return P(Y <= yt) with shape (*T, M, 1)."""
        below: Tensor = torch.special.ndtr((yt.to(_FLOAT) - self.mean) / self.std)
        return below

    def crps(self, yt: Tensor) -> Tensor:
        """Return the continuous ranked probability score with shape (*T, M, 1), in the units of y."""
        z = (yt.to(_FLOAT) - self.mean) / self.std
        two_sided: Tensor = 2.0 * torch.special.ndtr(z) - 1.0
        density = torch.exp(-0.5 * z**2) / math.sqrt(2.0 * math.pi)
        return self.std * (z * two_sided + 2.0 * density - 1.0 / math.sqrt(math.pi))

    def log_prob(self, yt: Tensor, joint: bool = False, mask: Tensor | None = None) -> Tensor:
        """Return the log density of yt, for each point (*T, M) or of all observed points together (*T,)."""
        y = yt.to(_FLOAT)
        m = torch.ones(y.shape[:-1], dtype=_FLOAT) if mask is None else mask.to(_FLOAT)
        residual = torch.where(m.unsqueeze(-1) > 0, y - self.mean, torch.zeros_like(y))
        if not joint:
            each = -0.5 * ((residual / self.std) ** 2 + 2.0 * self.std.log() + math.log(2.0 * math.pi))
            return each.squeeze(-1) * m
        cov = self.cov * m.unsqueeze(-1) * m.unsqueeze(-2) + torch.diag_embed(self.noise_std**2 * m + (1.0 - m))
        R = cholesky(cov)
        white = solve_lower(R, residual).squeeze(-1)
        return -0.5 * ((white**2).sum(-1) + log_det(R) + math.log(2.0 * math.pi) * m.sum(-1))

    def sample(self, n: int, noisy: bool = True, seed: int = 0) -> Tensor:
        """Draw n coherent functions, with shape (n, *T, M, 1)."""
        generator = torch.Generator().manual_seed(seed)
        f = self.mean + centred_draw(self.cov.unsqueeze(0), n, generator, jitter=1e-6 * self.noise_std**2)
        return f + self.noise_std * torch.randn(f.shape, generator=generator, dtype=_FLOAT) if noisy else f


@dataclass(frozen=True, kw_only=True)
class Sawtooth(GaussianProcess):
    """Draw a fixed sawtooth plus a random line.

    f(x) = 1.33 ((x mod 0.75) - 0.375) + a x / 3 + 0.25 b, with a, b ~ N(0, 1) for each task.

    Only the line is random, so this is a Gaussian process with the sawtooth as mean and kernel x x' / 9 + 1 / 16, and
    has an exact oracle. A learner must find the sawtooth in its prior.

    Example:
        >>> Sawtooth().mean(torch.tensor([[0.375], [0.625]]))
        tensor([[0.0000],
                [0.3325]])
    """

    def mean(self, x: Tensor) -> Tensor:
        """Return the sawtooth, 1.33 ((x mod 0.75) - 0.375), with shape (*T, N, 1)."""
        return 1.33 * (torch.remainder(x, 0.75) - 0.375)

    def kernel(self, x1: Tensor, x2: Tensor) -> Tensor:
        """Return the covariance of the random line, with shape (*T, N1, N2)."""
        return x1 @ x2.mT / 9.0 + 0.0625

    def _draw(self, x: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, tuple[Tensor, ...]]:
        a = torch.randn((count, 1, 1), generator=generator, dtype=_FLOAT)
        b = torch.randn((count, 1, 1), generator=generator, dtype=_FLOAT)
        return self.mean(x) + a * x / 3.0 + 0.25 * b, (a[:, 0, 0], b[:, 0, 0])


@dataclass(frozen=True, kw_only=True)
class SquaredExponentialGP(GaussianProcess):
    """Draw from a centred Gaussian process with kernel variance * exp(-|x - x'|^2 / (2 lengthscale^2)).

    The EQ task of the AR-CNP suite is lengthscale 0.25, noise variance 0.05, x on (-2, 2).

    Arguments:
        lengthscale: in the units of x.
        variance: of f, in squared units of y.

    Example:
        >>> SquaredExponentialGP(lengthscale=0.25, noise_std=0.05**0.5).has_oracle
        True
    """

    lengthscale: float = 1.0
    variance: float = 1.0

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        if not (self.lengthscale > 0 and self.variance > 0):
            raise ValueError(f"Expected positive lengthscale and variance. Got {self.lengthscale} and {self.variance}.")

    def mean(self, x: Tensor) -> Tensor:
        """Return zeros with shape (*T, N, 1)."""
        return torch.zeros_like(x[..., :1])

    def kernel(self, x1: Tensor, x2: Tensor) -> Tensor:
        """Return the squared-exponential covariance with shape (*T, N1, N2)."""
        return self.variance * squared_exponential(x1, x2, self.lengthscale)

    def _draw(self, x: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, tuple[Tensor, ...]]:
        unit = centred_draw(squared_exponential(x, x, self.lengthscale), count, generator, _JITTER)
        return math.sqrt(self.variance) * unit, ()


@dataclass(frozen=True, kw_only=True)
class Heaviside(Process):
    """Draw the sign of a centred Gaussian process: values -1 and +1, jumps at random places.

    The kernel is exp(-(x - x')^2 / (2 lengthscale^2)). There is no exact oracle.
    """

    x_range: tuple[float, float] = (-5.0, 5.0)
    noise_std: float = 0.01
    lengthscale: float = 1.0

    def _draw(self, x: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, tuple[Tensor, ...]]:
        g = centred_draw(squared_exponential(x, x, self.lengthscale), count, generator, _JITTER)
        return torch.where(g >= 0, torch.ones_like(g), -torch.ones_like(g)), ()


@dataclass(frozen=True, kw_only=True)
class KnownBNN(Process):
    """Draw from a neural network whose prior over weights is known: W^l ~ N(0, I / p_l), or N(0, I) if not `scaled`.

    H^1 = [X, 1] (W^1)^T, H^l = [phi(H^{l-1}), 1] (W^l)^T; p_l counts the bias, which is the last column of W^l. The
    weights of a task are its `latents`, so inference about weights can be judged. There is no exact oracle;
    `log_evidence_monte_carlo` estimates the evidence of a few points.

    Arguments:
        hidden: widths of the hidden layers.
        activation: phi, a function of tensors.
        scaled: whether the prior is fan-in scaled.
        x_dim: number of inputs.
        y_dim: number of outputs.

    Example:
        >>> [tuple(W.shape) for W in KnownBNN(hidden=(8,)).tasks(1, seed=0)[0].latents]
        [(8, 2), (1, 9)]
    """

    x_range: tuple[float, float] = (-5.0, 5.0)
    hidden: tuple[int, ...] = (64, 64)
    activation: Callable[[Tensor], Tensor] = torch.relu
    scaled: bool = True
    x_dim: int = 1
    y_dim: int = 1

    def sample_weights(self, n: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Draw n sets of weights from the prior, float64, for each layer with shape (n, d_out, p)."""
        widths = (self.x_dim, *self.hidden, self.y_dim)
        weights = []
        for d_in, d_out in pairwise(widths):
            scale = 1.0 / math.sqrt(d_in + 1) if self.scaled else 1.0
            weights.append(scale * torch.randn((n, d_out, d_in + 1), generator=generator, dtype=_FLOAT))
        return tuple(weights)

    def network(self, weights: tuple[Tensor, ...], x: Tensor) -> Tensor:
        """Return the network's output (*S, N, d_y) for weights (*S, d_out, p) at x (*S, N, d_x) or (N, d_x)."""
        h = x
        for layer, W in enumerate(weights):
            features = h if layer == 0 else self.activation(h)
            h = features @ W[..., :-1].mT + W[..., -1].unsqueeze(-2)
        return h

    def _draw(self, x: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, tuple[Tensor, ...]]:
        weights = self.sample_weights(count, generator)
        return self.network(weights, x), weights

    def log_evidence_monte_carlo(self, x: Tensor, y: Tensor, num_samples: int = 100_000, seed: int = 0) -> tuple[float, float]:
        """Estimate log p(y | x) = log 1/S sum_s p(y | x, W_s), W_s from the prior, with its standard error.

        For a few points, or a large noise, only: with more the sum is ruled by a handful of samples, the estimate is
        too low and the standard error, from the same samples, does not show it.

        Arguments:
            x: inputs with shape (N, d_x).
            y: outputs with shape (N, d_y).
            num_samples: S.
            seed: of the samples.

        Returns:
            The estimate and its standard error (delta method: the relative standard error of the mean), in nats.

        Raises:
            ValueError: fewer than two samples are asked for.
        """
        if num_samples < 2:
            raise ValueError(f"Expected num_samples >= 2. Got {num_samples}.")
        generator = torch.Generator().manual_seed(seed)
        x, y = x.to(_FLOAT), y.to(_FLOAT)
        constant = -y.numel() * (0.5 * math.log(2.0 * math.pi) + math.log(self.noise_std))
        chunk = max(1, 4_000_000 // (max((*self.hidden, 1)) * max(1, len(x), max((*self.hidden, 1)))))
        parts = []
        for start in range(0, num_samples, chunk):
            f = self.network(self.sample_weights(min(chunk, num_samples - start), generator), x)
            parts.append(constant - 0.5 * (((y - f) / self.noise_std) ** 2).sum((-2, -1)))
        log_w = torch.cat(parts)
        estimate = torch.logsumexp(log_w, 0) - math.log(num_samples)
        relative = torch.exp(log_w - estimate)  # mean 1
        return float(estimate), float(relative.std() / math.sqrt(num_samples))


def squared_exponential(x1: Tensor, x2: Tensor, lengthscale: float) -> Tensor:
    """Return exp(-|x - x'|^2 / (2 lengthscale^2)) with shape (*T, N1, N2)."""
    square = ((x1.unsqueeze(-2) - x2.unsqueeze(-3)) ** 2).sum(-1)
    return torch.exp(-0.5 * square / lengthscale**2)


def centred_draw(K: Tensor, count: int, generator: torch.Generator, jitter: float) -> Tensor:
    """Draw `count` vectors from N(0, K + jitter I): (count, *T, N, 1) for K with shape (count or 1, *T, N, N).

    Smooth kernels are singular in floating point, so a jitter is part of the definition; it is far below any noise.
    """
    N = K.shape[-1]
    R = cholesky(K + jitter * torch.eye(N, dtype=_FLOAT))
    z = torch.randn((count, *K.shape[1:-1], 1), generator=generator, dtype=_FLOAT)
    return R @ z
