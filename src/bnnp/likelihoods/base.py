"""What every likelihood answers: densities, moments, distribution functions, quantiles and draws of y given f."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from bnnp.mixtures import invert_cdf

__all__ = ["Likelihood", "check_positive", "noise_factor", "noise_of", "soft_bound"]


class Likelihood(nn.Module, ABC):
    """Define p(y | f) for outputs f of the network with shape (..., f_dim), y with shape (..., d_y).

    A likelihood may be used for shapes and settings before `bind`, which gives it its parameters for so many columns of y.
    """

    conjugate: bool = False
    """Whether y is f plus Gaussian noise, so that a last layer can be integrated out."""
    discrete: bool = False
    """Whether y takes separate values, so that densities are probabilities."""
    labels: bool = False
    """Whether y names classes, so that moments are those of probabilities."""
    scale_y: bool = True
    """Whether outputs are standardised before the network sees them."""
    support: tuple[float, float] = (-math.inf, math.inf)
    placeholder: float = 0.0
    """A value of y that can occur: what stands where an output was not seen."""

    @abstractmethod
    def bind(self, y_dim: int) -> Likelihood:
        """Return a copy with parameters for `y_dim` outputs, so that one instance may serve many models."""

    @abstractmethod
    def log_prob_each(self, f: Tensor, y: Tensor) -> Tensor:
        """Return log p of each output on its own, with shape (..., d_y)."""

    @abstractmethod
    def mean(self, f: Tensor) -> Tensor:
        """Return E[y | f] with shape (..., d_y); for K classes their probabilities, (..., K)."""

    @abstractmethod
    def variance(self, f: Tensor) -> Tensor:
        """Return the variance of y given f with the shape of `mean`."""

    @abstractmethod
    def cdf(self, f: Tensor, y: Tensor) -> Tensor:
        """Return P(Y <= y | f) of each output, with shape (..., d_y)."""

    @abstractmethod
    def sample(self, f: Tensor, generator: torch.Generator) -> Tensor:
        """Return draws of y given f (n, T, M, f_dim), (n, T, M, d_y); all tasks get the same noise, so none depends on the others."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""

    @abstractmethod
    def torch_distribution(self, f: Tensor, scale: Tensor, shift: Tensor) -> tuple[Callable[..., Distribution], dict[str, Tensor]]:
        """Return the class and the arguments of torch's distribution of scale y + shift; every argument with shape (..., d_y)."""

    def distribution(self, f: Tensor) -> Distribution:
        """Return the distribution of y given f as torch knows it, with batch shape (..., d_y)."""
        kind, arguments = self.torch_distribution(f, f.new_ones(()), f.new_zeros(()))
        return kind(**arguments)

    def f_dim(self, y_dim: int) -> int:
        """Return the number of network outputs for `y_dim` columns of y."""
        return y_dim

    def embed_dim(self, y_dim: int) -> int:
        """Return the number of columns of `embed`."""
        return y_dim

    def embed(self, y: Tensor) -> Tensor:
        """Return what the inference networks see of y, with shape (..., embed_dim)."""
        return y

    def log_prob(self, f: Tensor, y: Tensor, seen: Tensor | None = None) -> Tensor:
        """Return log p(y | f) summed over outputs, with shape (...).

        Arguments:
            f: outputs of the network with shape (..., f_dim).
            y: outputs with shape (..., d_y).
            seen: True = observed, broadcastable to (..., d_y); others may hold anything, add 0 and get no gradient.
        """
        if seen is None:
            return self.log_prob_each(f, y).sum(-1)
        each = self.log_prob_each(f, torch.where(seen, y, y.new_full((), self.placeholder)))
        return torch.where(seen, each, torch.zeros_like(each)).sum(-1)

    def quantile(self, f: Tensor, q: Tensor) -> Tensor:
        """Return the q-quantile of y of each output, for q broadcastable to (..., d_y): for counts the smallest k with P(y <= k) >= q."""
        mean, spread = self.mean(f), 4 * self.variance(f).sqrt()
        return invert_cdf(lambda y: self.cdf(f, y), q, mean - spread, mean + spread, self.support, self.discrete)

    def check(self, y: Tensor) -> None:
        """Raise ValueError where y cannot have come from this likelihood."""

    def rescale(self, y_scale: Tensor) -> None:
        """Learn that one unit of the network is `y_scale` of the user's, with shape (d_y,)."""

    def fit(self, y: Tensor, seen: Tensor) -> None:
        """Look at the outputs (n, d_y) of the meta-training tasks, in the user's units, where they were seen, to choose where f starts."""

    def _uniform(self, f: Tensor, generator: torch.Generator, width: int) -> Tensor:
        """Return numbers in (0, 1) with shape (n, 1, M, width), the same for all tasks."""
        u = torch.rand((len(f), 1, f.shape[2], width), generator=generator, device=generator.device, dtype=f.dtype)
        return u.clamp(min=torch.finfo(f.dtype).eps / 2).to(f.device)

    def _normal(self, f: Tensor, generator: torch.Generator, width: int) -> Tensor:
        """Return standard normal numbers with shape (n, 1, M, width), the same for all tasks."""
        return torch.randn((len(f), 1, f.shape[2], width), generator=generator, device=generator.device, dtype=f.dtype).to(f.device)


def soft_bound(f: Tensor, bound: float) -> Tensor:
    """Return f where |f| <= bound, and beyond it sign(f) (bound + log(1 + |f| - bound)), so that exponentials stay finite.

    Example:
        >>> soft_bound(torch.tensor([-3.0, 1.0, 1e6]), 20.0)
        tensor([-3.0000,  1.0000, 33.8155])
    """
    return f.clamp(-bound, bound) + f.sign() * (f.abs() - bound).clamp(min=0).log1p()


def check_positive(value: float, name: str, least: float = 0.0) -> float:
    """Return the number, or raise ValueError where it is not above `least` and finite."""
    if not (math.isfinite(value) and value > least):
        want = "positive and finite" if least == 0 else f"above {least:g} and finite"
        raise ValueError(f"Expected {name} to be {want}. Got {value}.")
    return float(value)


def noise_of(likelihood: Likelihood) -> Tensor | None:
    """Return the noise of a Gaussian likelihood with a closed form, in the network's units with shape (d_y,), or None for the others."""
    noise: Tensor | None = getattr(likelihood, "noise_std", None) if likelihood.conjugate else None
    return noise


def noise_factor(likelihood: Likelihood) -> Tensor | None:
    """Return C with C C^T the covariance of noise that is correlated between outputs, in the network's units; None for the others."""
    factor: Tensor | None = getattr(likelihood, "noise_factor", None)
    return factor
