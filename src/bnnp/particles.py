"""Particles: draws of the weights, what each says of data, and how it is told of more.

A particle is one draw of all hidden layers. With a Gaussian likelihood its last layer is not drawn: given the hidden weights it
is a Bayesian linear regression, kept as its conditional. Everything here is in the network's units.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bnnp.conjugate import Conditional, SiteSum, site_sum
from bnnp.factors import Given, Sites
from bnnp.layers import ACTIVATIONS, features
from bnnp.likelihoods import Likelihood, noise_factor, noise_of
from bnnp.linalg import cholesky, lower_inverse, to_compute
from bnnp.tasks import Context

__all__ = ["Architecture", "Particles", "drawn_log_lik", "joined", "own_noise"]


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


Pseudo = Callable[[Context, Tensor], tuple[Tensor, Tensor, Tensor | None]]


def own_noise(likelihood: Likelihood, observed: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the square roots of the precisions of observations of y with the likelihood's own noise, and what makes it independent.

    Noise that is correlated between outputs, Sigma, is made so by T with T Sigma T^T = I: T y has unit precision. Its diagonal is taken
    for the roots, so that log |Sigma^{-1}| is in them, and the rest, with a diagonal of ones, is returned to rotate outputs with.

    Arguments:
        likelihood: a conjugate one.
        observed: True = observed, with shape (T, N), or (T, N, d_y) where outputs may be missing.
    """
    seen = observed if observed.ndim == 3 else observed.unsqueeze(-1)
    factor = noise_factor(likelihood)
    if factor is None:
        noise = noise_of(likelihood)
        assert noise is not None
        return seen / noise, None
    T = _whitener(factor @ factor.mT, seen.expand(*seen.shape[:-1], len(factor)) if seen.shape[-1] > 1 else None)
    diagonal = T.diagonal(dim1=-2, dim2=-1)
    return seen * diagonal, T / diagonal.unsqueeze(-1)


def _whitener(covariance: Tensor, seen: Tensor | None) -> Tensor:
    """Return lower triangular T with T Sigma T^T = I, of the outputs that were seen; the others stand alone."""
    if seen is not None:
        eye = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
        covariance = torch.where(seen.unsqueeze(-1) & seen.unsqueeze(-2), covariance, eye)
    return lower_inverse(cholesky(covariance))


