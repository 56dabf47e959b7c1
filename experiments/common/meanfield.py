"""The task-blind rival: a Bayesian network of the same size, learned by mean-field variational inference.

Its prior is not learned, N(0, 1/p) as usual. It is trained either on all points of all training tasks, and then predicts the same function
for each task, or on the context of each task anew (`FittedNetwork`, all tasks of a batch at once). The noise is learned.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnnp.layers import ACTIVATIONS
from bnnp.mixtures import crps_gaussian_mixture, mixture_cdf
from bnnp.seeds import seeded

__all__ = ["Answer", "FittedNetwork", "Network", "Recipe", "train"]

LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True)
class Recipe:
    """Say what the network is and how long it learns.

    Arguments:
        hidden: widths.
        activation: as in `BNNP`.
        input_scale: the first layer's prior standard deviations are this many times larger.
        steps: of Adam.
        learning_rate: of the first step; it falls to a hundredth.
        batch: points of a step, for each task.
        noise_std: where the learned noise starts, in standard deviations of y.
    """

    hidden: tuple[int, ...]
    activation: str
    input_scale: float = 1.0
    steps: int = 2000
    learning_rate: float = 1e-2
    batch: int = 500
    noise_std: float = 0.3


class Network:
    """Hold q(W) = prod N(w; m, s^2) for T networks at once: tensors (T, d_out, p) with the bias last, in standardised units.

    Arguments:
        recipe: of the network.
        x_dim: d_x.
        tasks: T.
        scaling: centre and spread of x (d_x,) and of y (1,).
        seed: of the start.
    """

    def __init__(self, recipe: Recipe, x_dim: int, tasks: int, scaling: Sequence[Tensor], seed: int) -> None:
        self.recipe, self.scaling = recipe, tuple(scaling)
        widths, generator = (x_dim, *recipe.hidden, 1), seeded(seed, "mean field")
        self.prior = [(recipe.input_scale if i == 0 else 1.0) / math.sqrt(d + 1) for i, d in enumerate(widths[:-1])]
        shapes = [(tasks, out, d + 1) for d, out in itertools.pairwise(widths)]
        # Means as wide as the prior and small deviations: with deviations of the prior, learning starts from noise.
        self.mean = [s * torch.randn(shape, generator=generator) for s, shape in zip(self.prior, shapes, strict=True)]
        self.log_std = [torch.full(shape, math.log(0.05 * s)) for s, shape in zip(self.prior, shapes, strict=True)]
        self.log_noise = torch.full((tasks, 1, 1), math.log(recipe.noise_std))

    @property
    def parameters(self) -> list[Tensor]:
        """Return everything that is learned."""
        return [*self.mean, *self.log_std, self.log_noise]

    def kl(self) -> Tensor:
        """Return KL(q || p) of each network, with shape (T,)."""
        total = torch.zeros(len(self.log_noise))
        for m, log_s, prior in zip(self.mean, self.log_std, self.prior, strict=True):
            ratio = (2 * (log_s - math.log(prior))).exp()
            total = total + 0.5 * (ratio + (m / prior).square() - 1 - ratio.log()).sum((-1, -2))
        return total

    def locally(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return a draw of f (T, N, 1), independent between points given their means: enough for sums over points, with less variance."""
        h, phi = x, ACTIVATIONS[self.recipe.activation]
        for i, (m, log_s) in enumerate(zip(self.mean, self.log_std, strict=True)):
            A = torch.cat([h if i == 0 else phi(h), torch.ones_like(h[..., :1])], -1)
            variance = A.square() @ (2 * log_s).exp().mT
            h = A @ m.mT + (variance + 1e-12).sqrt() * torch.randn(variance.shape, generator=generator)
        return h

    def functions(self, x: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Return `count` coherent draws of f at standardised x (T, N, d_x), with shape (count, T, N, 1)."""
        h, phi = x.unsqueeze(0), ACTIVATIONS[self.recipe.activation]
        for i, (m, log_s) in enumerate(zip(self.mean, self.log_std, strict=True)):
            W = m + log_s.exp() * torch.randn((count, *m.shape), generator=generator)
            A = torch.cat([h if i == 0 else phi(h), torch.ones_like(h[..., :1])], -1)
            h = A @ W.mT
        return h

    def condition(self, xc: Tensor, yc: Tensor, mask: Tensor | None = None, num_samples: int = 64, seed: int = 0) -> Answer:
        """Return the same answer for every context: the network is blind to tasks."""
        return Answer(self, num_samples, seed)


@dataclass(frozen=True)
class Answer:
    """Hold networks that are ready to predict."""

    network: Network
    num_samples: int
    seed: int

    @torch.no_grad()
    def predict(self, xt: Tensor) -> Mixture:
        """Return the prediction at xt with shape (T, M, d_x)."""
        x_mean, x_std, y_mean, y_std = self.network.scaling
        f = self.network.functions(((xt - x_mean) / x_std).float(), self.num_samples, seeded(self.seed, "mean field draws"))
        noise = (self.network.log_noise.exp() * y_std).expand(f.shape[1:])
        return Mixture((f * y_std + y_mean).double(), noise.double())


@dataclass(frozen=True)
class Mixture:
    """Be an equal mixture over S functions, with shape (S, T, M, 1), and noise (T, M, 1)."""

    f: Tensor
    noise: Tensor

    @property
    def mean(self) -> Tensor:
        """Return the mean with shape (T, M, 1)."""
        return self.f.mean(0)

    @property
    def std(self) -> Tensor:
        """Return the standard deviation with noise, with shape (T, M, 1)."""
        return (self.f.var(0, correction=0) + self.noise**2).sqrt()

    @property
    def _weights(self) -> Tensor:
        return torch.full((len(self.f), 1, 1, 1), 1 / len(self.f), dtype=self.f.dtype)

    def log_prob(self, yt: Tensor, joint: bool = False, mask: Tensor | None = None) -> Tensor:
        """Return log densities of each point (T, M), or of all observed points of a task together (T,)."""
        each = -0.5 * (((yt - self.f) / self.noise).square() + LOG_2PI) - self.noise.log()
        each = each.squeeze(-1) * (1 if mask is None else mask.to(each))
        return (each.sum(-1) if joint else each).logsumexp(0) - math.log(len(each))

    def cdf(self, yt: Tensor) -> Tensor:
        """Return P(Y <= yt) with shape (T, M, 1)."""
        return mixture_cdf(yt.double(), self.f, self.noise.expand_as(self.f), self._weights)

    def crps(self, yt: Tensor) -> Tensor:
        """Return the continuous ranked probability score with shape (T, M, 1)."""
        return crps_gaussian_mixture(self.f, self.noise.expand_as(self.f), yt.double())

    def sample(self, n: int, noisy: bool = True, seed: int = 0) -> Tensor:
        """Return draws with shape (n, T, M, 1); draw i is from function i mod S."""
        f = self.f[torch.arange(n) % len(self.f)]
        return f + self.noise * torch.randn(f.shape, generator=seeded(seed, "noise"), dtype=f.dtype) if noisy else f


def train(recipe: Recipe, x: Tensor, y: Tensor, mask: Tensor | None = None, scaling: Any = None, seed: int = 0) -> Network:
    """Return T networks that maximise E_q[log p(y | f(x))] - KL(q || p), each for its own points.

    Arguments:
        recipe: of the network.
        x: inputs with shape (T, N, d_x).
        y: outputs with shape (T, N, 1).
        mask: True where a point is there, with shape (T, N).
        scaling: centre and spread of x and y; of these points where not given.
        seed: of start, batches and draws.
    """
    if scaling is None:
        flat = x.flatten(0, 1), y.flatten(0, 1)
        scaling = tuple(value.float() for part in flat for value in (part.mean(0), part.std(0)))
    x_mean, x_std, y_mean, y_std = scaling
    x, y = ((x - x_mean) / x_std).float(), ((y - y_mean) / y_std).float()
    there = torch.ones(x.shape[:2]) if mask is None else mask.float()
    network, generator = Network(recipe, x.shape[-1], len(x), scaling, seed), seeded(seed, "mean field steps")
    for parameter in network.parameters:
        parameter.requires_grad_(True)
    optimiser, total = torch.optim.Adam(network.parameters, lr=recipe.learning_rate), there.sum(-1)
    for step in range(recipe.steps):
        for group in optimiser.param_groups:
            group["lr"] = recipe.learning_rate * (1 - 0.99 * step / max(recipe.steps - 1, 1))
        at = torch.randint(x.shape[1], (recipe.batch,), generator=generator) if recipe.batch < x.shape[1] else slice(None)
        w = there[:, at]
        f = network.locally(x[:, at], generator)
        each = -0.5 * (((y[:, at] - f) / network.log_noise.exp()).square() + LOG_2PI) - network.log_noise
        ell = (each.squeeze(-1) * w).sum(-1) * total / w.sum(-1).clamp_min(1)
        loss = ((network.kl() - ell) / total.clamp_min(1)).sum()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    for parameter in network.parameters:
        parameter.requires_grad_(False)
    return network


@dataclass(frozen=True)
class FittedNetwork:
    """Train the network on the context of each task anew.

    Arguments:
        recipe: of the network.
        scaling: centre and spread of x and y, of the training tasks: a few points do not give them.
    """

    recipe: Recipe
    scaling: tuple[Tensor, Tensor, Tensor, Tensor]

    def condition(self, xc: Tensor, yc: Tensor, mask: Tensor | None = None, num_samples: int = 64, seed: int = 0) -> Answer:
        """Return networks learned from each of the contexts (T, N, d_x)."""
        with torch.enable_grad():
            network = train(self.recipe, xc, yc, mask, self.scaling, seed)
        return Answer(network, num_samples, seed)
