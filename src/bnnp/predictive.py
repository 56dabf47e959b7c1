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
from torch.distributions import Bernoulli, Categorical, Distribution, MixtureSameFamily, MultivariateNormal, Normal

from bnnp.conjugate import site_sum
from bnnp.likelihoods import Heteroscedastic, Likelihood, noise_factor
from bnnp.linalg import cholesky, log_det, solve_lower, to_compute
from bnnp.mixtures import crps_gaussian_mixture, crps_of_cdf, crps_of_counts, invert_cdf, mixture_cdf, mixture_moments, mixture_quantile
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
    def single(self) -> bool:
        """Return whether one task came without a task axis."""
        ...

    @property
    def y_dim(self) -> int:
        """Return d_y."""
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

    def __init__(self, posterior: Source, x: Tensor, log_weights: Tensor, batch_size: int) -> None:
        self._posterior, self._x, self._batch = posterior, x, batch_size
        self._log_w = log_weights
        self._w = log_weights.exp()[..., None, None]
        self._kept: tuple[Tensor, ...] | None = None
        scaling, dtype = posterior.scaling, posterior.particles.dtype
        self._unit, self._shift = (to_compute(t, dtype) for t in (scaling.y_scale, scaling.y_shift))

    @property
    def is_discrete(self) -> bool:
        """Return whether y takes separate values, so that densities are probabilities."""
        return self._posterior.likelihood.discrete

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
        self._posterior.likelihood.check(context.values)
        return context

    def _scaled(self, yt: Any, mask: Any) -> tuple[Context, Tensor]:
        """Return checked targets, and their y in the network's units and the precision of the factorisations; placeholders if masked."""
        target = self._targets(yt, mask)
        y = to_compute(self._posterior.scaling.y(target.y), self._posterior.particles.dtype)
        seen = target.observed.to(y.device)
        return target, torch.where(seen, y, y.new_full((), self._posterior.likelihood.placeholder))

    @property
    def distance_x(self) -> Tensor:
        """Return the distance of each input from those of meta-training, with shape (T, M).

        One in a hundred of them exceeded 1; NaN for a model that was not meta-trained. A diagnosis of the posterior looks at its context
        only: predictions at inputs far away fail whatever it says.
        """
        return self._out(self._posterior.reference.distance(self._posterior.scaling.x(self._x)))

    @abstractmethod
    def _mean(self) -> Tensor:
        """Return the mean of y in the network's units."""

    @abstractmethod
    def _variance(self, noise: bool) -> Tensor:
        """Return the variance of y, or of its expectation given the function, in the network's units."""

    @property
    def mean(self) -> Tensor:
        """Return the mean of y with shape (T, M, d_y); for K classes their probabilities (T, M, K)."""
        return self._out(self._mean() * self._unit + self._shift)

    @property
    def std(self) -> Tensor:
        """Return the standard deviation of y, noise included, with the shape of `mean`."""
        return self._out(self._variance(noise=True).sqrt() * self._unit)

    @property
    def epistemic_std(self) -> Tensor:
        """Return the standard deviation of the expectation of y given the function, over functions, with the shape of `mean`."""
        return self._out(self._variance(noise=False).sqrt() * self._unit)

    @abstractmethod
    def _log_prob_each(self, y: Tensor, seen: Tensor) -> Tensor:
        """Return log p(y) of each point in the network's units, with shape (T, M); `seen` has the shape of y."""

    @abstractmethod
    def _log_prob_joint(self, y: Tensor, seen: Tensor) -> Tensor:
        """Return log p(y) of all points of a task together given each particle, in the network's units, with shape (S, T)."""

    def log_prob(self, yt: Any, joint: bool = False, mask: Any = None) -> Tensor:
        """Return log densities of targets (log probabilities where y is discrete).

        Arguments:
            yt: targets with shape (T, M, d_y), in the user's units.
            joint: False for one density per point, log sum_s w_s prod_outputs p; True for the density of all points of a task
                together, log sum_s w_s prod_points p, with the last layer integrated out.
            mask: True = observed, with shape (T, M), or (T, M, d_y) for each output.

        Returns:
            With shape (T, M), zero where masked; or (T,) for the joint density.

        Raises:
            ValueError: shapes that do not fit, or observed entries that are not finite.
        """
        target, y = self._scaled(yt, mask)
        seen = target.observed.to(y.device).expand_as(y)
        volume = (seen * to_compute(self._posterior.scaling.y_scale, y.dtype).log()).sum(-1)
        if joint:
            return self._out((self._log_prob_joint(y, seen) + self._log_w).logsumexp(0) - volume.sum(-1))
        return self._out(torch.where(seen.any(-1), self._log_prob_each(y, seen) - volume, torch.zeros_like(volume)))

    @abstractmethod
    def _draw_of(self, f: Tensor, noisy: bool, generator: torch.Generator) -> Tensor:
        """Return what a draw of the function f gives, in the network's units."""

    def sample(self, n: int = 1, noisy: bool = True, seed: int = 0) -> Tensor:
        """Return n draws with shape (n, T, M, d_y), each coherent over the points: draw i is one function.

        With equal weights draw i is from particle i mod S; otherwise particles are taken in proportion to their weights.

        Arguments:
            n: number of draws.
            noisy: draw observations; otherwise their expectation given the function (for class labels: probabilities).
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
    def _cdf_given(self, y: Tensor, *components: Tensor) -> Tensor:
        """Return P(Y <= y) of the mixture, with the shape of y, in the network's units."""

    def cdf(self, yt: Any, mask: Any = None) -> Tensor:
        """Return P(y <= yt) of each output, with shape (T, M, d_y); where masked, it is that of a placeholder."""
        _, y = self._scaled(yt, mask)
        return self._out(self._over_points(lambda *found: self._cdf_given(found[-1], *found[:-1]), y))

    def pit(self, yt: Any, mask: Any = None, seed: int = 0) -> Tensor:
        """Return values that are uniform on (0, 1) if the prediction is right, with shape (T, M, d_y): P(y <= yt).

        Where y is discrete, they are drawn between P(y < yt) and P(y <= yt).

        References:
            Predictive model assessment for count data (Czado, Gneiting and Held, 2009).
        """
        if not self.is_discrete:
            return self.cdf(yt, mask)
        _, y = self._scaled(yt, mask)
        high, low = (self._over_points(lambda *found: self._cdf_given(found[-1], *found[:-1]), value) for value in (y, y - 1))
        u = torch.rand(y.shape, generator=seeded(seed, "pit"), dtype=y.dtype).to(y.device)
        return self._out(low + u * (high - low))

    @abstractmethod
    def quantile(self, q: float) -> Tensor:
        """Return the q-quantile of y of each output, with shape (T, M, d_y): for counts the smallest k with P(y <= k) >= q."""

    @abstractmethod
    def crps(self, yt: Any, mask: Any = None) -> Tensor:
        """Return the continuous ranked probability score of each output, with shape (T, M, d_y), in the units of y; zero where masked."""

    @abstractmethod
    def _parts(self) -> tuple[Callable[..., Distribution], dict[str, Tensor]]:
        """Return torch's class of the components and its arguments in the user's units, each with shape (S, T, M, ...)."""

    @property
    def distribution(self) -> Distribution:
        """Return the prediction of each point as torch knows it, in the user's units.

        A `MixtureSameFamily` over the particles with batch shape (T, M, d_y), each output on its own ((T, M) where outputs of a point
        belong together); for class labels `Bernoulli` with batch shape (T, M, d_y) or `Categorical` with (T, M), of mean probabilities.
        It holds the components of all points in memory.
        """
        kind, found = self._parts()
        if kind in (Bernoulli, Categorical):
            return kind(probs=self._out(self._mean()))
        arguments = {}
        for name, value in found.items():
            # The particles go behind the batch and before what belongs to one event.
            event = {"loc": 1, "scale_tril": 2}.get(name, 0) if kind is MultivariateNormal else 0
            arguments[name] = self._out(value, 1).movedim(0, -1 - event)
        components = kind(**arguments)
        log_w = self._log_w.mT[:, None].expand(-1, self._x.shape[-2], -1)
        log_w = self._out(log_w)
        log_w = log_w.unsqueeze(-2) if len(components.batch_shape) > log_w.ndim else log_w
        return MixtureSameFamily(Categorical(logits=log_w.expand(components.batch_shape)), components)

    @property
    def probs(self) -> Tensor:
        """Return the probabilities of class labels: of each of K classes (T, M, K), or P(y = 1) of each output (T, M, d_y).

        Raises:
            AttributeError: y is no class label.
        """
        if not self._posterior.likelihood.labels:
            raise AttributeError(f"Expected class labels. Got {type(self._posterior.likelihood).__name__}: ask mean, quantile or cdf.")
        return self.mean

    @property
    def mode(self) -> Tensor:
        """Return the most probable class labels, with shape (T, M, d_y).

        Raises:
            AttributeError: y is no class label.
        """
        p = self.probs
        return p.argmax(-1, keepdim=True).to(p.dtype) if self._posterior.likelihood.support[1] > 1 else (p >= 0.5).to(p.dtype)


