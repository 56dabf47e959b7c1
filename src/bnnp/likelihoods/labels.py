"""Class labels: two classes for each output, or one of K."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Bernoulli as TorchBernoulli
from torch.distributions import Categorical as TorchCategorical
from torch.distributions import Distribution

from bnnp.likelihoods.base import Likelihood

__all__ = ["Bernoulli", "Categorical"]


class Bernoulli(Likelihood):
    """Observe y in {0, 1} with P(y = 1) = sigmoid(f), each output on its own.

    Values between 0 and 1, such as grey values, are accepted and scored by y log p + (1 - y) log(1 - p), which is then a
    cross-entropy and not the logarithm of a normalised density.

    Example:
        >>> Bernoulli().log_prob(torch.zeros(1, 1), torch.ones(1, 1))
        tensor([-0.6931])
    """

    discrete = labels = True
    scale_y = False
    support = (0.0, 1.0)

    def bind(self, y_dim: int) -> Bernoulli:
        """Return a copy; it has no parameters."""
        return Bernoulli()

    def log_prob_each(self, f: Tensor, y: Tensor) -> Tensor:
        """Return y log sigmoid(f) + (1 - y) log sigmoid(-f) of each output."""
        f, y = torch.broadcast_tensors(f, y.to(f.dtype))
        return -F.binary_cross_entropy_with_logits(f, y, reduction="none")

    def mean(self, f: Tensor) -> Tensor:
        """Return P(y = 1)."""
        return f.sigmoid()

    def f_of(self, p: Tensor) -> Tensor:
        """Return the f that gives these probabilities."""
        return p.logit()

    def variance(self, f: Tensor) -> Tensor:
        """Return p (1 - p)."""
        return f.sigmoid() * (-f).sigmoid()

    def cdf(self, f: Tensor, y: Tensor) -> Tensor:
        """Return 0 below 0, P(y = 0) below 1, then 1."""
        f, y = torch.broadcast_tensors(f, y)
        return torch.where(y >= 1, 1.0, torch.where(y < 0, 0.0, (-f).sigmoid()))

    def sample(self, f: Tensor, generator: torch.Generator) -> Tensor:
        """Return zeros and ones, with the shape (n, T, M, d_y) of f."""
        return (self._uniform(f, generator, f.shape[-1]) < f.sigmoid()).to(f.dtype)

    def torch_distribution(self, f: Tensor, scale: Tensor, shift: Tensor) -> tuple[Callable[..., Distribution], dict[str, Tensor]]:
        """Return `Bernoulli` and its arguments."""
        return TorchBernoulli, {"logits": f}

    def check(self, y: Tensor) -> None:
        """Raise ValueError for outputs outside [0, 1]."""
        bad = y[(y < 0) | (y > 1)]
        if len(bad):
            raise ValueError(
                f"Expected outputs in [0, 1] for the Bernoulli likelihood. Got {float(bad[0]):g}. Encode the classes as 0 and 1."
            )

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments: there are none."""
        return {}


class Categorical(Likelihood):
    """Observe one of K labels, P(y = k) = softmax(f)_k; y is one column of the numbers 0 to K - 1.

    The network has K outputs, and its inference networks see labels as K columns of zeros and a one. `mean` and `std` of a prediction are
    those of these K columns. Distribution function and quantiles are those of the number, and mean something where labels have an order.

    Arguments:
        classes: K >= 2.

    Raises:
        ValueError: fewer than two classes, or a y of several columns.

    Example:
        >>> Categorical(4).log_prob(torch.zeros(1, 4), torch.tensor([[3.0]])).exp()
        tensor([0.2500])
    """

    discrete = labels = True
    scale_y = False

    def __init__(self, classes: int) -> None:
        super().__init__()
        if not hasattr(classes, "__index__") or int(classes) < 2:
            raise ValueError(f"Expected classes as a number of at least 2. Got {classes!r}.")
        self.classes = int(classes)
        self.support = (0.0, self.classes - 1.0)

    def bind(self, y_dim: int) -> Categorical:
        """Return a copy; it has no parameters."""
        if y_dim != 1:
            raise ValueError(f"Expected y_dim=1 with Categorical: one column of labels 0 to {self.classes - 1}. Got y_dim={y_dim}.")
        return Categorical(self.classes)

    def f_dim(self, y_dim: int) -> int:
        """Return K."""
        return self.classes

    def embed_dim(self, y_dim: int) -> int:
        """Return K."""
        return self.classes

    def embed(self, y: Tensor) -> Tensor:
        """Return labels as zeros and a one, with shape (..., K)."""
        return F.one_hot(y[..., 0].long(), self.classes).to(y.dtype)

    def log_prob_each(self, f: Tensor, y: Tensor) -> Tensor:
        """Return log softmax(f)_y with shape (..., 1)."""
        log_p = f.log_softmax(-1)
        at = y.long().expand(*torch.broadcast_shapes(y.shape[:-1], f.shape[:-1]), 1)
        return log_p.expand(*at.shape[:-1], -1).gather(-1, at)

    def mean(self, f: Tensor) -> Tensor:
        """Return the probabilities of the classes, with shape (..., K)."""
        return f.softmax(-1)

    def f_of(self, p: Tensor) -> Tensor:
        """Return an f that gives these probabilities."""
        return p.log()

    def variance(self, f: Tensor) -> Tensor:
        """Return p (1 - p) of each class, with shape (..., K)."""
        p = f.softmax(-1)
        return p * (1 - p)

    def cdf(self, f: Tensor, y: Tensor) -> Tensor:
        """Return P(label <= y) with shape (..., 1)."""
        number = torch.arange(self.classes, device=f.device)
        return (f.softmax(-1) * (number <= y)).sum(-1, keepdim=True).clamp(max=1.0)

    def quantile(self, f: Tensor, q: Tensor) -> Tensor:
        """Return the smallest label with P(label <= y) >= q, with shape (..., 1)."""
        below = f.softmax(-1).cumsum(-1)[..., :-1] < q
        return below.sum(-1, keepdim=True).to(f.dtype)

    def sample(self, f: Tensor, generator: torch.Generator) -> Tensor:
        """Return labels with shape (n, T, M, 1)."""
        return self.quantile(f, self._uniform(f, generator, 1))

    def torch_distribution(self, f: Tensor, scale: Tensor, shift: Tensor) -> tuple[Callable[..., Distribution], dict[str, Tensor]]:
        """Return `Categorical` and its arguments; its batch shape is (...), without the axis of outputs."""
        return TorchCategorical, {"logits": f}

    def check(self, y: Tensor) -> None:
        """Raise ValueError for anything but the numbers 0 to K - 1."""
        bad = y[(y < 0) | (y > self.classes - 1) | (y != y.round())]
        if len(bad):
            raise ValueError(
                f"Expected labels 0 to {self.classes - 1} for Categorical(classes={self.classes}). Got {float(bad[0]):g}. Number the "
                "classes from 0, in one column."
            )

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {"classes": self.classes}
