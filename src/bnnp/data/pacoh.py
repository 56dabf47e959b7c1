"""Two processes for learning from few tasks, each its own oracle.

A sinusoid on a line (in the literature 20 tasks of 5 points), and a landscape of two bumps with smooth deviations of each task's own
(20 tasks of 20 points): the settings in which meta-learners overfit, since what the tasks share is seen in so few of them.

References:
    PACOH: Bayes-optimal meta-learning with PAC-guarantees (Rothfuss, Fortuin, Josifoski and Krause, 2021), appendix on data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bnnp.data.synthetic import GaussianProcess, Process, centred_draw, squared_exponential
from bnnp.linalg import cho_solve, cholesky, log_det, solve_lower_transposed
from bnnp.mixtures import mixture_cdf, mixture_moments, mixture_quantile

__all__ = ["CauchyBumps", "SinusoidLine", "SinusoidPosterior", "SinusoidPredictive"]

_FLOAT = torch.float64
_JITTER = 1e-9
_NODES = 48, 97  # of amplitude and shift: half as many change no score by 1e-3


@dataclass(frozen=True, kw_only=True)
class CauchyBumps(GaussianProcess):
    """Draw 6 c(x; -1) + 3 c(x; 2) + 1 plus a smooth deviation, c(x; l) = 1 / (pi (1 + |x - l|^2)), for x in two dimensions.

    The deviation is a Gaussian process with kernel 0.2^2 exp(-|x - x'|^2). Inputs are normal with deviation 2.5 in each column, cut off
    at the ends of `x_range`.

    Example:
        >>> CauchyBumps().tasks(1, seed=0, num_points=20)[0].x.shape
        torch.Size([20, 2])
    """

    x_range: tuple[float, float] = (-7.5, 5.0)
    noise_std: float = 0.05
    x_dim: int = 2
    amplitude: float = 0.2
    x_std: float = 2.5

    def _place(self, unit: Tensor) -> Tensor:
        low, high = (torch.special.ndtr(torch.tensor(end / self.x_std, dtype=_FLOAT)) for end in self.x_range)
        x: Tensor = self.x_std * torch.special.ndtri(low + (high - low) * unit)
        return x

    def mean(self, x: Tensor) -> Tensor:
        """Return the two bumps, with shape (*T, N, 1)."""
        first, second = (1.0 / (math.pi * (1.0 + (x - at).square().sum(-1, keepdim=True))) for at in (-1.0, 2.0))
        return 6.0 * first + 3.0 * second + 1.0

    def kernel(self, x1: Tensor, x2: Tensor) -> Tensor:
        """Return the covariance of the deviations, with shape (*T, N1, N2)."""
        return self.amplitude**2 * squared_exponential(x1, x2, math.sqrt(0.5))

    def _draw(self, x: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, tuple[Tensor, ...]]:
        unit = centred_draw(squared_exponential(x, x, math.sqrt(0.5)), count, generator, _JITTER)
        return self.mean(x) + self.amplitude * unit, ()


@dataclass(frozen=True, kw_only=True)
class SinusoidLine(Process):
    """Draw slope x + A sin(1.5 (x - s)) + offset, with A ~ U(0.7, 1.3), s ~ N(0, 0.1^2), offset ~ N(5, 0.1^2), slope ~ N(0.5, 0.2^2).

    Given A and s the model is linear with Gaussian weights; over A and s the oracle sums on a grid, so that its answers are mixtures of
    Gaussians in closed form.

    Example:
        >>> SinusoidLine().has_oracle
        True
    """

    x_range: tuple[float, float] = (-5.0, 5.0)
    noise_std: float = 0.1
    amplitude: tuple[float, float] = (0.7, 1.3)
    shift_std: float = 0.1
    line: tuple[tuple[float, float], tuple[float, float]] = ((0.5, 0.2), (5.0, 0.1))
    """Mean and standard deviation of slope and offset."""

    @property
    def has_oracle(self) -> bool:
        """Say that there is one."""
        return True

    def _draw(self, x: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, tuple[Tensor, ...]]:
        low, high = self.amplitude
        A = low + (high - low) * torch.rand((count, 1, 1), generator=generator, dtype=_FLOAT)
        s = self.shift_std * torch.randn((count, 1, 1), generator=generator, dtype=_FLOAT)
        slope, offset = (m + d * torch.randn((count, 1, 1), generator=generator, dtype=_FLOAT) for m, d in self.line)
        latents = tuple(v[:, 0, 0] for v in (A, s, slope, offset))
        return slope * x + A * torch.sin(1.5 * (x - s)) + offset, latents

    def nodes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return amplitudes, shifts and logarithms of their prior weights, each with shape (K, 1, 1)."""
        low, high = self.amplitude
        A = low + (high - low) * (torch.arange(_NODES[0], dtype=_FLOAT) + 0.5) / _NODES[0]
        z = torch.linspace(-5.0, 5.0, _NODES[1], dtype=_FLOAT)
        A, z = (v.flatten()[:, None, None] for v in torch.meshgrid(A, z, indexing="ij"))
        return A, self.shift_std * z, torch.log_softmax(-0.5 * z.square(), 0)

    def condition(self, xc: Tensor, yc: Tensor, mask: Tensor | None = None, num_samples: int = 64, seed: int = 0) -> SinusoidPosterior:
        """Return the posterior on the grid, through the same call as a learned model's.

        Arguments:
            xc: context inputs with shape (T, N, 1), or (N, 1); N may be 0.
            yc: context outputs with shape (T, N, 1), or (N, 1).
            mask: True where a context point is observed.
            num_samples: ignored, there is nothing to sample.
            seed: ignored.
        """
        single = xc.ndim == 2
        x, y = (v.to(_FLOAT).unsqueeze(0) if single else v.to(_FLOAT) for v in (xc, yc))
        m = torch.ones(x.shape[:-1], dtype=_FLOAT) if mask is None else mask.to(_FLOAT).reshape(x.shape[:-1])
        return SinusoidPosterior(self, x, y, m, single)


@dataclass(frozen=True)
class SinusoidPosterior:
    """Hold what `SinusoidLine` has seen of T tasks, with sums over the points for each of K nodes."""

    process: SinusoidLine
    x: Tensor
    y: Tensor
    observed: Tensor
    single: bool

    def solve(self, x: Tensor, y: Tensor, observed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return log p(y, node) with shape (K, T), and factor (T, 2, 2) and mean (K, T, 2, 1) of the line's posterior at each node."""
        p = self.process
        A, s, log_weight = p.nodes()
        mean, std = torch.tensor(p.line, dtype=_FLOAT).unbind(-1)
        m = observed.unsqueeze(-1)
        design = m * torch.cat([x, torch.ones_like(x)], -1) / p.noise_std  # (T, N, 2)
        R = cholesky(design.mT @ design + torch.diag(std**-2))
        resid = torch.where(m > 0, y - A.unsqueeze(-1) * torch.sin(1.5 * (x - s.unsqueeze(-1))), 0.0) / p.noise_std - design @ mean[:, None]
        b = design.mT @ resid  # (K, T, 2, 1)
        moved = cho_solve(R.expand(*b.shape[:2], 2, 2), b)
        quadratic = resid.square().sum((-2, -1)) - (b * moved).sum((-2, -1))
        volume = log_det(R) + 2 * std.log().sum() + observed.sum(-1) * math.log(2 * math.pi * p.noise_std**2)
        return log_weight[..., 0] - 0.5 * (quadratic + volume), R, mean[:, None] + moved

    def predict(self, xt: Tensor) -> SinusoidPredictive:
        """Return the prediction at xt with shape (T, M, 1), or (M, 1)."""
        return SinusoidPredictive(self, xt.to(_FLOAT).reshape(len(self.x), -1, 1))


class SinusoidPredictive:
    """Hold the predictions of `SinusoidLine`, a mixture over the nodes.

    Arguments:
        posterior: what was seen.
        x: inputs with shape (T, M, 1).
    """

    is_discrete = False

    def __init__(self, posterior: SinusoidPosterior, x: Tensor) -> None:
        self.posterior, self.x, self.noise_std = posterior, x, posterior.process.noise_std
        log_joint, R, line = posterior.solve(posterior.x, posterior.y, posterior.observed)
        self.log_evidence = log_joint.logsumexp(0)
        weights = (log_joint - self.log_evidence).exp()
        kept = weights.amax(1) > 1e-12  # nodes that no task believes in cost as much as the others
        self.weights, A, s = (v[kept] for v in (weights[..., None, None], *posterior.process.nodes()[:2]))
        features = torch.cat([x, torch.ones_like(x)], -1)
        self.line, self.line_factor = line[kept], R
        self.f = A.unsqueeze(-1) * torch.sin(1.5 * (x - s.unsqueeze(-1))) + features @ self.line  # (K, T, M, 1)
        self.variance = (features * cho_solve(R, features.mT).mT).sum(-1, keepdim=True)  # of f given a node, (T, M, 1)
        self.moments = mixture_moments(self.f, self.variance, self.weights)

    def _out(self, value: Tensor, axis: int = 0) -> Tensor:
        return value.squeeze(axis) if self.posterior.single else value

    @property
    def mean(self) -> Tensor:
        """Return the mean with shape (T, M, 1)."""
        return self._out(self.moments[0])

    @property
    def epistemic_std(self) -> Tensor:
        """Return the standard deviation of f with shape (T, M, 1)."""
        return self._out(self.moments[1].sqrt())

    @property
    def std(self) -> Tensor:
        """Return the standard deviation of y with shape (T, M, 1)."""
        return self._out((self.moments[1] + self.noise_std**2).sqrt())

    @property
    def _std_s(self) -> Tensor:
        return (self.variance + self.noise_std**2).sqrt()

    def cdf(self, yt: Tensor) -> Tensor:
        """Return P(Y <= yt) with shape (T, M, 1)."""
        return self._out(mixture_cdf(yt.to(_FLOAT).reshape(self.x.shape), self.f, self._std_s, self.weights))

    def quantile(self, q: float) -> Tensor:
        """Return the q-quantile of y with shape (T, M, 1)."""
        return self._out(mixture_quantile(q, self.f, self._std_s, self.weights))

    def log_prob(self, yt: Tensor, joint: bool = False, mask: Tensor | None = None) -> Tensor:
        """Return the log density of yt, for each point (T, M) or of all observed points together (T,)."""
        y, seen = yt.to(_FLOAT).reshape(self.x.shape), self.posterior
        m = torch.ones(y.shape[:-1], dtype=_FLOAT) if mask is None else mask.to(_FLOAT).reshape(y.shape[:-1])
        if joint:
            both = (torch.cat(pair, 1) for pair in ((seen.x, self.x), (seen.y, y), (seen.observed, m)))
            return self._out(seen.solve(*both)[0].logsumexp(0) - self.log_evidence)
        std = self._std_s
        each = -0.5 * ((y - self.f) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)
        return self._out((each + self.weights.log()).logsumexp(0).squeeze(-1) * m)

    def sample(self, n: int, noisy: bool = True, seed: int = 0) -> Tensor:
        """Draw n functions, each of one node and one line, with shape (n, T, M, 1)."""
        generator = torch.Generator().manual_seed(seed)
        T = len(self.x)
        node = torch.multinomial(self.weights[..., 0, 0].T, n, replacement=True, generator=generator).T  # (n, T)
        z = torch.randn((n, T, 2, 1), generator=generator, dtype=_FLOAT)
        features = torch.cat([self.x, torch.ones_like(self.x)], -1)
        deviation = features @ solve_lower_transposed(self.line_factor.expand(n, T, 2, 2), z)
        f = self.f[node, torch.arange(T)] + deviation
        return self._out(f + self.noise_std * torch.randn(f.shape, generator=generator, dtype=_FLOAT) if noisy else f, 1)
