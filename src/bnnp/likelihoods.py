"""From the output of the network to the distribution of y.

A likelihood knows its own noise and scores outputs; it does not know the network. Everything here is in the network's
units; `rescale` tells a likelihood what one such unit is worth in the user's.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["LIKELIHOODS", "Bernoulli", "Gaussian", "Likelihood", "noise_factor", "noise_of"]


class Likelihood(nn.Module, ABC):
    """Define p(y | f) for outputs f of the network with shape (..., d_y)."""

    conjugate: bool = False
    discrete: bool = False

    @abstractmethod
    def bind(self, y_dim: int) -> Likelihood:
        """Return a copy with parameters for `y_dim` outputs, so that one instance may serve many models."""

    @abstractmethod
    def log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        """Return log p(y | f) summed over outputs, with shape (...)."""

    @abstractmethod
    def sample(self, f: Tensor, generator: torch.Generator) -> Tensor:
        """Return draws of y given f (n, T, M, d_y), with its shape; all tasks get the same noise, so none depends on the others."""

    @abstractmethod
    def check(self, y: Tensor) -> None:
        """Raise ValueError where y cannot have come from this likelihood."""

    @abstractmethod
    def config(self) -> dict[str, float | bool | None]:
        """Return the constructor's arguments."""

    def rescale(self, y_scale: Tensor) -> None:
        """Learn that one unit of the network is `y_scale` of the user's, with shape (d_y,)."""


class Gaussian(Likelihood):
    """Observe y = f + noise, noise ~ N(0, diag(noise_std^2)), one noise per output.

    A noise that is fixed and an upper bound are statements about the data, so they are in the units of y. A noise that is
    learned only starts at `noise_std`, which is then in units of the standard deviation of y over the meta-training
    tasks; the learned value is read, in the units of y, from `model.noise_std`.

    Arguments:
        noise_std: the noise, or where learning starts.
        learn_noise: whether it is learned.
        max_noise_std: an upper bound, in the units of y; noise = bound * sigmoid(raw).

    Raises:
        ValueError: a noise or bound that is not positive, or a fixed noise that is not below the bound.

    Example:
        >>> Gaussian(noise_std=0.5).bind(2).noise_std.detach()
        tensor([0.5000, 0.5000])
    """

    conjugate = True

    def __init__(self, noise_std: float = 0.1, learn_noise: bool = True, max_noise_std: float | None = None) -> None:
        super().__init__()
        for name, value in (("noise_std", noise_std), ("max_noise_std", max_noise_std)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"Expected {name} to be positive and finite. Got {value}.")
        if max_noise_std is not None and not learn_noise and noise_std >= max_noise_std:
            raise ValueError(f"Expected noise_std below max_noise_std={max_noise_std}. Got noise_std={noise_std}.")
        bound = None if max_noise_std is None else float(max_noise_std)
        self._config = {"noise_std": float(noise_std), "learn_noise": bool(learn_noise), "max_noise_std": bound}
        self._set(torch.ones(1))

    def _set(self, y_scale: Tensor) -> None:
        start, bound = self._config["noise_std"], self._config["max_noise_std"]
        learn = bool(self._config["learn_noise"])
        assert start is not None
        noise = torch.full_like(y_scale, float(start)) if learn else float(start) / y_scale
        raw = noise.log()
        self.bound: Tensor | None
        if bound is not None:
            limit = float(bound) / y_scale
            noise = torch.minimum(noise, 0.95 * limit) if learn else noise
            raw = (noise / (limit - noise)).log()
            self.register_buffer("bound", limit)
        else:
            self.register_buffer("bound", None)
        old = self._parameters.get("raw_noise")
        frozen = old is not None and not old.requires_grad
        self.raw_noise = nn.Parameter(raw, requires_grad=learn and not frozen)

    def bind(self, y_dim: int) -> Gaussian:
        """Return a copy with one noise for each of `y_dim` outputs."""
        other = copy.deepcopy(self)
        other._set(self.raw_noise.detach().new_ones(y_dim))
        return other

    def rescale(self, y_scale: Tensor) -> None:
        """Express a fixed noise and the bound, given in the user's units, in the network's."""
        self._set(y_scale.detach().to(self.raw_noise))

    @property
    def noise_std(self) -> Tensor:
        """Return the noise in the network's units, with shape (d_y,)."""
        return self.raw_noise.exp() if self.bound is None else self.bound * self.raw_noise.sigmoid()

    def log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        """Return log N(y; f, diag(noise_std^2)), with shape (...)."""
        s = self.noise_std
        return (-0.5 * ((y - f) / s) ** 2 - s.log() - 0.5 * math.log(2 * math.pi)).sum(-1)

    def sample(self, f: Tensor, generator: torch.Generator) -> Tensor:
        """Return f + noise, with the shape (n, T, M, d_y) of f."""
        z = torch.randn((len(f), 1, *f.shape[2:]), generator=generator, device=generator.device, dtype=f.dtype)
        return f + self.noise_std.to(f) * z.to(f.device)

    def check(self, y: Tensor) -> None:
        """Accept every real number."""

    def config(self) -> dict[str, float | bool | None]:
        """Return the constructor's arguments."""
        return dict(self._config)


class Bernoulli(Likelihood):
    """Observe y in {0, 1} with P(y = 1) = sigmoid(f), each output on its own.

    Values between 0 and 1, such as grey values, are accepted and scored by y log p + (1 - y) log(1 - p), which is then a
    cross-entropy and not the logarithm of a normalised density.

    Example:
        >>> Bernoulli().log_prob(torch.zeros(1, 1), torch.ones(1, 1))
        tensor([-0.6931])
    """

    discrete = True

    def bind(self, y_dim: int) -> Bernoulli:
        """Return a copy; it has no parameters."""
        return Bernoulli()

    def log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        """Return y log sigmoid(f) + (1 - y) log sigmoid(-f) summed over outputs, with shape (...)."""
        return -F.binary_cross_entropy_with_logits(f, y.expand_as(f).to(f.dtype), reduction="none").sum(-1)

    def sample(self, f: Tensor, generator: torch.Generator) -> Tensor:
        """Return zeros and ones, with the shape (n, T, M, d_y) of f."""
        u = torch.rand((len(f), 1, *f.shape[2:]), generator=generator, device=generator.device, dtype=f.dtype)
        return (u.to(f.device) < f.sigmoid()).to(f.dtype)

    def check(self, y: Tensor) -> None:
        """Raise ValueError for outputs outside [0, 1]."""
        if bool(((y < 0) | (y > 1)).any()):
            bad = float(y[(y < 0) | (y > 1)][0])
            raise ValueError(f"Expected outputs in [0, 1] for the Bernoulli likelihood. Got {bad:g}. Encode the classes as 0 and 1.")

    def config(self) -> dict[str, float | bool | None]:
        """Return the constructor's arguments: there are none."""
        return {}


def noise_of(likelihood: Likelihood) -> Tensor | None:
    """Return the noise of a Gaussian likelihood, in the network's units, or None for the others."""
    return likelihood.noise_std if isinstance(likelihood, Gaussian) else None


def noise_factor(likelihood: Likelihood) -> Tensor | None:
    """Return C with C C^T the covariance of noise that is correlated between outputs, in the network's units; None for the others."""
    return getattr(likelihood, "noise_factor", None)


LIKELIHOODS: dict[str, type[Likelihood]] = {"gaussian": Gaussian, "bernoulli": Bernoulli}
