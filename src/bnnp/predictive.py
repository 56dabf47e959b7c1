"""What a posterior says of y at given inputs: densities, quantiles, moments and draws, in the user's units.

Memory is bounded where a batch size is given: the networks are then run over blocks of points, again for each question, and nothing of the
size samples x points x width outlives a block. Densities of many targets together go through sums over points, never through a matrix of
points by points.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from bnnp.conjugate import site_sum
from bnnp.likelihoods import Likelihood
from bnnp.linalg import to_compute
from bnnp.mixtures import crps_gaussian_mixture, mixture_cdf, mixture_moments, mixture_quantile
from bnnp.particles import Particles
from bnnp.scaling import Reference, Standardiser
from bnnp.seeds import check_count, seeded
from bnnp.tasks import Context, make_context

__all__ = ["GaussianPredictive", "Predictive", "SampledPredictive"]


class Source(Protocol):
    """What a predictive asks of a posterior."""

    @property
    def particles(self) -> Particles:
        """Return the particles."""
        ...

    @property
    def y_dim(self) -> int:
        """Return d_y."""
        ...

    @property
    def single(self) -> bool:
        """Return whether one task came without a task axis."""
        ...

    @property
    def scaling(self) -> Standardiser:
        """Return the normaliser."""
        ...

    @property
    def likelihood(self) -> Likelihood:
        """Return the likelihood."""
        ...

    @property
    def reference(self) -> Reference:
        """Return where the inputs of meta-training lay."""
        ...

    def draws(self, n: int, generator: torch.Generator, log_weights: Tensor) -> tuple[Tensor, ...]:
        """Return n draws of all layers."""
        ...


class Predictive(ABC):
    """Be the predictive distribution of T tasks at M points, in the user's units.

    It is a mixture over the particles, weighted where the posterior has weights. Where one task came without a task axis, results
    have none either. Shapes below are for a batch of tasks.
    """

    discrete: bool = False

    def __init__(self, posterior: Source, x: Tensor, log_weights: Tensor, batch_size: int) -> None:
        self._posterior, self._x, self._batch = posterior, x, batch_size
        self._log_w = log_weights
        self._w = log_weights.exp()[..., None, None]
        self._kept: tuple[Tensor, ...] | None = None

    @property
    def is_discrete(self) -> bool:
        """Return whether y takes separate values, so that densities are probabilities."""
        return self.discrete

    @abstractmethod
    def _components(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return what each particle says at x in the network's units, each with shape (S, T, M, d_y)."""

    def _blocks(self, *at: Tensor) -> Iterator[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
        """Yield the components at each block of points, and the same points of `at`, each with shape (T, M, ...)."""
        M = self._x.shape[-2]
        for i in range(0, max(M, 1), self._batch):
            cut = tuple(a[:, i : i + self._batch] for a in at)
            if self._kept is None or M > self._batch:
                found = self._components(self._posterior.scaling.x(self._x[:, i : i + self._batch]))
                self._kept = found if M <= self._batch else None
            else:
                found = self._kept
            yield found, cut

    def _over_points(self, function: Callable[..., Tensor], *at: Tensor, axis: int = 1) -> Tensor:
        """Apply a function of the components and of `at` to each block of points and join the results."""
        return torch.cat([function(*found, *cut) for found, cut in self._blocks(*at)], dim=axis)

    def _out(self, value: Tensor, task_axis: int = 0) -> Tensor:
        """Give the user one of our float64 results: his dtype, his device, his axes."""
        value = value.to(self._x.dtype).to(self._x.device)
        return value.squeeze(task_axis) if self._posterior.single else value

    def _targets(self, yt: Any, mask: Any) -> Context:
        x = self._x.squeeze(0) if self._posterior.single else self._x
        y_dim = self._posterior.y_dim
        context, _ = make_context(x, yt, mask, x_dim=x.shape[-1], y_dim=y_dim, dtype=x.dtype, device=x.device, name="t")
        self._posterior.likelihood.check(context.y)
        return context

    def _scaled(self, yt: Any, mask: Any) -> tuple[Context, Tensor]:
        """Return checked targets, and their y in the network's units and the precision of the factorisations."""
        target = self._targets(yt, mask)
        return target, to_compute(self._posterior.scaling.y(target.y), self._posterior.particles.dtype)

    @property
    def distance_x(self) -> Tensor:
        """Return the distance of each input from those of meta-training, with shape (T, M).

        One in a hundred of them exceeded 1; NaN for a model that was not meta-trained. A diagnosis of the posterior looks at its context
        only: predictions at inputs far away fail whatever it says.
        """
        return self._out(self._posterior.reference.distance(self._posterior.scaling.x(self._x)))

    @property
    @abstractmethod
    def mean(self) -> Tensor:
        """Return the mean of y with shape (T, M, d_y)."""

    @property
    @abstractmethod
    def std(self) -> Tensor:
        """Return the standard deviation of y, noise included, with shape (T, M, d_y)."""

    @property
    @abstractmethod
    def epistemic_std(self) -> Tensor:
        """Return the standard deviation of the noise-free function, with shape (T, M, d_y)."""

    @abstractmethod
    def _log_prob_each(self, y: Tensor) -> Tensor:
        """Return log p(y) of each point in the network's units, with shape (T, M)."""

    @abstractmethod
    def _log_prob_joint(self, y: Tensor, mask: Tensor) -> Tensor:
        """Return log p(y) of all points of a task together given each particle, in the network's units, with shape (S, T)."""

    def log_prob(self, yt: Any, joint: bool = False, mask: Any = None) -> Tensor:
        """Return log densities of targets (log probabilities where y is discrete).

        Arguments:
            yt: targets with shape (T, M, d_y), in the user's units.
            joint: False for one density per point, log sum_s w_s prod_outputs p; True for the density of all points of a task
                together, log sum_s w_s prod_points p, with the last layer integrated out.
            mask: True = observed, with shape (T, M).

        Returns:
            With shape (T, M), zero where masked; or (T,) for the joint density.

        Raises:
            ValueError: shapes that do not fit, or observed entries that are not finite.
        """
        target, y = self._scaled(yt, mask)
        volume = to_compute(self._posterior.scaling.log_volume, y.dtype)
        seen = target.mask.to(y.device)
        if joint:
            value = (self._log_prob_joint(y, target.mask) + self._log_w).logsumexp(0)
            return self._out(value - seen.sum(-1) * volume)
        return self._out((self._log_prob_each(y) - volume) * seen)

    @abstractmethod
    def _draw_of(self, f: Tensor, noisy: bool, generator: torch.Generator) -> Tensor:
        """Return what a draw of the function f gives, in the network's units."""

    def sample(self, n: int = 1, noisy: bool = True, seed: int = 0) -> Tensor:
        """Return n draws with shape (n, T, M, d_y), each coherent over the points: draw i is one function.

        With equal weights draw i is from particle i mod S; otherwise particles are taken in proportion to their weights.

        Arguments:
            n: number of draws.
            noisy: draw observations; otherwise the noise-free function (for class labels: the probability).
            seed: of the draws.
        """
        generator = seeded(seed, "predictive")
        with torch.no_grad():
            weights = self._posterior.draws(check_count(n, "n"), generator, self._log_w)
            x, network = self._posterior.scaling.x(self._x), self._posterior.particles.architecture
            blocks = [network.hidden(x[:, i : i + self._batch], weights) for i in range(0, max(x.shape[1], 1), self._batch)]
            f = self._draw_of(torch.cat(blocks, dim=2), noisy, generator)
        return self._out(self._posterior.scaling.y_inverse(f), task_axis=1)

    @abstractmethod
    def cdf(self, yt: Any, mask: Any = None) -> Tensor:
        """Return P(y <= yt) of each output, with shape (T, M, d_y); where masked, it is that of a placeholder."""

    @abstractmethod
    def quantile(self, q: float) -> Tensor:
        """Return the q-quantile of y of each output, with shape (T, M, d_y)."""


def _check_level(q: float) -> float:
    if not 0.0 < float(q) < 1.0:
        raise ValueError(f"Expected a quantile level between 0 and 1. Got {q}.")
    return float(q)


class GaussianPredictive(Predictive):
    """Be a mixture of S Gaussians, one for each particle, in closed form."""

    def __init__(self, posterior: Source, x: Tensor, log_weights: Tensor, batch_size: int) -> None:
        super().__init__(posterior, x, log_weights, batch_size)
        particles, scaling = posterior.particles, posterior.scaling
        assert particles.noise_std is not None
        self._noise = to_compute(particles.noise_std, particles.dtype)
        self._unit, self._shift = (to_compute(t, particles.dtype) for t in (scaling.y_scale, scaling.y_shift))

    def _components(self, x: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            f, variance = self._posterior.particles.moments(x)
        return f, variance.clamp(min=0)

    def _std_s(self, variance: Tensor) -> Tensor:
        return (variance + self._noise**2).sqrt()

    @property
    def components(self) -> tuple[Tensor, Tensor]:
        """Return means and standard deviations (noise included) of the S Gaussians of each output, each (S, T, M, d_y)."""
        mean = self._over_points(lambda f, _: f * self._unit + self._shift, axis=2)
        return self._out(mean, 1), self._out(self._over_points(lambda _, v: self._std_s(v) * self._unit, axis=2), 1)

    @property
    def mean(self) -> Tensor:
        """Return the mean of y with shape (T, M, d_y)."""
        return self._out(self._over_points(lambda f, _: (self._w * f).sum(0)) * self._unit + self._shift)

    @property
    def std(self) -> Tensor:
        """Return the standard deviation of y, noise included, with shape (T, M, d_y)."""
        return self._out((self._variance() + self._noise**2).sqrt() * self._unit)

    @property
    def epistemic_std(self) -> Tensor:
        """Return the standard deviation of the noise-free function, with shape (T, M, d_y)."""
        return self._out(self._variance().sqrt() * self._unit)

    def _variance(self) -> Tensor:
        return self._over_points(lambda f, v: mixture_moments(f, v, self._w)[1])

    def _log_prob_each(self, y: Tensor) -> Tensor:
        def density(f: Tensor, variance: Tensor, y: Tensor) -> Tensor:
            s = self._std_s(variance)
            each = (-0.5 * ((y - f) / s) ** 2 - s.log() - 0.5 * math.log(2 * math.pi)).sum(-1)
            return (each + self._log_w.unsqueeze(-1)).logsumexp(0)

        return self._over_points(density, y)

    @torch.no_grad()
    def _log_prob_joint(self, y: Tensor, mask: Tensor) -> Tensor:
        particles, x = self._posterior.particles, self._posterior.scaling.x(self._x)
        assert particles.last is not None
        if x.shape[-2] <= self._batch:
            return particles.joint_log_lik(x, y.to(x), mask)
        last, sums = particles.last, None
        for i in range(0, x.shape[-2], self._batch):
            at = slice(i, i + self._batch)
            part = site_sum(last.factor, *particles.observations(x[:, at], y[:, at].to(x), mask[:, at]))
            sums = part if sums is None else sums + part
        assert sums is not None
        return last.extended(sums).log_z - last.log_z

    def _draw_of(self, f: Tensor, noisy: bool, generator: torch.Generator) -> Tensor:
        return self._posterior.likelihood.sample(f, generator) if noisy else f

    def cdf(self, yt: Any, mask: Any = None) -> Tensor:
        """Return P(y <= yt) of each output, with shape (T, M, d_y); where masked, it is that of a placeholder."""
        _, y = self._scaled(yt, mask)
        return self._out(self._over_points(lambda f, v, y: mixture_cdf(y, f, self._std_s(v), self._w), y))

    def quantile(self, q: float) -> Tensor:
        """Return the q-quantile of y of each output, with shape (T, M, d_y), by bisection of the mixture's distribution function."""
        q = _check_level(q)
        found = self._over_points(lambda f, v: mixture_quantile(q, f, self._std_s(v), self._w))
        return self._out(found * self._unit + self._shift)

    def crps(self, yt: Any, mask: Any = None) -> Tensor:
        """Return the continuous ranked probability score of each output, with shape (T, M, d_y), in the units of y; zero where masked.

        See `crps_gaussian_mixture`.
        """
        target, y = self._scaled(yt, mask)
        found = self._over_points(lambda f, v, y: crps_gaussian_mixture(f, self._std_s(v), y, self._w), y)
        return self._out(found * self._unit * target.mask.unsqueeze(-1).to(found.device))


class SampledPredictive(Predictive):
    """Be a mixture over S drawn networks, for likelihoods without a closed form: class labels, each output on its own."""

    discrete = True

    def _components(self, x: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            f = to_compute(self._posterior.particles.outputs(x), self._posterior.particles.dtype)
        return (f.expand(self._posterior.particles.num_samples, *f.shape[1:]),)

    def _probability(self) -> Tensor:
        return self._over_points(lambda f: (self._w * f.sigmoid()).sum(0))

    @property
    def mean(self) -> Tensor:
        """Return P(y = 1) with shape (T, M, d_y)."""
        return self._out(self._probability())

    @property
    def std(self) -> Tensor:
        """Return the standard deviation sqrt(p (1 - p)) of y, with shape (T, M, d_y)."""
        p = self._probability()
        return self._out((p * (1 - p)).sqrt())

    @property
    def epistemic_std(self) -> Tensor:
        """Return the standard deviation of the probability over networks, with shape (T, M, d_y)."""
        spread = self._over_points(lambda f: mixture_moments(f.sigmoid(), torch.zeros_like(f), self._w)[1])
        return self._out(spread.sqrt())

    def _log_prob_each(self, y: Tensor) -> Tensor:
        log_w = self._log_w.unsqueeze(-1)
        return self._over_points(lambda f, y: (self._posterior.likelihood.log_prob(f, y) + log_w).logsumexp(0), y)

    def _log_prob_joint(self, y: Tensor, mask: Tensor) -> Tensor:
        seen = to_compute(mask, y.dtype)
        parts = [(self._posterior.likelihood.log_prob(f, y_b) * m).sum(-1) for (f,), (y_b, m) in self._blocks(y, seen)]
        return torch.stack(parts).sum(0)

    def _draw_of(self, f: Tensor, noisy: bool, generator: torch.Generator) -> Tensor:
        return self._posterior.likelihood.sample(f, generator) if noisy else f.sigmoid()

    def cdf(self, yt: Any, mask: Any = None) -> Tensor:
        """Return P(y <= yt) of each output, with shape (T, M, d_y); where masked, it is that of a placeholder."""
        _, y = self._scaled(yt, mask)
        return self._out(torch.where(y >= 1, torch.ones_like(y), 1 - self._probability()))

    def quantile(self, q: float) -> Tensor:
        """Return the q-quantile of y, 0 or 1, with shape (T, M, d_y)."""
        p = self._probability()
        return self._out((1 - p < _check_level(q)).to(p.dtype))