def _check_level(q: float) -> float:
    if not 0.0 < float(q) < 1.0:
        raise ValueError(f"Expected a quantile level between 0 and 1. Got {q}.")
    return float(q)


class GaussianPredictive(Predictive):
    """Be a mixture of S Gaussians, one for each particle, in closed form."""

    def __init__(self, posterior: Source, x: Tensor, log_weights: Tensor, batch_size: int) -> None:
        super().__init__(posterior, x, log_weights, batch_size)
        particles = posterior.particles
        assert particles.noise_std is not None
        self._noise = to_compute(particles.noise_std, particles.dtype)

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

    def _mean(self) -> Tensor:
        return self._over_points(lambda f, _: (self._w * f).sum(0))

    def _variance(self, noise: bool) -> Tensor:
        variance = self._over_points(lambda f, v: mixture_moments(f, v, self._w)[1])
        return variance + self._noise**2 if noise else variance

    def _covariances(self, x: Tensor) -> Tensor:
        """Return the covariance of the outputs of each point given each particle, noise included, with shape (S, T, M, d_y, d_y)."""
        particles = self._posterior.particles
        with torch.no_grad():
            C = noise_factor(particles.likelihood)
            noise = torch.diag(self._noise**2) if C is None else to_compute(C @ C.mT, particles.dtype)
            return particles.covariance(self._posterior.scaling.x(x)) + noise

    def _log_prob_coupled(self, y: Tensor, seen: Tensor, x: Tensor, f: Tensor) -> Tensor:
        """Return log densities of points (T, M) whose outputs depend on each other given a particle."""
        K, seen = self._covariances(x), seen.expand(*f.shape[1:])
        # Outputs that were not seen become independent ones of variance 1 and residual 0, which add nothing but a constant.
        K = torch.where(seen.unsqueeze(-1) & seen.unsqueeze(-2), K, torch.eye(K.shape[-1], dtype=K.dtype, device=K.device))
        root, r = cholesky(K), torch.where(seen, y - f, torch.zeros_like(f))
        white = solve_lower(root, r.unsqueeze(-1)).squeeze(-1)
        count = seen.sum(-1)
        each = -0.5 * (white.square().sum(-1) + log_det(root) + count * math.log(2 * math.pi))
        return (each + self._log_w.unsqueeze(-1)).logsumexp(0)

    def _log_prob_each(self, y: Tensor, seen: Tensor) -> Tensor:
        if self._posterior.particles.coupled:
            return self._over_points(lambda f, _, y, seen, x: self._log_prob_coupled(y, seen, x, f), y, seen, self._x)

        def density(f: Tensor, variance: Tensor, y: Tensor, seen: Tensor) -> Tensor:
            s = self._std_s(variance)
            each = (seen * (-0.5 * ((y - f) / s) ** 2 - s.log() - 0.5 * math.log(2 * math.pi))).sum(-1)
            return (each + self._log_w.unsqueeze(-1)).logsumexp(0)

        return self._over_points(density, y, seen)

    @torch.no_grad()
    def _log_prob_joint(self, y: Tensor, seen: Tensor) -> Tensor:
        particles, x = self._posterior.particles, self._posterior.scaling.x(self._x)
        mask = seen.to(x.device)
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

    def _cdf_given(self, y: Tensor, *components: Tensor) -> Tensor:
        f, variance = components
        return mixture_cdf(y, f, self._std_s(variance), self._w)

    def _parts(self) -> tuple[Callable[..., Distribution], dict[str, Tensor]]:
        mean = self._over_points(lambda f, _: f * self._unit + self._shift, axis=2)
        if self._posterior.particles.coupled and mean.shape[-1] > 1:
            unit = self._unit.expand(mean.shape[-1])
            covariance = self._over_points(lambda _, v, x: self._covariances(x), self._x, axis=2) * unit * unit.unsqueeze(-1)
            return MultivariateNormal, {"loc": mean, "scale_tril": cholesky(covariance)}
        return Normal, {"loc": mean, "scale": self._over_points(lambda _, v: self._std_s(v) * self._unit, axis=2)}

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
        return self._out(found * self._unit * target.observed.to(found.device))


