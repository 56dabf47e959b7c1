"""Distributions of eps that can be drawn from and have a density: what importance, bridge and annealed estimates start from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bnnp.linalg import cholesky, log_det, solve_lower
from bnnp.seeds import check_count, seeded

__all__ = ["Gaussian", "Proposal"]


class Proposal(Protocol):
    """Be a distribution of eps for T tasks that can be drawn from and has a density."""

    def draw(self, n: int, seed: int) -> Tensor:
        """Return n draws with shape (n, T, dim)."""
        ...

    def log_density(self, eps: Tensor) -> Tensor:
        """Return log q(eps) with shape (*S, T) for eps with shape (*S, T, dim), differentiable."""
        ...


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Be N(mean, L L^T) for each task.

    Arguments:
        mean: with shape (T, dim).
        L: lower triangular with shape (T, dim, dim), or standard deviations (T, dim) where elements are independent.
    """

    mean: Tensor
    L: Tensor

    @staticmethod
    def fitted(draws: Tensor, full: bool = True, widened: float = 1.0) -> Gaussian:
        """Return the Gaussian with the moments of draws (n, T, dim).

        Correlations are shrunk by n / (n + dim), so that few draws do not make a matrix of no rank.

        Arguments:
            draws: with shape (n, T, dim), n at least 2.
            full: with correlations.
            widened: what standard deviations are multiplied by.

        Raises:
            ValueError: another shape, or draws that are not finite.

        Example:
            >>> Gaussian.fitted(torch.tensor([[[0.0]], [[2.0]]])).L
            tensor([[[1.4142]]])
        """
        if draws.ndim != 3 or len(draws) < 2 or not bool(draws.isfinite().all()):
            raise ValueError(f"Expected at least two finite draws with shape (n, T, dim). Got shape {tuple(draws.shape)}, or NaN.")
        mean, (n, _, dim) = draws.mean(0), draws.shape
        variance = draws.var(0).clamp(min=1e-12)
        if not full:
            return Gaussian(mean, widened * variance.sqrt())
        centred = draws - mean
        covariance = torch.einsum("nti,ntj->tij", centred, centred) / (n - 1)
        diagonal = torch.diag_embed(variance)
        return Gaussian(mean, widened * cholesky(diagonal + (n / (n + dim)) * (covariance - torch.diag_embed(draws.var(0)))))

    @property
    def diagonal(self) -> bool:
        """Return whether elements are independent."""
        return self.L.ndim == self.mean.ndim

    def draw(self, n: int, seed: int) -> Tensor:
        """Return n draws with shape (n, T, dim)."""
        z = torch.randn(check_count(n, "n"), *self.mean.shape, generator=seeded(seed, "gaussian proposal"), dtype=self.mean.dtype)
        z = z.to(self.mean.device)
        return self.mean + (self.L * z if self.diagonal else (self.L @ z.unsqueeze(-1)).squeeze(-1))

    def log_density(self, eps: Tensor) -> Tensor:
        """Return log N(eps; mean, L L^T) with shape (*S, T)."""
        from_mean = eps - self.mean
        if self.diagonal:
            z, half_log_det = from_mean / self.L, self.L.log().sum(-1)
        else:
            lead = from_mean.shape[:-2]
            columns = from_mean.reshape(-1, *self.mean.shape).permute(1, 2, 0)  # one solve serves every draw
            z = solve_lower(self.L, columns).permute(2, 0, 1).reshape(*lead, *self.mean.shape)
            half_log_det = 0.5 * log_det(self.L)
        return -0.5 * (z.square().sum(-1) + self.mean.shape[-1] * math.log(2 * math.pi)) - half_log_det