@dataclass(frozen=True, eq=False)
class Particles:
    """Hold S draws from q(W | context) of T tasks, in the network's units.

    Arguments:
        architecture: how the layers are joined.
        weights: drawn weights of each layer, with shape (S, T, d_l, p_l); without the last layer where it is collapsed.
        drawn_kl: KL divergence of each particle's drawn layers, with shape (S, T).
        given: the last layer's prior given each particle's hidden weights.
        likelihood: from f to y.
        last: q of the last layer given each particle's hidden weights, with batch (S, T), or None where it was drawn.
        dtype: precision of the factorisations.
        log_ratio: log q - log p of the drawn layers with shape (S, T), where draws are canonical.
        seen: the context as observations of the last layer with the likelihood's own noise: features and sites, or sums over points; None
            where `last` has seen just that and nothing else (the exact last layer), or where it was drawn.
        redraw: where the last layer was drawn by a canonical draw: its conditional and the noise z of the draw, to tell it of more data.
        log_lik: log-likelihood of the context with shape (S, T), where the last layer was drawn and the context was streamed.
        share: where particles are of several components of the prior, log weights whose exponentials have mean 1, with shape (S, T); then
            `drawn_kl` and `log_ratio` have the component's share in them.
        known_at: where weights were too large to be kept, the inputs (T, M, d_x) at which the last hidden activations are known, and these,
            with shape (S, T, M, d).
    """

    architecture: Architecture
    weights: tuple[Tensor, ...]
    drawn_kl: Tensor
    given: Given
    likelihood: Likelihood
    last: Conditional | None
    dtype: torch.dtype
    log_ratio: Tensor | None = None
    seen: SiteSum | tuple[Tensor, Sites] | None = None
    redraw: tuple[Conditional, Tensor] | None = None
    log_lik: Tensor | None = None
    share: Tensor | None = None
    known_at: tuple[Tensor, Tensor] | None = None

    @property
    def noise_std(self) -> Tensor | None:
        """Return the noise of a Gaussian likelihood, in the network's units."""
        return noise_of(self.likelihood)

    @property
    def true_targets(self) -> bool:
        """Return whether the last layer's observations are those of y itself."""
        return self.likelihood.conjugate

    @property
    def coupled(self) -> bool:
        """Return whether the outputs of a point depend on each other given the particle."""
        return self.last is not None and (self.given.joint or noise_factor(self.likelihood) is not None)

    def mean(self, each: Tensor) -> Tensor:
        """Return the mean over particles, weighted where they are, of what each says, with shape (S, T): shape (T,)."""
        return (each if self.share is None else each * self.share.exp()).mean(0)

    def log_mean_exp(self, each: Tensor) -> Tensor:
        """Return the log of the mean over particles, weighted where they are, of exp(each), each with shape (S, T): shape (T,)."""
        return (each if self.share is None else each + self.share).logsumexp(0) - math.log(self.num_samples)

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
        if self.known_at is not None:
            assert x is self.known_at[0], "particles without weights were asked about other inputs than they were drawn for"
            return self.architecture.layer_input(self.known_at[1], 1), self.architecture.skip(self.known_at[1], self.given.d_out)
        hidden = self.weights if self.redraw is None else self.weights[:-1]
        H = self.architecture.hidden(x, hidden).expand(*self.drawn_kl.shape, -1, -1)
        return self.architecture.layer_input(H, len(hidden)), self.architecture.skip(H, self.given.d_out)

    def outputs(self, x: Tensor) -> Tensor:
        """Return f at x with shape (S, T, M, d_y), where every layer was drawn."""
        return self.architecture.hidden(x, self.weights)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of f at x given each particle's hidden weights, each with shape (S, T, M, d_y)."""
        assert self.last is not None
        A, skip = self.output_features(x)
        f = to_compute(A, self.dtype) @ to_compute(self.given.weights(self.last.mean), self.dtype).mT
        f = f if skip is None else f + to_compute(skip, self.dtype)
        variance = self.last.variance(self.given.rows(to_compute(A, self.dtype)))
        return f, variance.reshape(f.shape) if self.given.joint else variance

    def covariance(self, x: Tensor) -> Tensor:
        """Return the covariances of the outputs of each point given each particle's hidden weights, with shape (S, T, M, d_y, d_y)."""
        assert self.last is not None
        rows = self.given.rows(to_compute(self.output_features(x)[0], self.dtype))
        if self.given.joint:
            return self.last.group_covariance(rows, self.given.d_out)
        return torch.diag_embed(self.last.variance(rows))

    def sites(self, features: tuple[Tensor, Tensor | None], y: Tensor, root: Tensor, rotate: Tensor | None = None) -> tuple[Tensor, Sites]:
        """Return the last layer's problem with observations of y at these features, in the precision of the factorisations."""
        A, skip = features
        sites = self.given.sites(A, y if skip is None or not self.true_targets else y - skip, root)
        rotate = None if rotate is None else to_compute(rotate, self.dtype)
        return self.given.problem(to_compute(A, self.dtype), sites.to(self.dtype), rotate)

    def observations(self, x: Tensor, y: Tensor, mask: Tensor) -> tuple[Tensor, Sites]:
        """Return the last layer's problem with observations of y at x, with the likelihood's own noise."""
        return self.sites(self.output_features(x), y, *own_noise(self.likelihood, mask))

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

    def told(self, points: Context, pseudo: Pseudo) -> tuple[Particles, Tensor]:
        """Return the particles whose last layer has seen further points, and log p(points | particle, what it had seen) with shape (S, T).

        The hidden weights stay as they are. Where the last layer was drawn, it is drawn again with the same noise, and the densities are
        zeros: they need the likelihood.

        Arguments:
            points: in the network's units.
            pseudo: gives the last layer's pseudo-observations of these points, from its features there; see `BNNP.output_sites`.
        """
        at = self.output_features(points.x)
        found = pseudo(points, at[0])
        if self.last is None:
            assert self.redraw is not None and self.log_ratio is not None
            q, z = self.redraw
            new = q.update(*self.sites(at, *found))
            old_eps, eps = q.draw(z), new.draw(z)
            return dataclasses.replace(
                self,
                weights=(*self.weights[:-1], self.given.weights(eps)),
                drawn_kl=self.drawn_kl - q.kl + new.kl,
                log_ratio=self.log_ratio - q.log_ratio(old_eps) + new.log_ratio(eps),
                redraw=(new, z),
                log_lik=None,
            ), torch.zeros_like(self.drawn_kl)
        last = self.last.update(*self.sites(at, *found))
        if self.seen is None:
            return dataclasses.replace(self, last=last), last.log_z - self.last.log_z
        assert isinstance(self.seen, SiteSum)
        own = self.sites(at, points.y, *own_noise(self.likelihood, points.observed))
        both = dataclasses.replace(self, last=last, seen=self.seen + site_sum(last.factor, *own))
        return both, both.evidence - self.evidence

    def picked(self, index: Tensor) -> Particles:
        """Return the particles of the given numbers, with shape (n, T): particle i of task t is number index[i, t]."""

        def pick(x: Tensor) -> Tensor:
            at = index.to(x.device).reshape(*index.shape, *[1] * (x.ndim - 2))
            return x.gather(0, at.expand(*index.shape, *x.shape[2:]))

        def pick_sum(sums: SiteSum) -> SiteSum:
            return SiteSum(*(pick(t) for t in sums.tensors))

        given = self.given.picked(pick)

        def pick_conditional(q: Conditional) -> Conditional:
            sums, B, r = None if q.sums is None else pick_sum(q.sums), *(None if t is None else pick(t) for t in (q.B, q.r))
            factor = q.factor.rebuild(*(pick(t) for t in q.factor.tensors)) if q.factor.batched else q.factor
            return Conditional(factor, pick(q.m), pick(q.root), pick(q.quad), pick(q.log_prec), pick(q.count), sums, B, r)

        return dataclasses.replace(
            self,
            weights=tuple(pick(W) for W in self.weights),
            drawn_kl=pick(self.drawn_kl),
            given=given,
            last=None if self.last is None else pick_conditional(self.last),
            log_ratio=None if self.log_ratio is None else pick(self.log_ratio),
            seen=pick_sum(self.seen) if isinstance(self.seen, SiteSum) else self.seen,
            redraw=None if self.redraw is None else (pick_conditional(self.redraw[0]), pick(self.redraw[1])),
            log_lik=None if self.log_lik is None else pick(self.log_lik),
            share=None if self.share is None else pick(self.share),
        )


