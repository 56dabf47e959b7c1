"""What every inference engine asks of a problem: a standard normal prior over a vector eps, and a likelihood of T tasks at once.

Because every prior of the package is written w = mean + L eps, one density serves all: log N(eps; 0, I) + log p(y | w(eps)). An engine that
works on it works under any prior. `bnnp.inference.functional` makes one of a network and data; a test may bring its own.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

__all__ = ["Target"]


class Target(ABC):
    """Be the density of eps (*S, T, dim) given the data of T tasks, each on its own: log N(eps; 0, I) + log p(y | eps)."""

    @property
    @abstractmethod
    def dim(self) -> int:
        """Return the number of elements of eps."""

    @property
    @abstractmethod
    def num_tasks(self) -> int:
        """Return the number of tasks T."""

    @property
    @abstractmethod
    def counts(self) -> Tensor:
        """Return the number of observed points of each task, with shape (T,)."""

    @property
    def dtype(self) -> torch.dtype:
        """Return the precision of eps."""
        return torch.float64

    @property
    def device(self) -> torch.device:
        """Return where eps is."""
        return torch.device("cpu")

    @abstractmethod
    def log_likelihood(self, eps: Tensor, batch: Tensor | None = None) -> Tensor:
        """Return log p(y | eps), of all points or of the points `batch` (T, b), with shape (*S, T)."""

    def log_prior(self, eps: Tensor) -> Tensor:
        """Return log N(eps; 0, I) with shape (*S, T)."""
        return -0.5 * (eps.square().sum(-1) + self.dim * math.log(2 * math.pi))

    def log_joint(self, eps: Tensor, batch: Tensor | None = None, inverse_temperature: float | Tensor = 1.0) -> Tensor:
        """Return log p(eps) + t (N / b) log p(y_batch | eps) with shape (*S, T): with t = 1 an unbiased estimate of log p(y, eps).

        Arguments:
            eps: with shape (*S, T, dim).
            batch: numbers of b points of each task with shape (T, b); all points where not given.
            inverse_temperature: t, a number or with a shape that broadcasts to (*S, T).
        """
        scale: float | Tensor = inverse_temperature
        if batch is not None:
            scale = scale * self.counts.to(eps) / self.batch_counts(batch).clamp(min=1).to(eps)
        return self.log_prior(eps) + scale * self.log_likelihood(eps, batch)

    def value_and_grad(self, eps: Tensor, batch: Tensor | None = None, inverse_temperature: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
        """Return `log_joint` and its gradient by eps, both detached; not finite where eps is beyond what can be computed."""
        with torch.enable_grad():
            at = eps.detach().requires_grad_()
            value = self.log_joint(at, batch, inverse_temperature)
            (gradient,) = torch.autograd.grad(value.sum(), at)
        return value.detach(), gradient

    def batch_counts(self, batch: Tensor) -> Tensor:
        """Return how many of the points of a batch were observed, with shape (T,): those with numbers below the task's count."""
        return (batch < self.counts.to(batch.device).unsqueeze(-1)).sum(-1)

    def draw_batch(self, size: int, generator: torch.Generator) -> Tensor:
        """Return numbers of `size` points of each task, drawn without replacement from those observed, with shape (T, size).

        A task with fewer points has all of them, and padding.
        """
        counts = self.counts.cpu()
        width = int(counts.max()) if len(counts) else 0
        key = torch.rand(self.num_tasks, width, generator=generator)
        key = key.masked_fill(torch.arange(width) >= counts.unsqueeze(-1), 2.0)
        return key.argsort(-1)[:, :size].to(self.device)

    def monitor(self, eps: Tensor) -> Tensor:
        """Return the quantities that tell whether chains have mixed, with shape (*S, T, q): here eps itself."""
        return eps
