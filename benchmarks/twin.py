"""The naive twin: one training step and one prediction, computed the way the paper's public code computes them.

A speed-up means nothing without saying what it is measured against, and numbers from another machine or another day do
not compare. This module is the other side of every ratio in `benchmarks.step`: the same model (a Gaussian prior per
unit, one inference network per layer, true targets and predicted noise at the last layer) and the same objective,
written in plain weight space with torch.distributions and no use of structure. It needs torch and nothing else.

What it does as the public code does: a Python loop over tasks; inside a task everything batched over samples and units;
float64; the first layer repeated for every sample; a dense N x N noise precision for every unit; the prior's covariance
inverted for every task; explicit inverses; `MultivariateNormal` with its default argument checks; the last layer
sampled.

Two styles, so that the ratio can be read against either:

- "published": the inverse is a Cholesky factor followed by `cholesky_inverse`; the layer's prior is built a second
  time for the KL; the product of features and noise precision is formed twice.
- "lean": the inverse is `torch.linalg.inv` (its backward is several times cheaper); prior and product are formed once.

Left out of both, since it costs little and changes the answer: the jitter of 1e-5 that the public code adds before each
inverse.

References:
    "Amortising Inference and Meta-Learning Priors in Neural Networks", Rochussen and Fortuin, 2026.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, kl_divergence

__all__ = ["Style", "TaskTensors", "Twin", "TwinLayer"]

Style = Literal["published", "lean"]
TaskTensors = tuple[Tensor, Tensor, Tensor, Tensor]


def _cholesky_inverse(M: Tensor) -> Tensor:
    factor, _ = torch.linalg.cholesky_ex(M)
    inverse: Tensor = torch.cholesky_inverse(factor)
    return inverse


def _with_bias(h: Tensor) -> Tensor:
    return torch.cat((h, torch.ones_like(h[..., :1])), dim=-1)


def _log_normal(y: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return -0.5 * ((y - mean) / std) ** 2 - std.log() - 0.5 * math.log(2.0 * math.pi)


def _network(widths: Sequence[int]) -> nn.Sequential:
    """Return a ReLU network in float64 with the given widths, linear at the end."""
    parts: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(widths)):
        parts += [nn.ReLU()] if i > 0 else []
        parts.append(nn.Linear(a, b, dtype=torch.float64))
    return nn.Sequential(*parts)


class TwinLayer(nn.Module):
    """Hold the prior per unit and the inference network of one layer.

    Arguments:
        datum_dim: d_x + d_y, the width of one datum [x, y].
        d_in: width of the layer's input, without the bias.
        d_out: number of units.
        hidden: hidden widths of the inference network.
        last: take the true targets as pseudo-targets and predict their noise only.
        style: see the module.
    """

    def __init__(
        self,
        datum_dim: int,
        d_in: int,
        d_out: int,
        hidden: Sequence[int],
        last: bool = False,
        style: Style = "published",
    ) -> None:
        super().__init__()
        p = d_in + 1
        self.mean = nn.Parameter(torch.zeros(d_out, p, dtype=torch.float64))
        self.log_diagonal = nn.Parameter(torch.full((d_out, p), -0.5 * math.log(p), dtype=torch.float64))
        self.strict_lower = nn.Parameter(torch.zeros(d_out, p, p, dtype=torch.float64))
        self.net = _network([datum_dim, *hidden, d_out if last else 2 * d_out])
        self.last = last
        self.style = style

    def prior(self) -> MultivariateNormal:
        """Return N(mean, L L^T), one Gaussian for each unit, batch shape (d_out,)."""
        factor = torch.diag_embed(self.log_diagonal.exp()) + self.strict_lower.tril(diagonal=-1)
        return MultivariateNormal(self.mean, covariance_matrix=factor @ factor.mT)

    def pseudo_observations(self, xc: Tensor, yc: Tensor) -> tuple[Tensor, Tensor]:
        """Return pseudo-targets and their noise precision, each with shape (N, d_out)."""
        out: Tensor = self.net(torch.cat((xc, yc), dim=-1))
        if self.last:
            pseudo_y, raw = yc, out
        else:
            pseudo_y, raw = out.chunk(2, dim=-1)
        # 1e-6 bounds the precision at 1e6, as the specification asks.
        return pseudo_y, 1.0 / ((2.0 * (raw - 2.0)).exp() + 1e-6)

    def posterior(self, A: Tensor, xc: Tensor, yc: Tensor, prior: MultivariateNormal) -> MultivariateNormal:
        """Return q(W | earlier weights, context), batch shape (S, d_out).

        precision = Sigma^{-1} + A^T Lambda A, mean = precision^{-1} (Sigma^{-1} mu + A^T Lambda y~).

        Arguments:
            A: features with bias, with shape (S, N, p).
            xc: context inputs with shape (N, d_x).
            yc: context outputs with shape (N, d_y).
            prior: what `prior` returns.
        """
        published = self.style == "published"
        inverse = _cholesky_inverse if published else torch.linalg.inv
        pseudo_y, pseudo_prec = self.pseudo_observations(xc, yc)
        noise_precision = torch.diag_embed(pseudo_prec.mT)  # (d_out, N, N), dense on purpose
        prior_precision = inverse(prior.covariance_matrix)
        A = A.unsqueeze(1)  # (S, 1, N, p)
        weighted = A.mT @ noise_precision  # (S, d_out, p, N)
        covariance = inverse(prior_precision + weighted @ A)
        if published:
            weighted = A.mT @ noise_precision
        linear = prior_precision @ prior.mean.unsqueeze(-1) + weighted @ pseudo_y.mT.unsqueeze(-1)
        return MultivariateNormal((covariance @ linear).squeeze(-1), covariance_matrix=covariance)


class Twin(nn.Module):
    """Compute the paper's model for one task after another.

    Arguments:
        x_dim: width of the inputs.
        y_dim: width of the outputs.
        hidden: hidden widths, of the network and of every inference network.
        style: "published" (as the public code) or "lean", see the module.
        noise_std: starting value of the learned observation noise, one per output.
        net_hidden: hidden widths of the inference networks where these are others.

    Example:
        >>> twin = Twin(1, 1, (4,))
        >>> twin.predict(torch.zeros(3, 1).double(), torch.zeros(3, 1).double(), torch.zeros(5, 1).double(), 2).shape
        torch.Size([2, 5, 1])
    """

    def __init__(
        self,
        x_dim: int,
        y_dim: int,
        hidden: Sequence[int],
        style: Style = "published",
        noise_std: float = 0.1,
        net_hidden: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        widths, nets = [x_dim, *hidden, y_dim], hidden if net_hidden is None else net_hidden
        final = len(widths) - 2
        self.layers = nn.ModuleList(
            TwinLayer(x_dim + y_dim, widths[i], widths[i + 1], nets, last=i == final, style=style) for i in range(final + 1)
        )
        self.log_noise = nn.Parameter(torch.full((y_dim,), math.log(noise_std), dtype=torch.float64))

    def propagate(self, xc: Tensor, yc: Tensor, xt: Tensor, num_samples: int, with_kl: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Sample layer after layer and return outputs at the context, at the targets, and the KL of the chain.

        Arguments:
            xc: context inputs with shape (N, d_x).
            yc: context outputs with shape (N, d_y).
            xt: target inputs with shape (M, d_x).
            num_samples: S; the first layer's posterior too is computed S times.
            with_kl: compute KL(q || p), averaged over samples; otherwise return zero.

        Returns:
            Outputs with shape (S, N, d_y) and (S, M, d_y), and a scalar.
        """
        hc, ht = xc.unsqueeze(0).repeat(num_samples, 1, 1), xt.unsqueeze(0).repeat(num_samples, 1, 1)
        kl = torch.zeros((), dtype=xc.dtype)
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, TwinLayer)
            Ac, At = (_with_bias(h if i == 0 else h.relu()) for h in (hc, ht))
            prior = layer.prior()
            q = layer.posterior(Ac, xc, yc, prior)
            W: Tensor = q.rsample()
            hc, ht = Ac @ W.mT, At @ W.mT
            if with_kl:
                prior = layer.prior() if layer.style == "published" else prior
                kl = kl + kl_divergence(q, prior).mean(0).sum()
        return hc, ht, kl

    def task_objective(self, task: TaskTensors, num_samples: int) -> Tensor:
        """Return the PP-AVI objective of one task with beta = 1.

        log 1/S sum_s prod_n p(y_n^t | f_s) + 1/S sum_s sum_n log p(y_n^c | f_s) - KL.
        """
        xc, yc, xt, yt = task
        fc, ft, kl = self.propagate(xc, yc, xt, num_samples)
        noise_std = self.log_noise.exp()
        target = _log_normal(yt, ft, noise_std).sum((-2, -1)).logsumexp(0) - math.log(num_samples)
        context = _log_normal(yc, fc, noise_std).mean(0).sum()
        return target + context - kl

    def step(self, tasks: Sequence[TaskTensors], num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Return the loss of one training step, the mean over tasks of minus the objective.

        Arguments:
            tasks: tuples (xc, yc, xt, yt) with shapes (N, d_x), (N, d_y), (M, d_x), (M, d_y).
            num_samples: S.
            generator: draws the seed; `MultivariateNormal` knows only the global generator, put back afterwards.
        """
        with _seeded(generator):
            total = torch.zeros((), dtype=torch.float64)
            for task in tasks:
                total = total - self.task_objective(task, num_samples)
        return total / len(tasks)

    @torch.no_grad()
    def predict(self, xc: Tensor, yc: Tensor, xt: Tensor, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Return noise-free function values of S posterior samples with shape (S, M, d_y)."""
        with _seeded(generator):
            return self.propagate(xc, yc, xt, num_samples, with_kl=False)[1]


class _seeded:
    """Fork the global CPU generator and, with a generator given, seed the fork from it."""

    def __init__(self, generator: torch.Generator | None) -> None:
        self.generator = generator
        self.fork = torch.random.fork_rng(devices=[])

    def __enter__(self) -> None:
        self.fork.__enter__()
        if self.generator is not None:
            torch.manual_seed(int(torch.randint(2**62, (), generator=self.generator)))

    def __exit__(self, *error: object) -> None:
        self.fork.__exit__(None, None, None)
