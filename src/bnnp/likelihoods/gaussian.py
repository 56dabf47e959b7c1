"""Gaussian noise on each output on its own: one standard deviation for an output, or one for each point, from the network."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Normal

from bnnp.likelihoods.base import Likelihood, check_positive

__all__ = ["Gaussian", "Heteroscedastic"]


def _log_normal_density(y: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    return -0.5 * ((y - mean) * (-log_std).exp()).square() - log_std - 0.5 * math.log(2 * math.pi)


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
        noise_std = check_positive(noise_std, "noise_std")
        bound = None if max_noise_std is None else check_positive(max_noise_std, "max_noise_std")
        if bound is not None and not learn_noise and noise_std >= bound:
            raise ValueError(f"Expected noise_std below max_noise_std={bound}. Got noise_std={noise_std}.")
        self._config = {"noise_std": noise_std, "learn_noise": bool(learn_noise), "max_noise_std": bound}
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

    def log_prob_each(self, f: Tensor, y: Tensor) -> Tensor:
        """Return log N(y; f, noise_std^2) of each output."""
        s = self.noise_std
        return -0.5 * ((y - f) / s) ** 2 - s.log() - 0.5 * math.log(2 * math.pi)

    def mean(self, f: Tensor) -> Tensor:
        """Return f."""
        return f

    def variance(self, f: Tensor) -> Tensor:
        """Return noise_std^2."""
        return self.noise_std.to(f).square().expand_as(f)

    def cdf(self, f: Tensor, y: Tensor) -> Tensor:
        """Return Phi((y - f) / noise_std)."""
        return torch.special.ndtr((y - f) / self.noise_std)

    def sample(self, f: Tensor, generator: torch.Generator) -> Tensor:
        """Return f + noise, with the shape (n, T, M, d_y) of f."""
        return f + self.noise_std.to(f) * self._normal(f, generator, f.shape[-1])

    def torch_distribution(self, f: Tensor, scale: Tensor, shift: Tensor) -> tuple[Callable[..., Distribution], dict[str, Tensor]]:
        """Return `Normal` and its arguments."""
        return Normal, {"loc": f * scale + shift, "scale": (self.noise_std.to(f) * scale).expand_as(f)}

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return dict(self._config)


class Heteroscedastic(Likelihood):
    """Observe y = m + s z, z ~ N(0, 1), where the network gives both: f = (m, raw), log s = log noise_std + b tanh(raw / b).

    With b = log 100 the noise stays within a factor of 100 of `noise_std`, in either direction. The network has twice as many outputs as y
    has columns. Use it where the noise depends on the inputs, or differs from task to task.

    Arguments:
        noise_std: the noise at raw = 0, in units of the standard deviation of y over the meta-training tasks.

    Example:
        >>> Heteroscedastic(0.5).variance(torch.tensor([1.0, 0.0]))  # f = (m, raw) of one output
        tensor([0.2500])
    """

    bound = math.log(100.0)

    def __init__(self, noise_std: float = 0.1) -> None:
        super().__init__()
        self.start = check_positive(noise_std, "noise_std")

    def bind(self, y_dim: int) -> Heteroscedastic:
        """Return a copy; it has no parameters."""
        return Heteroscedastic(self.start)

    def f_dim(self, y_dim: int) -> int:
        """Return 2 d_y: means, then raw scales."""
        return 2 * y_dim

    def _split(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """Return means and log standard deviations."""
        mean, raw = f.chunk(2, dim=-1)
        return mean, math.log(self.start) + self.bound * (raw / self.bound).tanh()

    def log_prob_each(self, f: Tensor, y: Tensor) -> Tensor:
        """Return log N(y; m, s^2) of each output."""
        return _log_normal_density(y, *self._split(f))

    def mean(self, f: Tensor) -> Tensor:
        """Return m."""
        return self._split(f)[0]

    def variance(self, f: Tensor) -> Tensor:
        """Return s^2."""
        return (2 * self._split(f)[1]).exp()

    def cdf(self, f: Tensor, y: Tensor) -> Tensor:
        """Return Phi((y - m) / s)."""
        mean, log_std = self._split(f)
        return torch.special.ndtr((y - mean) * (-log_std).exp())

    def sample(self, f: Tensor, generator: torch.Generator) -> Tensor:
        """Return m + s z with shape (n, T, M, d_y)."""
        mean, log_std = self._split(f)
        return mean + log_std.exp() * self._normal(f, generator, mean.shape[-1])

    def torch_distribution(self, f: Tensor, scale: Tensor, shift: Tensor) -> tuple[Callable[..., Distribution], dict[str, Tensor]]:
        """Return `Normal` and its arguments."""
        mean, log_std = self._split(f)
        return Normal, {"loc": mean * scale + shift, "scale": log_std.exp() * scale}

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {"noise_std": self.start}
