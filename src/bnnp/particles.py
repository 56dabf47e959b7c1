"""Particles: draws of the weights, what each says of data, and how it is told of more.

A particle is one draw of all hidden layers. With a Gaussian likelihood its last layer is not drawn: given the hidden weights it
is a Bayesian linear regression, kept as its conditional. Everything here is in the network's units.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from bnnp.conjugate import Conditional, Sites, SiteSum, site_sum
from bnnp.layers import ACTIVATIONS, AmortisedLinear, features
from bnnp.likelihoods import Likelihood
from bnnp.linalg import to_compute
from bnnp.tasks import Context

__all__ = ["Architecture", "Particles", "drawn_log_lik"]


@dataclass(frozen=True)
class Architecture:
    """Say how activations pass from layer to layer."""

    activation: str
    residual: bool

    def layer_input(self, H: Tensor, index: int) -> Tensor:
        """Return the features A of layer `index` (from 0): [H, 1] at the input, [phi(H), 1] behind it."""
        return features(H if index == 0 else ACTIVATIONS[self.activation](H))

    def skip(self, H: Tensor, width: int) -> Tensor | None:
        """Return what a residual connection adds to a layer of this width, or None."""
        return H if self.residual and H.shape[-1] == width else None

    def hidden(self, x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        """Return H of the last hidden layer with shape (*S, *T, M, d) for weights with shape (*S, *T, d_l, p_l)."""
        H = x
        for i, W in enumerate(weights):
            skip = self.skip(H, W.shape[-2])
            H = self.layer_input(H, i) @ W.mT
            H = H if skip is None else H + skip
        return H


def drawn_log_lik(
    architecture: Architecture, likelihood: Likelihood, weights: tuple[Tensor, ...], points: Context, dtype: torch.dtype
) -> Tensor:
    """Return log p(points | f) of networks all of whose layers were drawn, with shape (S, T); points in the network's units."""
    f = to_compute(architecture.hidden(points.x, weights), dtype)
    observed = points.observed.to(f.device)
    return likelihood.log_prob(f, to_compute(points.y, f.dtype), observed).sum(-1)


