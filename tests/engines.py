"""Problems with known answers for the inference engines, and what their draws are compared with."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import bnnp
from bnnp.inference import Functional, Target, functional
from bnnp.seeds import seeded


@dataclass(frozen=True, eq=False)
class GaussianTarget(Target):
    """A posterior N(mean_t, cov_t) of eps, from a likelihood N(eps; m, V) up to a factor; points share it out unevenly.

    log p(y | eps) = log_z + log N(eps; mean, cov) - log N(eps; 0, I), so log_z is the evidence.
    """

    mean: Tensor  # (T, D)
    cov: Tensor  # (T, D, D)
    log_z: Tensor  # (T,)
    shares: Tensor  # (T, N, D): linear terms of the points, which add up to zero

    @property
    def dim(self) -> int:
        return self.mean.shape[-1]

    @property
    def num_tasks(self) -> int:
        return self.mean.shape[0]

    @property
    def counts(self) -> Tensor:
        return torch.full((self.num_tasks,), self.shares.shape[1])

    def log_likelihood(self, eps: Tensor, batch: Tensor | None = None) -> Tensor:
        posterior = torch.distributions.MultivariateNormal(self.mean, self.cov, validate_args=False)
        whole = self.log_z + posterior.log_prob(eps) - self.log_prior(eps)
        if batch is None:
            return whole
        part = self.shares.gather(1, batch.unsqueeze(-1).expand(-1, -1, self.dim)).sum(1)
        return whole * batch.shape[1] / self.shares.shape[1] + (part * eps).sum(-1)


def gaussian_target(dim: int = 4, num_tasks: int = 2, seed: int = 0, points: int = 12) -> GaussianTarget:
    """A Gaussian with correlations, narrower than its prior, as a posterior is."""
    g = seeded(seed, "gaussian target")
    half = torch.randn(num_tasks, dim, 2 * dim, generator=g, dtype=torch.float64)
    prec = torch.eye(dim, dtype=torch.float64) + half @ half.mT / 2
    shares = torch.randn(num_tasks, points, dim, generator=g, dtype=torch.float64)
    shares = 0.3 * (shares - shares.mean(1, keepdim=True))
    mean = torch.randn(num_tasks, dim, generator=g, dtype=torch.float64)
    return GaussianTarget(mean, prec.inverse(), torch.tensor([-3.0, 2.0] * num_tasks, dtype=torch.float64)[:num_tasks], shares)


@dataclass(frozen=True)
class Exact:
    """A one-layer network, whose posterior and evidence are known."""

    target: Functional
    mean: Tensor  # (T, D)
    cov: Tensor  # (T, D, D)
    log_evidence: Tensor  # (T,)
    x: Tensor  # (T, M, d_x) test inputs
    f_mean: Tensor  # (T, M)
    f_std: Tensor  # (T, M)


def linear_problem(num_tasks: int = 2, seed: int = 0, points: int = 9, noise: float = 0.4) -> Exact:
    """Bayesian linear regression with a learned-looking prior, solved with dense matrices."""
    g = seeded(seed, "linear problem")
    model = bnnp.BNNP(2, 1, hidden=(), prior="per_unit", likelihood=bnnp.Gaussian(noise, learn_noise=False)).double()
    for parameter in model.prior.means() + model.prior.scales():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=g, dtype=torch.float64)
    x = torch.randn(num_tasks, points, 2, generator=g, dtype=torch.float64)
    y = 0.5 * x[..., :1] - x[..., 1:] + 0.3 + noise * torch.randn(num_tasks, points, 1, generator=g, dtype=torch.float64)
    target = functional(model, x, y)
    prior = next(iter(model.prior))
    L, mu = prior.dense()[0].detach(), prior.mean[0].detach()
    A = torch.cat([x, torch.ones_like(x[..., :1])], -1)
    B, r = A @ L / noise, (y[..., 0] - A @ mu) / noise
    prec = torch.eye(3, dtype=torch.float64) + B.mT @ B
    cov = prec.inverse()
    mean = (cov @ (B.mT @ r.unsqueeze(-1))).squeeze(-1)
    marginal = torch.distributions.MultivariateNormal(A @ mu, A @ L @ L.T @ A.mT + noise**2 * torch.eye(points, dtype=torch.float64))
    at = torch.linspace(-2, 2, 4, dtype=torch.float64)[:, None].expand(num_tasks, 4, 2)
    P = torch.cat([at, torch.ones_like(at[..., :1])], -1) @ L
    f_mean = torch.cat([at, torch.ones_like(at[..., :1])], -1) @ mu + (P @ mean.unsqueeze(-1)).squeeze(-1)
    return Exact(target, mean, cov, marginal.log_prob(y[..., 0]), at, f_mean, (P @ cov @ P.mT).diagonal(dim1=-2, dim2=-1).sqrt())


def moment_errors(eps: Tensor, mean: Tensor, cov: Tensor, effective: float) -> tuple[float, float]:
    """Largest deviation of the draws' mean and variances, in standard errors of so many independent draws.

    Along the eigenvectors of the covariance, where both have known errors: std / sqrt(n), and variance * sqrt(2 / n).
    """
    values, vectors = torch.linalg.eigh(cov)
    along = torch.einsum("ntd,tdk->ntk", eps - mean, vectors) / values.sqrt()
    off_mean = along.mean(0).abs().max() * math.sqrt(effective)
    off_var = (along.square().mean(0) - 1).abs().max() * math.sqrt(effective / 2)
    return float(off_mean), float(off_var)
