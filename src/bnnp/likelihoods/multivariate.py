"""Gaussian noise that is correlated between the outputs of a point."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, MultivariateNormal

from bnnp.likelihoods.base import Likelihood, check_positive
from bnnp.linalg import cholesky, lower_inverse, solve_lower

__all__ = ["MultivariateGaussian"]


class MultivariateGaussian(Likelihood):
    """Observe y = f + noise, noise ~ N(0, Sigma), Sigma = C C^T a learned covariance of the d_y outputs of a point.

    C is lower triangular; learned are the logarithms of its diagonal and what is below it. Use it where outputs are measured together and
    err together; otherwise `Gaussian` has fewer parameters.

    Arguments:
        noise_std: standard deviations at the start, in units of the standard deviation of y over the meta-training tasks; the
            correlations start at zero.

    Example:
        >>> MultivariateGaussian(0.5).bind(2).noise_cov.detach()
        tensor([[0.2500, 0.0000],
                [0.0000, 0.2500]])
    """

    conjugate = True

    def __init__(self, noise_std: float = 0.1) -> None:
        super().__init__()
        self.start = check_positive(noise_std, "noise_std")
        self._set(1)

    def _set(self, y_dim: int) -> None:
        self.log_diagonal = nn.Parameter(torch.full((y_dim,), self.start).log())
        self.lower = nn.Parameter(torch.zeros(y_dim * (y_dim - 1) // 2))

    def bind(self, y_dim: int) -> MultivariateGaussian:
        """Return a copy with a covariance of `y_dim` outputs."""
        other = MultivariateGaussian(self.start)
        other._set(y_dim)
        return other

    @property
    def noise_factor(self) -> Tensor:
        """Return C, lower triangular, with shape (d_y, d_y), in the network's units."""
        d = len(self.log_diagonal)
        i, j = torch.tril_indices(d, d, -1, device=self.lower.device)
        return torch.diag(self.log_diagonal.exp()).index_put((i, j), self.lower)

    @property
    def noise_cov(self) -> Tensor:
        """Return Sigma with shape (d_y, d_y), in the network's units."""
        C = self.noise_factor
        return C @ C.mT

    @property
    def noise_std(self) -> Tensor:
        """Return the square roots of the diagonal of Sigma, with shape (d_y,), in the network's units."""
        return self.noise_factor.square().sum(-1).sqrt()

    @property
    def whitener(self) -> Tensor:
        """Return T = C^{-1}, lower triangular, with T Sigma T^T = I: the outputs T y have independent noise of variance 1."""
        return lower_inverse(self.noise_factor)

    def log_prob(self, f: Tensor, y: Tensor, seen: Tensor | None = None) -> Tensor:
        """Return log N(y; f, Sigma) with shape (...), of the outputs that were seen together where some were not."""
        if seen is None:
            C = self.noise_factor.to(f.dtype)
            r = y - f
            white = solve_lower(C, r.reshape(-1, r.shape[-1]).mT).mT.reshape(r.shape)
            half_log_det = self.log_diagonal.to(f.dtype).sum()
            return -0.5 * white.square().sum(-1) - half_log_det - 0.5 * r.shape[-1] * math.log(2 * math.pi)
        # Outputs that were not seen become independent ones of variance 1 and residual 0, which add nothing but a constant.
        keep = seen.to(f.dtype).expand(*seen.shape[:-1], len(self.log_diagonal))
        cov = keep.unsqueeze(-1) * self.noise_cov.to(f.dtype) * keep.unsqueeze(-2) + torch.diag_embed(1 - keep)
        root = cholesky(cov)
        r = torch.where(seen, torch.where(seen, y, y.new_zeros(())) - f, f.new_zeros(()))
        root = root.expand(*r.shape[:-1], *root.shape[-2:])
        white = solve_lower(root, r.unsqueeze(-1)).squeeze(-1)
        half_log_det = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return -0.5 * white.square().sum(-1) - half_log_det - 0.5 * keep.sum(-1) * math.log(2 * math.pi)

    def log_prob_each(self, f: Tensor, y: Tensor) -> Tensor:
        """Return the log density of each output on its own; they do not add up to that of all together."""
        s = self.noise_std.to(f.dtype)
        return -0.5 * ((y - f) / s).square() - s.log() - 0.5 * math.log(2 * math.pi)

    def mean(self, f: Tensor) -> Tensor:
        """Return f."""
        return f

    def variance(self, f: Tensor) -> Tensor:
        """Return the diagonal of Sigma."""
        return self.noise_std.to(f.dtype).square().expand_as(f)

    def cdf(self, f: Tensor, y: Tensor) -> Tensor:
        """Return Phi((y - f) / noise_std) of each output on its own."""
        return torch.special.ndtr((y - f) / self.noise_std.to(f.dtype))

    def sample(self, f: Tensor, generator: torch.Generator) -> Tensor:
        """Return f + C z, with the shape (n, T, M, d_y) of f."""
        return f + self._normal(f, generator, f.shape[-1]) @ self.noise_factor.to(f).mT

    def torch_distribution(self, f: Tensor, scale: Tensor, shift: Tensor) -> tuple[Callable[..., Distribution], dict[str, Tensor]]:
        """Return `MultivariateNormal` and its arguments; the outputs are its event, so its batch shape is (...)."""
        C = scale.expand(f.shape[-1]).unsqueeze(-1) * self.noise_factor.to(f.dtype)
        return MultivariateNormal, {"loc": f * scale + shift, "scale_tril": C}

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {"noise_std": self.start}