def joined(parts: Sequence[Particles], log_share: Tensor) -> Particles:
    """Return the particles of all components of a mixture as one set, each with its share.

    Component k has share pi_k and n_k of S particles. Its responsibility is q_k, in proportion to pi_k times the exponential of the mean
    bound of its particles (where the bound is tight, its evidence), and each of its particles weighs q_k / n_k. The divergence of the
    components, log q_k / pi_k, goes into that of the particles, and log (n_k / S) / pi_k into their importance. With few particles the sum
    of the exponentials of noisy bounds is above that of the bounds, as in every estimate of this kind.

    Arguments:
        parts: particles of each component; their numbers differ by one at most, the larger first.
        log_share: log pi with shape (K,).
    """
    counts = torch.tensor([part.num_samples for part in parts])
    S, reach = int(counts.sum()), torch.cat([torch.arange(n) * len(parts) + k for k, n in enumerate(counts.tolist())]).argsort()
    log_share = log_share.to(parts[0].drawn_kl)
    bounds = torch.stack([part.elbo().mean(0) for part in parts])  # (K, T)
    responsible = (log_share.unsqueeze(-1) + bounds).log_softmax(0)
    log_fraction = (counts.double() / S).log().to(log_share)

    def cat(pieces: Sequence[Tensor]) -> Tensor:
        whole = torch.cat([t.expand(part.num_samples, *t.shape[1:]) for t, part in zip(pieces, parts, strict=True)])
        return whole[reach.to(whole.device)]

    def per_task(value: Tensor) -> Tensor:
        return cat([v.expand(1, bounds.shape[1]) for v in value])

    def cat_sum(sums: Sequence[SiteSum]) -> SiteSum:
        return SiteSum(*(cat(pieces) for pieces in zip(*(one.tensors for one in sums), strict=True)))

    def cat_conditional(qs: Sequence[Conditional]) -> Conditional:
        def batch(t: Tensor) -> Tensor:
            return t.expand(1, bounds.shape[1], *t.shape)

        factor = qs[0].factor.rebuild(*(cat([batch(t) for t in pieces]) for pieces in zip(*(q.factor.tensors for q in qs), strict=True)))
        names = [name for name in ("m", "root", "quad", "log_prec", "count", "B", "r") if getattr(qs[0], name) is not None]
        sums = None if qs[0].sums is None else cat_sum([q.sums for q in qs if q.sums is not None])
        return dataclasses.replace(qs[0], factor=factor, sums=sums, **{name: cat([getattr(q, name) for q in qs]) for name in names})

    def optional(name: str) -> Tensor | None:
        return None if getattr(parts[0], name) is None else cat([getattr(part, name) for part in parts])

    first = parts[0]
    share, tilt = per_task(responsible - log_fraction.unsqueeze(-1)), per_task((log_share - log_fraction).unsqueeze(-1))
    ratio, lasts = optional("log_ratio"), [part.last for part in parts if part.last is not None]
    redraws = [part.redraw for part in parts if part.redraw is not None]
    sums = [part.seen for part in parts if isinstance(part.seen, SiteSum)]
    pairs = [part.seen for part in parts if isinstance(part.seen, tuple)]
    seen: SiteSum | tuple[Tensor, Sites] | None = cat_sum(sums) if sums else None
    if pairs:
        A, resid, root = (cat(pieces) for pieces in zip(*((A, s.resid, s.root_prec) for A, s in pairs), strict=True))
        seen = A, Sites(resid, root)
    return dataclasses.replace(
        first,
        weights=tuple(cat(pieces) for pieces in zip(*(part.weights for part in parts), strict=True)),
        drawn_kl=cat([part.drawn_kl for part in parts]) + share - tilt,
        given=Given.stacked([part.given for part in parts], cat, bounds.shape[1]),
        last=cat_conditional(lasts) if lasts else None,
        log_ratio=None if ratio is None else ratio - tilt,
        seen=seen,
        redraw=(cat_conditional([q for q, _ in redraws]), cat([z for _, z in redraws])) if redraws else None,
        log_lik=optional("log_lik"),
        share=share,
        known_at=None if first.known_at is None else (first.known_at[0], cat([p.known_at[1] for p in parts if p.known_at is not None])),
    )