@dataclass(frozen=True, eq=False)
class Particles:
    """Hold S draws from q(W | context) of T tasks, in the network's units.

    Arguments:
        architecture: how the layers are joined.
        weights: drawn weights of each layer, with shape (S, T, d_l, p_l); without the last layer where it is collapsed.
        drawn_kl: KL divergence of each particle's drawn layers, with shape (S, T).
        output: the last layer.
        last: q of the last layer given each particle's hidden weights, with batch (S, T), or None where it was drawn.
        noise_std: noise of the Gaussian likelihood with shape (d_y,), where the last layer is collapsed.
        dtype: precision of the factorisations.
        log_ratio: log q - log p of the drawn layers with shape (S, T), where draws are canonical.
        seen: the context as observations of the last layer with the likelihood's own noise: features and sites, or sums over points; None
            where `last` has seen just that and nothing else (the exact last layer), or where it was drawn.
        redraw: where the last layer was drawn by a canonical draw: its conditional and the noise z of the draw, to tell it of more data.
        log_lik: log-likelihood of the context with shape (S, T), where the last layer was drawn and the context was streamed.
    """

    architecture: Architecture
    weights: tuple[Tensor, ...]
    drawn_kl: Tensor
    output: AmortisedLinear
    last: Conditional | None
    noise_std: Tensor | None
    dtype: torch.dtype
    log_ratio: Tensor | None = None
    seen: SiteSum | tuple[Tensor, Sites] | None = None
    redraw: tuple[Conditional, Tensor] | None = None
    log_lik: Tensor | None = None

    @property
    def num_samples(self) -> int:
        """Return S."""
        return self.drawn_kl.shape[0]

    @property
    def kl(self) -> Tensor:
        """Return the KL divergence of each particle's chain, with shape (S, T)."""
        return self.drawn_kl if self.last is None else self.drawn_kl + self.last.kl

    def output_features(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the last layer's features A (S, T, M, p) and what a residual connection adds to its output."""
        hidden = self.weights if self.redraw is None else self.weights[:-1]
        H = self.architecture.hidden(x, hidden).expand(*self.drawn_kl.shape, -1, -1)
        return self.architecture.layer_input(H, len(hidden)), self.architecture.skip(H, self.output.d_out)

    def outputs(self, x: Tensor) -> Tensor:
        """Return f at x with shape (S, T, M, d_y), where every layer was drawn."""
        return self.architecture.hidden(x, self.weights)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of f at x given each particle's hidden weights, each with shape (S, T, M, d_y)."""
        assert self.last is not None
        A, skip = self.output_features(x)
        W = self.output.weights(self.last.mean)
        f = to_compute(A, self.dtype) @ to_compute(W, self.dtype).mT
        f = f if skip is None else f + to_compute(skip, self.dtype)
        return f, self.last.variance(to_compute(A, self.dtype))

    def sites(self, features: tuple[Tensor, Tensor | None], y: Tensor, root: Tensor) -> tuple[Tensor, Sites]:
        """Return the last layer's features and observations of y there, in the precision of the factorisations."""
        A, skip = features
        sites = self.output.sites(A, y if skip is None or not self.output.true_targets else y - skip, root)
        return to_compute(A, self.dtype), Sites(to_compute(sites.resid, self.dtype), to_compute(sites.root_prec, self.dtype))

    def observations(self, x: Tensor, y: Tensor, mask: Tensor) -> tuple[Tensor, Sites]:
        """Return the last layer's features at x and observations of y there, with the likelihood's own noise.

        `mask` has shape (T, M), or (T, M, d_y) where single outputs were not seen.
        """
        assert self.noise_std is not None
        seen = mask if mask.ndim == y.ndim else mask.unsqueeze(-1)
        return self.sites(self.output_features(x), y, seen / self.noise_std)

    def joint_log_lik(self, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        """Return log p(y | hidden weights, context), all points of a task together, with shape (S, T).

        The last layer is integrated out: the ratio of its evidences with and without these points.
        """
        assert self.last is not None
        return self.last.update(*self.observations(x, y, mask)).log_z - self.last.log_z

    def expected_log_lik(self, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        """Return E[sum_n log p(y_n | f(x_n))] over q of the last layer, with shape (S, T)."""
        assert self.last is not None
        return self.last.expected_log_lik(*self.observations(x, y, mask))

    def elbo(self, beta: float = 1.0) -> Tensor:
        """Return the context's expected log-likelihood minus beta times the KL divergence, of each particle, with shape (S, T).

        Where the last layer is exact and beta is 1, its share is its log evidence, which costs less than the two parts.
        """
        if self.last is None:
            assert self.log_lik is not None
            return self.log_lik - beta * self.kl
        if self.seen is None:
            log_z = self.last.log_z
            return log_z - self.drawn_kl if beta == 1.0 else log_z + (1.0 - beta) * self.last.kl - beta * self.drawn_kl
        seen = self.last.expected_log_lik_of(self.seen) if isinstance(self.seen, SiteSum) else self.last.expected_log_lik(*self.seen)
        return seen - beta * self.kl

    @property
    def evidence(self) -> Tensor:
        """Return log p(context | hidden weights) with the last layer integrated out exactly, with shape (S, T)."""
        if self.last is None:
            assert self.log_lik is not None
            return self.log_lik
        if self.seen is None:
            return self.last.log_z
        factor = self.last.factor
        return (self.seen if isinstance(self.seen, SiteSum) else site_sum(factor, *self.seen)).condition(factor).log_z

    @property
    def log_weights(self) -> Tensor:
        """Return log p(context, W) - log q(W) of each particle, with shape (S, T): its importance weight, for canonical draws."""
        assert self.log_ratio is not None
        return self.evidence - self.log_ratio

    def told(self, points: Context, pseudo: tuple[Tensor, Tensor]) -> tuple[Particles, Tensor]:
        """Return the particles whose last layer has seen further points, and log p(points | particle, what it had seen) with shape (S, T).

        The hidden weights stay as they are. Where the last layer was drawn, it is drawn again with the same noise, and the densities are
        zeros: they need the likelihood.

        Arguments:
            points: in the network's units.
            pseudo: the last layer's pseudo-observations of these points, and the square roots of their precisions.
        """
        at = self.output_features(points.x)
        if self.last is None:
            assert self.redraw is not None and self.log_ratio is not None
            q, z = self.redraw
            new = q.update(*self.sites(at, *pseudo))
            old_eps, eps = q.draw(z), new.draw(z)
            return dataclasses.replace(
                self,
                weights=(*self.weights[:-1], self.output.weights(eps)),
                drawn_kl=self.drawn_kl - q.kl + new.kl,
                log_ratio=self.log_ratio - q.log_ratio(old_eps) + new.log_ratio(eps),
                redraw=(new, z),
                log_lik=None,
            ), torch.zeros_like(self.drawn_kl)
        last = self.last.update(*self.sites(at, *pseudo))
        if self.seen is None:
            return dataclasses.replace(self, last=last), last.log_z - self.last.log_z
        assert self.noise_std is not None and isinstance(self.seen, SiteSum)
        own = self.sites(at, points.y, points.observed / self.noise_std)
        both = dataclasses.replace(self, last=last, seen=self.seen + site_sum(last.factor, *own))
        return both, both.evidence - self.evidence

    def picked(self, index: Tensor) -> Particles:
        """Return the particles of the given numbers, with shape (n, T): particle i of task t is number index[i, t]."""

        def pick(x: Tensor) -> Tensor:
            at = index.to(x.device).reshape(*index.shape, *[1] * (x.ndim - 2))
            return x.gather(0, at.expand(*index.shape, *x.shape[2:]))

        def pick_sum(sums: SiteSum) -> SiteSum:
            return SiteSum(*(pick(t) for t in sums.tensors))

        def pick_conditional(q: Conditional) -> Conditional:
            sums, B, r = None if q.sums is None else pick_sum(q.sums), *(None if t is None else pick(t) for t in (q.B, q.r))
            return Conditional(q.factor, pick(q.m), pick(q.root), pick(q.quad), pick(q.log_prec), pick(q.count), sums, B, r)

        return dataclasses.replace(
            self,
            weights=tuple(pick(W) for W in self.weights),
            drawn_kl=pick(self.drawn_kl),
            last=None if self.last is None else pick_conditional(self.last),
            log_ratio=None if self.log_ratio is None else pick(self.log_ratio),
            seen=pick_sum(self.seen) if isinstance(self.seen, SiteSum) else self.seen,
            redraw=None if self.redraw is None else (pick_conditional(self.redraw[0]), pick(self.redraw[1])),
            log_lik=None if self.log_lik is None else pick(self.log_lik),
        )
