"""The posterior as a value: particles of weights, what they predict, and the answer in the user's units.

A particle is one draw of all hidden layers. With a Gaussian likelihood its last layer is not drawn: given the hidden weights it
is a Bayesian linear regression, kept as its conditional, so predictions are mixtures of S Gaussians in closed form.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnnp.conjugate import Conditional, Sites
from bnnp.layers import ACTIVATIONS, AmortisedLinear, features
from bnnp.likelihoods import Gaussian, Likelihood
from bnnp.linalg import to_compute
from bnnp.scaling import Standardiser
from bnnp.tasks import Context, check_inputs, make_context

__all__ = ["Architecture", "GaussianPredictive", "Particles", "Posterior", "Predictive", "SampledPredictive", "seeded"]


def seeded(seed: int, stream: str) -> torch.Generator:
    """Return a CPU generator for one use of a seed, so that the same seed gives the same draw on every device.

    Uses have streams of their own: with one stream, draws of the last layer would repeat those of the first.

    Raises:
        TypeError: the seed is not an integer.
    """
    try:
        digest = hashlib.sha256(f"{operator.index(seed)}/{stream}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    except TypeError:
        raise TypeError(f"Expected seed as an integer. Got {type(seed).__name__}.") from None


def check_count(value: int, name: str) -> int:
    """Check a number of draws or steps: a positive integer."""
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"Expected {name} as a positive integer. Got {value!r}.")
    return number


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


@dataclass(frozen=True, eq=False)
class Particles:
    """Hold S draws from q(W | context) of T tasks, in the network's units.

    Arguments:
        architecture: how the layers are joined.
        weights: drawn weights of each layer, with shape (S, T, d_l, p_l); without the last layer where it is collapsed.
        hidden_kl: KL divergence of each particle's drawn layers, with shape (S, T).
        output: the last layer.
        last: q of the last layer given each particle's hidden weights, with batch (S, T), or None where it was drawn.
        noise_std: noise of the Gaussian likelihood with shape (d_y,), where the last layer is collapsed.
        dtype: precision of the factorisations.
        at_context: the last layer's features at the context points and what a residual connection adds there, where it is collapsed.
        exact: the last layer has seen the context with the likelihood's own noise, and nothing else.
    """

    architecture: Architecture
    weights: tuple[Tensor, ...]
    hidden_kl: Tensor
    output: AmortisedLinear
    last: Conditional | None
    noise_std: Tensor | None
    dtype: torch.dtype
    at_context: tuple[Tensor, Tensor | None] | None = None
    exact: bool = False

    @property
    def num_samples(self) -> int:
        """Return S."""
        return self.hidden_kl.shape[0]

    @property
    def kl(self) -> Tensor:
        """Return the KL divergence of each particle's chain, with shape (S, T)."""
        return self.hidden_kl if self.last is None else self.hidden_kl + self.last.kl

    def output_features(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the last layer's features A (S, T, M, p) and what a residual connection adds to its output."""
        H = self.architecture.hidden(x, self.weights).expand(*self.hidden_kl.shape, -1, -1)
        return self.architecture.layer_input(H, len(self.weights)), self.architecture.skip(H, self.output.d_out)

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

    def sites(self, features: tuple[Tensor, Tensor | None], y: Tensor, mask: Tensor) -> tuple[Tensor, Sites]:
        """Return the last layer's features and observations of y there, with the likelihood's own noise."""
        assert self.noise_std is not None
        A, skip = features
        y = y if skip is None else y - skip
        root = mask.unsqueeze(-1) / self.noise_std
        sites = self.output.sites(A, y, root)
        return to_compute(A, self.dtype), Sites(to_compute(sites.resid, self.dtype), to_compute(sites.root_prec, self.dtype))

    def joint_log_lik(self, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        """Return log p(y | hidden weights, context), all points of a task together, with shape (S, T).

        The last layer is integrated out: the ratio of its evidences with and without these points.
        """
        assert self.last is not None
        A, sites = self.sites(self.output_features(x), y, mask)
        return self.last.update(A, sites).log_z - self.last.log_z

    def expected_log_lik(self, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        """Return E[sum_n log p(y_n | f(x_n))] over q of the last layer, with shape (S, T)."""
        assert self.last is not None
        return self.last.expected_log_lik(*self.sites(self.output_features(x), y, mask))

    def context_log_lik(self, y: Tensor, mask: Tensor) -> Tensor:
        """Return E[sum_n log p(y_n | f(x_n))] of the context over q of the last layer, with shape (S, T)."""
        assert self.last is not None and self.at_context is not None
        return self.last.expected_log_lik(*self.sites(self.at_context, y, mask))

    def elbo(self, y: Tensor, mask: Tensor, beta: float = 1.0) -> Tensor:
        """Return the context's expected log-likelihood minus beta times the KL divergence, of each particle, with shape (S, T).

        Where the last layer is exact and beta is 1, its share is its log evidence, which costs less than the two parts.
        """
        if self.exact and beta == 1.0 and self.last is not None:
            return self.last.log_z - self.hidden_kl
        return self.context_log_lik(y, mask) - beta * self.kl


class Predictive(ABC):
    """Be the predictive distribution of T tasks at M points, in the user's units.

    Where one task came without a task axis, results have none either. Shapes below are for a batch of tasks.
    """

    discrete: bool = False

    def __init__(self, posterior: Posterior, x: Tensor) -> None:
        self._posterior, self._x = posterior, x

    @property
    def is_discrete(self) -> bool:
        """Return whether y takes separate values, so that densities are probabilities."""
        return self.discrete

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
    def _log_prob(self, y: Tensor, mask: Tensor, joint: bool) -> Tensor:
        """Return log p(y) in the network's units."""

    def log_prob(self, yt: Any, joint: bool = False, mask: Any = None) -> Tensor:
        """Return log densities of targets (log probabilities where y is discrete).

        Arguments:
            yt: targets with shape (T, M, d_y), in the user's units.
            joint: False for one density per point, log 1/S sum_s prod_outputs p; True for the density of all points of a task
                together, log 1/S sum_s prod_points p, with the last layer integrated out.
            mask: True = observed, with shape (T, M).

        Returns:
            With shape (T, M), zero where masked; or (T,) for the joint density.

        Raises:
            ValueError: shapes that do not fit, or observed entries that are not finite.
        """
        target = self._targets(yt, mask)
        scaling = self._posterior.scaling
        value = self._log_prob(scaling.y(target.y), target.mask, joint)
        volume = to_compute(scaling.log_volume, value.dtype)
        seen = target.mask.to(value.device)
        return self._out(value - (target.counts.to(value.device) if joint else seen) * volume)

    @abstractmethod
    def _sample(self, n: int, noisy: bool, generator: torch.Generator) -> Tensor:
        """Return draws in the network's units."""

    def sample(self, n: int = 1, noisy: bool = True, seed: int = 0) -> Tensor:
        """Return n draws with shape (n, T, M, d_y), each coherent over the points: draw i is one function, from particle i mod S.

        Arguments:
            n: number of draws.
            noisy: draw observations; otherwise the noise-free function (for class labels: the probability).
            seed: of the draws.
        """
        f = self._sample(check_count(n, "n"), noisy, seeded(seed, "predictive"))
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

    def __init__(self, posterior: Posterior, x: Tensor) -> None:
        super().__init__(posterior, x)
        particles = posterior.particles
        self._f, self._var_f = particles.moments(posterior.scaling.x(x))
        assert particles.noise_std is not None
        self._noise = to_compute(particles.noise_std, particles.dtype)
        self._std_s = (self._var_f.clamp(min=0) + self._noise**2).sqrt()
        self._unit = to_compute(posterior.scaling.y_scale, particles.dtype)
        self._shift = to_compute(posterior.scaling.y_shift, particles.dtype)

    @property
    def components(self) -> tuple[Tensor, Tensor]:
        """Return means and standard deviations (noise included) of the S Gaussians of each output, each (S, T, M, d_y)."""
        return self._out(self._f * self._unit + self._shift, 1), self._out(self._std_s * self._unit, 1)

    @property
    def mean(self) -> Tensor:
        """Return the mean of y with shape (T, M, d_y)."""
        return self._out(self._f.mean(0) * self._unit + self._shift)

    @property
    def std(self) -> Tensor:
        """Return the standard deviation of y, noise included, with shape (T, M, d_y)."""
        return self._out((self._epistemic_variance() + self._noise**2).sqrt() * self._unit)

    @property
    def epistemic_std(self) -> Tensor:
        """Return the standard deviation of the noise-free function, with shape (T, M, d_y)."""
        return self._out(self._epistemic_variance().sqrt() * self._unit)

    def _epistemic_variance(self) -> Tensor:
        return self._var_f.clamp(min=0).mean(0) + self._f.var(0, correction=0)

    def _log_prob(self, y: Tensor, mask: Tensor, joint: bool) -> Tensor:
        particles = self._posterior.particles
        S = math.log(particles.num_samples)
        if joint:
            return particles.joint_log_lik(self._posterior.scaling.x(self._x), y, mask).logsumexp(0) - S
        z = (to_compute(y, self._f.dtype) - self._f) / self._std_s
        each = (-0.5 * z**2 - self._std_s.log() - 0.5 * math.log(2 * math.pi)).sum(-1)
        return (each.logsumexp(0) - S) * mask.to(each.device)

    def _sample(self, n: int, noisy: bool, generator: torch.Generator) -> Tensor:
        f = self._posterior.function_values(self._x, n, generator)
        return self._posterior.likelihood.sample(f, generator) if noisy else f

    def _mixture_cdf(self, y: Tensor) -> Tensor:
        return torch.special.ndtr((y - self._f) / self._std_s).mean(0)

    def cdf(self, yt: Any, mask: Any = None) -> Tensor:
        """Return P(y <= yt) of each output, with shape (T, M, d_y); where masked, it is that of a placeholder."""
        y = self._posterior.scaling.y(self._targets(yt, mask).y)
        return self._out(self._mixture_cdf(to_compute(y, self._f.dtype)))

    def quantile(self, q: float) -> Tensor:
        """Return the q-quantile of y of each output, with shape (T, M, d_y), by bisection of the mixture's distribution function."""
        q = _check_level(q)
        z = math.sqrt(2) * float(torch.erfinv(torch.tensor(2 * q - 1, dtype=torch.float64)))
        each = self._f + z * self._std_s  # the mixture's quantile lies between those of its components
        low, high = each.amin(0) - 1e-9, each.amax(0) + 1e-9
        for _ in range(60):
            middle = 0.5 * (low + high)
            below = self._mixture_cdf(middle) < q
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return self._out(0.5 * (low + high) * self._unit + self._shift)

    def crps(self, yt: Any, mask: Any = None) -> Tensor:
        """Return the continuous ranked probability score of each output, with shape (T, M, d_y), in the units of y; zero where masked.

        For a mixture: mean_i A(y - f_i, s_i^2) - 1/2 mean_ij A(f_i - f_j, s_i^2 + s_j^2), where A(m, v) = E|N(m, v)|.
        """
        target = self._targets(yt, mask)
        y = to_compute(self._posterior.scaling.y(target.y), self._f.dtype)
        first = _expected_abs(y - self._f, self._std_s**2).mean(0)
        second = torch.zeros_like(first)
        for f, s in zip(self._f, self._std_s, strict=True):
            second += _expected_abs(f - self._f, s**2 + self._std_s**2).mean(0) / len(self._f)
        return self._out((first - 0.5 * second) * self._unit * target.mask.unsqueeze(-1).to(first.device))


def _expected_abs(m: Tensor, v: Tensor) -> Tensor:
    s = v.sqrt()
    t = m / s
    return m * (2 * torch.special.ndtr(t) - 1) + 2 * s * torch.exp(-0.5 * t**2) / math.sqrt(2 * math.pi)


class SampledPredictive(Predictive):
    """Be a mixture over S drawn networks, for likelihoods without a closed form: class labels, each output on its own."""

    discrete = True

    def __init__(self, posterior: Posterior, x: Tensor) -> None:
        super().__init__(posterior, x)
        f = posterior.particles.outputs(posterior.scaling.x(x))
        self._f = to_compute(f, posterior.particles.dtype)
        self._p = self._f.sigmoid()

    @property
    def mean(self) -> Tensor:
        """Return P(y = 1) with shape (T, M, d_y)."""
        return self._out(self._p.mean(0))

    @property
    def std(self) -> Tensor:
        """Return the standard deviation sqrt(p (1 - p)) of y, with shape (T, M, d_y)."""
        p = self._p.mean(0)
        return self._out((p * (1 - p)).sqrt())

    @property
    def epistemic_std(self) -> Tensor:
        """Return the standard deviation of the probability over networks, with shape (T, M, d_y)."""
        return self._out(self._p.std(0, correction=0))

    def _log_prob(self, y: Tensor, mask: Tensor, joint: bool) -> Tensor:
        each = self._posterior.likelihood.log_prob(self._f, to_compute(y, self._f.dtype)) * to_compute(mask, self._f.dtype)
        each = each.sum(-1) if joint else each
        return each.logsumexp(0) - math.log(len(self._f))

    def _sample(self, n: int, noisy: bool, generator: torch.Generator) -> Tensor:
        f = self._posterior.function_values(self._x, n, generator)
        return self._posterior.likelihood.sample(f, generator) if noisy else f.sigmoid()

    def cdf(self, yt: Any, mask: Any = None) -> Tensor:
        """Return P(y <= yt) of each output, with shape (T, M, d_y); where masked, it is that of a placeholder."""
        y = to_compute(self._targets(yt, mask).y, self._f.dtype)
        return self._out(torch.where(y >= 1, torch.ones_like(y), 1 - self._p.mean(0)))

    def quantile(self, q: float) -> Tensor:
        """Return the q-quantile of y, 0 or 1, with shape (T, M, d_y)."""
        return self._out((1 - self._p.mean(0) < _check_level(q)).to(self._p.dtype))


@dataclass(frozen=True, eq=False)
class Posterior:
    """Be the posterior over the weights of T tasks: an immutable value that predicts and is sampled.

    Arguments:
        particles: the draws, in the network's units.
        context: what was conditioned on, in the user's units.
        scaling: from the user's units to the network's and back.
        likelihood: from f to y.
        single: one task came without a task axis, so results have none.
    """

    particles: Particles
    context: Context
    scaling: Standardiser
    likelihood: Likelihood
    single: bool

    def frozen(self) -> Posterior:
        """Return the same posterior on copies of what it shares with the model, which training may change."""
        output = copy.deepcopy(self.particles.output).requires_grad_(False)
        scaling = copy.deepcopy(self.scaling).requires_grad_(False)
        likelihood = copy.deepcopy(self.likelihood).requires_grad_(False)
        particles = dataclasses.replace(self.particles, output=output, noise_std=noise_of(likelihood))
        return dataclasses.replace(self, particles=particles, scaling=scaling, likelihood=likelihood)

    @property
    def y_dim(self) -> int:
        """Return d_y."""
        return self.context.y.shape[-1]

    @property
    def num_samples(self) -> int:
        """Return the number of particles S."""
        return self.particles.num_samples

    def _inputs(self, xt: Any, name: str = "xt") -> Tensor:
        like = self.context.x
        x = check_inputs(xt, like.shape[-1], name, like.dtype, like.device)
        if x.ndim == 3 and (self.single or x.shape[0] != like.shape[0]):
            raise ValueError(
                f"Expected {name} with shape (points, {like.shape[-1]})"
                + ("" if self.single else f" or ({like.shape[0]}, points, {like.shape[-1]}), one row of points for each task")
                + f". Got shape {tuple(x.shape)}. The posterior was conditioned on {like.shape[0]} task(s)."
            )
        return x.expand(like.shape[0], *x.shape[-2:])

    @torch.no_grad()
    def predict(self, xt: Any) -> Predictive:
        """Return the predictive distribution at xt with shape (M, d_x), the same for every task, or (T, M, d_x).

        Cost: one pass of the S networks over the points, and S M p^2 for the last layer's variances.

        Raises:
            ValueError: a wrong width, another number of tasks, or inputs that are not finite.
        """
        x = self._inputs(xt)
        return GaussianPredictive(self, x) if self.particles.last is not None else SampledPredictive(self, x)

    @property
    def kl(self) -> Tensor:
        """Return KL(q || p) of each task with shape (T,): closed form in each layer, Monte Carlo over the layers before it."""
        return self._per_task(self.particles.kl.mean(0))

    @property
    def elbo(self) -> Tensor:
        """Return E_q[log p(y_c | f(x_c))] - KL(q || p) with shape (T,): a lower bound of the log evidence of the context."""
        x, y, mask = self.scaling.x(self.context.x), self.scaling.y(self.context.y), self.context.mask
        particles = self.particles
        if particles.last is not None:
            value = particles.elbo(y, mask).mean(0)
        else:
            f = to_compute(particles.outputs(x), particles.dtype)
            each = self.likelihood.log_prob(f, to_compute(y, f.dtype)) * to_compute(mask, f.dtype)
            value = (each.sum(-1) - particles.kl).mean(0)
        volume = to_compute(self.scaling.log_volume, value.dtype)
        return self._per_task(value - self.context.counts.to(value.device) * volume)

    def _per_task(self, value: Tensor) -> Tensor:
        value = value.to(self.context.x.dtype).to(self.context.x.device)
        return value.squeeze(0) if self.single else value

    def _draws(self, n: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Return n draws of all layers, each with shape (n, T, d_l, p_l); draw i has the hidden weights of particle i mod S."""
        particles = self.particles
        index = torch.arange(n, device=self.context.x.device) % particles.num_samples
        if particles.last is None:
            return tuple(W[index] for W in particles.weights)
        S, T, d, k = particles.last.mean.shape
        rounds = -(-n // S)
        z = torch.randn(rounds, S, 1, d, k, generator=generator, dtype=particles.dtype)
        z = z.expand(rounds, S, T, d, k).to(particles.last.m.device)
        eps = particles.last.draw(z).flatten(0, 1)[:n]
        return (*(W[index] for W in particles.weights), particles.output.weights(eps))

    def function_values(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        """Return n functions at x (T, M, d_x), with shape (n, T, M, d_y), in the network's units."""
        with torch.no_grad():
            return self.particles.architecture.hidden(self.scaling.x(x), self._draws(n, generator))

    @torch.no_grad()
    def sample_weights(self, n: int, seed: int = 0) -> tuple[Tensor, ...]:
        """Return n draws of the weights of each layer with shape (n, T, d_l, p_l), bias last.

        Weights are those of the network between scaled inputs and outputs. Draw i takes its hidden layers from particle
        i mod S: condition with `num_samples` of at least n for n different ones.
        """
        draws = self._draws(check_count(n, "n"), seeded(seed, "posterior"))
        return tuple(W.squeeze(1) for W in draws) if self.single else draws

    @torch.no_grad()
    def sample_functions(self, n: int, seed: int = 0) -> list[Callable[[Any], Tensor]]:
        """Return n functions drawn from the posterior, noise-free, each the same function at every call.

        Each maps inputs (M, d_x), or (T, M, d_x), to outputs (T, M, d_y) in the user's units (for class labels: logits).
        """
        draws = self._draws(check_count(n, "n"), seeded(seed, "posterior"))
        return [self._function(tuple(W[i] for W in draws)) for i in range(n)]

    def _function(self, weights: tuple[Tensor, ...]) -> Callable[[Any], Tensor]:
        def function(x: Any) -> Tensor:
            with torch.no_grad():
                H = self.particles.architecture.hidden(self.scaling.x(self._inputs(x, "x")), weights)
                y = self.scaling.y_inverse(H)
            return y.squeeze(0) if self.single else y

        return function


def noise_of(likelihood: Likelihood) -> Tensor | None:
    """Return the noise of a Gaussian likelihood, in the network's units, or None for the others."""
    return likelihood.noise_std if isinstance(likelihood, Gaussian) else None
