"""Counts 0, 1, 2, ...: with the variance of their mean, or more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.distributions import NegativeBinomial as TorchNegativeBinomial
from torch.distributions import Poisson as TorchPoisson

from bnnp.likelihoods.base import Likelihood, check_positive, soft_bound
from bnnp.likelihoods.special import betainc

__all__ = ["NegativeBinomial", "Poisson"]


class _Counts(Likelihood):
    """Share what likelihoods of counts have in common: the logarithm of the mean is log_level + f, `log_level` that of training."""

    discrete = True
    scale_y = False
    support = (0.0, float("inf"))
    bound = 20.0
    log_level: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("log_level", torch.zeros(1))

    def _log_mean(self, f: Tensor) -> Tensor:
        # Beyond the bound it grows like a logarithm: means and their gradients stay finite wherever f strays.
        return self.log_level.to(f.dtype) + soft_bound(f, self.bound)

    def mean(self, f: Tensor) -> Tensor:
        """Return exp(log_level + f)."""
        return self._log_mean(f).exp()

    def embed(self, y: Tensor) -> Tensor:
        """Return log((1 + y) / (1 + level)), so that large counts do not swamp the inference networks."""
        return y.log1p() - self.log_level.to(y.dtype).exp().log1p()

    def fit(self, y: Tensor, seen: Tensor) -> None:
        """Take the mean count of each output as the level, so that f = 0 is an ordinary count."""
        y, seen = y.double(), seen.expand_as(y)
        total = torch.where(seen, y, torch.zeros_like(y)).sum(0)
        self.log_level.copy_((total / seen.sum(0).clamp(min=1)).clamp(min=1e-3).log())

    def sample(self, f: Tensor, generator: torch.Generator) -> Tensor:
        """Return counts with the shape (n, T, M, d_y) of f, by inversion of the distribution function."""
        return self.quantile(f, self._uniform(f, generator, f.shape[-1]))

    def check(self, y: Tensor) -> None:
        """Raise ValueError for anything but whole numbers from 0."""
        bad = y[(y < 0) | (y != y.round())]
        if len(bad):
            raise ValueError(
                f"Expected counts 0, 1, 2, ... for {type(self).__name__}. Got {float(bad[0]):g}. Give the counts themselves, not rates or "
                "logarithms; for other numbers use Gaussian or StudentT."
            )


class Poisson(_Counts):
    """Observe counts, P(y) = rate^y exp(-rate) / y!, rate = level exp(f), each output on its own.

    `level` is the mean count of the meta-training tasks (1 before), so f = 0 is an ordinary count. Use it where the variance of counts
    is their mean; where it is larger, `NegativeBinomial`.

    Example:
        >>> Poisson().log_prob(torch.zeros(1, 1), torch.tensor([[2.0]])).exp()
        tensor([0.1839])
    """

    def bind(self, y_dim: int) -> Poisson:
        """Return a copy with one level for each of `y_dim` outputs."""
        other = Poisson()
        other.log_level = self.log_level.new_zeros(y_dim)
        return other

    def log_prob_each(self, f: Tensor, y: Tensor) -> Tensor:
        """Return y log rate - rate - log y! of each output."""
        log_rate = self._log_mean(f)
        return y * log_rate - log_rate.exp() - torch.lgamma(y + 1)

    def variance(self, f: Tensor) -> Tensor:
        """Return the rate."""
        return self.mean(f)

    def cdf(self, f: Tensor, y: Tensor) -> Tensor:
        """Return P(Y <= y) = Q(floor(y) + 1, rate), the regularised incomplete gamma function."""
        rate, y = torch.broadcast_tensors(self.mean(f), y.to(f.dtype))
        return torch.where(y < 0, 0.0, torch.special.gammaincc(y.floor().clamp(min=0) + 1, rate))

    def torch_distribution(self, f: Tensor, scale: Tensor, shift: Tensor) -> tuple[Callable[..., Distribution], dict[str, Tensor]]:
        """Return `Poisson` and its arguments."""
        return TorchPoisson, {"rate": self.mean(f)}

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments: there are none."""
        return {}


class NegativeBinomial(_Counts):
    """Observe counts with mean m = level exp(f) and variance m + dispersion m^2, each output on its own.

    With r = 1 / dispersion, P(y) = Gamma(r + y) / (Gamma(r) y!) (r / (r + m))^r (m / (r + m))^y: a Poisson whose rate is multiplied by a
    Gamma variable of mean 1 and variance `dispersion`. `level` is the mean count of the meta-training tasks (1 before). The dispersion is
    learned, one for each output; where it falls to zero, this is `Poisson`.

    Arguments:
        dispersion: where learning starts.

    Example:
        >>> NegativeBinomial(0.5).bind(1).variance(torch.zeros(1, 1)).detach()
        tensor([[1.5000]])
    """

    def __init__(self, dispersion: float = 0.5) -> None:
        super().__init__()
        self.start = check_positive(dispersion, "dispersion")
        self.raw_dispersion = nn.Parameter(torch.full((1,), self.start).log())

    def bind(self, y_dim: int) -> NegativeBinomial:
        """Return a copy with level and dispersion for each of `y_dim` outputs."""
        other = NegativeBinomial(self.start)
        other.log_level = self.log_level.new_zeros(y_dim)
        other.raw_dispersion = nn.Parameter(self.raw_dispersion.detach().expand(y_dim).clone())
        return other

    @property
    def dispersion(self) -> Tensor:
        """Return the dispersion with shape (d_y,); it has no units."""
        # At e^-12 it is a Poisson to six digits, and differences of log-gammas still have their digits in float64.
        return soft_bound(self.raw_dispersion, 12.0).exp()

    def _parts(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """Return r, and the log odds m / r of one more."""
        log_dispersion = soft_bound(self.raw_dispersion, 12.0).to(f.dtype)
        return (-log_dispersion).exp(), self._log_mean(f) + log_dispersion

    def log_prob_each(self, f: Tensor, y: Tensor) -> Tensor:
        """Return log P(y) of each output."""
        r, odds = self._parts(f)
        chosen = torch.lgamma(r + y) - torch.lgamma(r) - torch.lgamma(y + 1)
        return chosen - r * nn.functional.softplus(odds) - y * nn.functional.softplus(-odds)

    def variance(self, f: Tensor) -> Tensor:
        """Return m + dispersion m^2."""
        m = self.mean(f)
        return m + self.dispersion.to(f.dtype) * m.square()

    def cdf(self, f: Tensor, y: Tensor) -> Tensor:
        """Return P(Y <= y) = I_p(r, floor(y) + 1), p = r / (r + m), the regularised incomplete beta function."""
        r, odds = self._parts(f)
        r, odds, y = torch.broadcast_tensors(r, odds, y.to(f.dtype))
        return torch.where(y < 0, 0.0, betainc(r, y.floor().clamp(min=0) + 1, (-odds).sigmoid(), odds.sigmoid()))

    def torch_distribution(self, f: Tensor, scale: Tensor, shift: Tensor) -> tuple[Callable[..., Distribution], dict[str, Tensor]]:
        """Return `NegativeBinomial` and its arguments."""
        r, odds = self._parts(f)
        return TorchNegativeBinomial, {"total_count": r.expand_as(odds), "logits": odds}

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {"dispersion": self.start}