class SampledPredictive(Predictive):
    """Be a mixture over S drawn networks, for likelihoods without a closed form."""

    def _components(self, x: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            f = to_compute(self._posterior.particles.outputs(x), self._posterior.particles.dtype)
        return (f.expand(self._posterior.particles.num_samples, *f.shape[1:]),)

    @torch.no_grad()
    def _mean(self) -> Tensor:
        return self._over_points(lambda f: (self._w * self._posterior.likelihood.mean(f)).sum(0))

    @torch.no_grad()
    def _variance(self, noise: bool) -> Tensor:
        likelihood = self._posterior.likelihood

        def variance(f: Tensor) -> Tensor:
            mean = likelihood.mean(f)
            return mixture_moments(mean, likelihood.variance(f) if noise else torch.zeros_like(mean), self._w)[1]

        return self._over_points(variance)

    @torch.no_grad()
    def _log_prob_each(self, y: Tensor, seen: Tensor) -> Tensor:
        log_w, likelihood = self._log_w.unsqueeze(-1), self._posterior.likelihood
        return self._over_points(lambda f, y, seen: (likelihood.log_prob(f, y, seen) + log_w).logsumexp(0), y, seen)

    @torch.no_grad()
    def _log_prob_joint(self, y: Tensor, seen: Tensor) -> Tensor:
        parts = [self._posterior.likelihood.log_prob(f, *at).sum(-1) for (f,), at in self._blocks(y, seen)]
        return torch.stack(parts).sum(0)

    def _draw_of(self, f: Tensor, noisy: bool, generator: torch.Generator) -> Tensor:
        likelihood = self._posterior.likelihood
        return likelihood.sample(f, generator) if noisy else likelihood.mean(f)

    @torch.no_grad()
    def _cdf_given(self, y: Tensor, *components: Tensor) -> Tensor:
        return (self._w * self._posterior.likelihood.cdf(components[0], y)).sum(0)

    def _around(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """Return an interval of y at each point in which most of the mixture lies, (T, M, d_y) each."""
        likelihood = self._posterior.likelihood
        if likelihood.labels:
            edge = f.new_zeros((*f.shape[1:-1], self._posterior.y_dim))
            return edge + likelihood.support[0], edge + likelihood.support[1]
        mean, variance = mixture_moments(likelihood.mean(f), likelihood.variance(f), self._w)
        return mean - 4 * variance.sqrt(), mean + 4 * variance.sqrt()

    @torch.no_grad()
    def quantile(self, q: float) -> Tensor:
        """Return the q-quantile of y of each output, with shape (T, M, d_y), by bisection of the mixture's distribution function."""
        q, likelihood = _check_level(q), self._posterior.likelihood

        def found(f: Tensor) -> Tensor:
            return invert_cdf(lambda y: self._cdf_given(y, f), q, *self._around(f), likelihood.support, likelihood.discrete)

        return self._out(self._over_points(found) * self._unit + self._shift)

    @torch.no_grad()
    def crps(self, yt: Any, mask: Any = None) -> Tensor:
        """Return the continuous ranked probability score of each output, with shape (T, M, d_y), in the units of y; zero where masked.

        Exact for `Heteroscedastic` and for labels; for counts a sum over counts (see `crps_of_counts`); otherwise by quadrature to a
        relative accuracy of about 1e-4 (see `crps_of_cdf`).
        """
        target, y = self._scaled(yt, mask)
        found = self._over_points(self._crps_given, y)
        return self._out(found * self._unit * target.observed.to(found.device))

    def _crps_given(self, f: Tensor, y: Tensor) -> Tensor:
        likelihood = self._posterior.likelihood

        if isinstance(likelihood, Heteroscedastic):
            return crps_gaussian_mixture(likelihood.mean(f), likelihood.variance(f).sqrt(), y, self._w)
        low, high = self._around(f)
        at_once = max(1, 2**18 // max(1, f[..., 0].numel() * y.shape[-1]))

        def cdf(values: Tensor) -> Tensor:  # (k, T, M, d_y)
            return (self._w.unsqueeze(1) * likelihood.cdf(f.unsqueeze(1), values)).sum(0)

        if not likelihood.discrete:
            width = torch.maximum(high - low, (y - 0.5 * (low + high)).abs()) / 8
            return crps_of_cdf(cdf, y, width, likelihood.support, at_once=at_once)
        edge = invert_cdf(lambda y: self._cdf_given(y, f), 1 - 1e-7, low, high, likelihood.support, integer=True)
        return crps_of_counts(cdf, y, int(edge.max()) if edge.numel() else 0, at_once=at_once)

    @torch.no_grad()
    def _parts(self) -> tuple[Callable[..., Distribution], dict[str, Tensor]]:
        f = self._over_points(lambda f: f, axis=2)
        return self._posterior.likelihood.torch_distribution(f, self._unit, self._shift)
