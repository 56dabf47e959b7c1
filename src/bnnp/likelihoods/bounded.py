"""Values strictly between 0 and 1: shares, rates, probabilities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Beta as TorchBeta
from torch.distributions import Distribution

from bnnp.likelihoods.base import Likelihood, check_positive, soft_bound
from bnnp.likelihoods.special import betainc

__all__ = ["Beta"]


class Beta(Likelihood):
    """Observe y in (0, 1), y ~ Beta(m c, (1 - m) c) with mean m = sigmoid(f) and variance m (1 - m) / (1 + c), each output on its own.

    The concentration c is learned, one for each output. Densities at 0 and 1 are zero or infinite, so these values are refused: move
    them inside, for instance y (n - 1) / n + 1 / (2 n) of n values (Smithson and Verkuilen, 2006), or use `Bernoulli`, which accepts
    them and scores a cross-entropy.

    Arguments:
        concentration: where learning starts.

    References:
        A better lemon squeezer? Maximum-likelihood regression with beta-distributed dependent variables (Smithson and Verkuilen, 2006).

    Example:
        >>> Beta(2.0).bind(1).log_prob(torch.zeros(1, 1), torch.full((1, 1), 0.3)).exp().detach()  # uniform
        tensor([1.])
    """

    scale_y = False
    support = (0.0, 1.0)
    placeholder = 0.5
    bound = 15.0

    def __init__(self, concentration: float = 5.0) -> None:
        super().__init__()
        self.start = check_positive(concentration, "concentration")
        self.raw_concentration = nn.Parameter(torch.full((1,), self.start).log())

    def bind(self, y_dim: int) -> Beta:
        """Return a copy with one concentration for each of `y_dim` outputs."""
        other = Beta(self.start)
        other.raw_concentration = nn.Parameter(self.raw_concentration.detach().expand(y_dim).clone())
        return other

    @property
    def concentration(self) -> Tensor:
        """Return the concentration with shape (d_y,); it has no units."""
        return soft_bound(self.raw_concentration, 12.0).exp()

    def _parts(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """Return the two parameters m c and (1 - m) c."""
        c, f = self.concentration.to(f.dtype), soft_bound(f, self.bound)
        return c * f.sigmoid(), c * (-f).sigmoid()

    def embed(self, y: Tensor) -> Tensor:
        """Return log(y / (1 - y)), at most 9.2 from 0."""
        return y.logit(eps=1e-4)

    def log_prob_each(self, f: Tensor, y: Tensor) -> Tensor:
        """Return (a - 1) log y + (b - 1) log(1 - y) - log B(a, b) of each output."""
        a, b = self._parts(f)
        return (a - 1) * y.log() + (b - 1) * (-y).log1p() + torch.lgamma(a + b) - torch.lgamma(a) - torch.lgamma(b)

    def mean(self, f: Tensor) -> Tensor:
        """Return sigmoid(f)."""
        return soft_bound(f, self.bound).sigmoid()

    def variance(self, f: Tensor) -> Tensor:
        """Return m (1 - m) / (1 + c)."""
        a, b = self._parts(f)
        return a / (a + b) * b / (a + b) / (1 + a + b)

    def cdf(self, f: Tensor, y: Tensor) -> Tensor:
        """Return I_y(a, b), the regularised incomplete beta function."""
        a, b = self._parts(f)
        y = y.to(f.dtype).clamp(0.0, 1.0)
        return betainc(a, b, y, 1 - y)

    def sample(self, f: Tensor, generator: torch.Generator) -> Tensor:
        """Return values with the shape (n, T, M, d_y) of f, by inversion of the distribution function."""
        tiny = torch.finfo(f.dtype).eps / 2
        return self.quantile(f, self._uniform(f, generator, f.shape[-1])).clamp(tiny, 1 - tiny)

    def torch_distribution(self, f: Tensor, scale: Tensor, shift: Tensor) -> tuple[Callable[..., Distribution], dict[str, Tensor]]:
        """Return `Beta` and its arguments."""
        a, b = self._parts(f)
        return TorchBeta, {"concentration1": a, "concentration0": b}

    def check(self, y: Tensor) -> None:
        """Raise ValueError for values that are not strictly between 0 and 1."""
        bad = y[(y <= 0) | (y >= 1)]
        if len(bad):
            raise ValueError(
                f"Expected outputs strictly between 0 and 1 for the Beta likelihood. Got {float(bad[0]):g}. Move the ends inside, "
                "for instance y * (n - 1) / n + 0.5 / n of n values, or use Bernoulli, which accepts 0 and 1."
            )

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {"concentration": self.start}
