"""Objectives of meta-learning: plain functions, one number per task, to be maximised.

ELL_c is the expected log-likelihood of the context, PPL_t the log predictive density of the target points of a task together,
both over particles from q(. | context). With a Gaussian likelihood the last layer is integrated out in both (its expectation
and its evidence are closed form), which leaves the same expectations with far less variance.

Context and target may be taken in batches, with memory that does not depend on their size: the value is the same, and so is the gradient,
which computes every batch again in the backward pass; or the gradient is an unbiased estimate from one batch per layer. See
`bnnp.streaming`.

References:
    Amortising inference and meta-learning priors in neural networks (Rochussen and Fortuin, 2026), section 3, Proposition 1.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Sequence
from typing import TypedDict, Unpack

import torch
from torch import Tensor

from bnnp.chain import learned
from bnnp.conjugate import PointSum, point_sum
from bnnp.draws import Normal
from bnnp.linalg import compute_device, to_compute
from bnnp.networks import BNNP
from bnnp.particles import Particles, drawn_log_lik
from bnnp.seeds import check_count
from bnnp.streaming import Stream
from bnnp.tasks import Context, TaskBatch

__all__ = ["OBJECTIVES", "Batching", "Objective", "avi", "iw_avi", "npml", "npvi", "pp_avi", "training_noise"]

Objective = Callable[..., Tensor]


class Batching(TypedDict, total=False):
    """Say how the points of a task are read.

    Arguments:
        context_batch_size: take the context in batches of this many points, with memory that does not depend on its size.
        target_batch_size: the same for the target.
        gradient: where batches are taken, "exact": every batch is computed again in the backward pass; "one_batch": an unbiased estimate
            from one batch for each layer, drawn on its own, for a quarter to two thirds of the time. (Or the numbers of these batches.)
    """

    context_batch_size: int | None
    target_batch_size: int | None
    gradient: str | Sequence[int]


def training_noise(model: BNNP, generator: torch.Generator) -> Normal:
    """Return standard normal noise for the draws of training; from float32, which is several times faster, and precise enough for noise."""
    device = compute_device(model.device)

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device).to(device=device, dtype=model.factor_dtype)

    return normal


@dataclasses.dataclass(frozen=True)
class _Pass:
    """Hold how one evaluation reads its points: all at once, or in batches with one of two gradients."""

    model: BNNP
    num_samples: int
    generator: torch.Generator
    context_batch_size: int | None = None
    target_batch_size: int | None = None
    gradient: str | Sequence[int] = "exact"

    def __post_init__(self) -> None:
        for name in ("context_batch_size", "target_batch_size"):
            if getattr(self, name) is not None:
                check_count(getattr(self, name), name)
        Stream(list, self.gradient)

    def done(self, value: Tensor) -> Tensor:
        """Return the value, after the generator has moved on even where no noise was drawn: the next batches are others."""
        if self.gradient == "one_batch":
            torch.rand((), generator=self.generator, device=self.generator.device)
        return value

    def stream(self, points: Context, size: int | None) -> Stream:
        """Return batches of points (scaled); random numbers of batches leave the noise as it is."""
        step = size or max(points.x.shape[1], 1)
        parts = [points.rows(i, i + step) for i in range(0, max(points.x.shape[1], 1), step)]
        state = self.generator.get_state().cpu().numpy().tobytes()
        seed = zlib.crc32(state, len(parts))
        return Stream(lambda: parts, self.gradient, torch.Generator().manual_seed(seed))

    def particles(self, context: Context, canonical: bool = False, target: Context | None = None) -> Particles:
        """Return particles from q(. | context), given a scaled context, to be asked about a scaled target (or about nothing)."""
        draw = training_noise(self.model, self.generator)
        if self.context_batch_size is None:
            beyond = context.x[:, :0] if target is None else target.x if self.target_batch_size is None else None
            return self.model.particles(context, self.num_samples, draw, canonical, beyond)
        return self.model.streamed_particles(self.stream(context, self.context_batch_size), self.num_samples, draw, canonical)

    def log_lik(self, particles: Particles, points: Context, size: int | None) -> Tensor:
        """Return log p(points | f) of drawn networks with shape (S, T)."""
        model = self.model

        def part(points: Context, weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (drawn_log_lik(particles.architecture, model.likelihood, weights, points, model.factor_dtype),)

        if size is None:
            return part(points, particles.weights)[0]
        return self.stream(points, size).sum(part, particles.weights, learned(model.likelihood))[0]

    def scored(self, particles: Particles, context: Context) -> Particles:
        """Return the particles with the likelihood of the context, where the last layer was drawn."""
        if particles.last is not None or particles.log_lik is not None:
            return particles
        return dataclasses.replace(particles, log_lik=self.log_lik(particles, context, self.context_batch_size))

    def target_log_lik(self, particles: Particles, target: Context) -> Tensor:
        """Return log p(target | particle, context), all points of a task together, with shape (S, T)."""
        if particles.last is None:
            return self.log_lik(particles, target, self.target_batch_size)
        if self.target_batch_size is None:
            return particles.joint_log_lik(target.x, target.y, target.observed)
        last = particles.last
        return last.extended(self._observed(particles, target).whiten(last.factor)).log_z - last.log_z

    def expected_log_lik(self, particles: Particles, target: Context) -> Tensor:
        """Return E[log p(target | f)] over q of the last layer, with shape (S, T)."""
        if particles.last is None:
            return self.log_lik(particles, target, self.target_batch_size)
        if self.target_batch_size is None:
            return particles.expected_log_lik(target.x, target.y, target.observed)
        return particles.last.expected_log_lik_of(self._observed(particles, target).whiten(particles.last.factor))

    def _observed(self, particles: Particles, target: Context) -> PointSum:
        """Return the sums over targets as observations of the last layer with the likelihood's own noise."""

        drawn = len(particles.weights)

        def part(points: Context, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            here = dataclasses.replace(particles, weights=tensors[:drawn], given=particles.given.rebuild(*tensors[drawn:]))
            return point_sum(*here.observations(points.x, points.y, points.observed)).tensors

        tensors = (*particles.weights, *particles.given.tensors)
        return PointSum(*self.stream(target, self.target_batch_size).sum(part, tensors, learned(self.model.likelihood)))

    def volume(self, points: Context) -> Tensor:
        """Return what log-densities of these points lose on the way back to the user's units, with shape (T,)."""
        return to_compute(self.model.scaling.volume(points), self.model.factor_dtype)

    def elbo(self, particles: Particles, context: Context, beta: float) -> Tensor:
        """Return ELL - beta KL of a scaled context, in the user's units, with shape (T,)."""
        scored = self.scored(particles, context)
        return scored.mean(scored.elbo(beta)) - self.volume(context)

    def log_predictive(self, particles: Particles, target: Context) -> Tensor:
        """Return PPL of a scaled target, in the user's units, with shape (T,)."""
        each = self.target_log_lik(particles, target)
        return particles.log_mean_exp(each) - self.volume(target)


def avi(
    model: BNNP, batch: TaskBatch, num_samples: int, generator: torch.Generator, beta: float = 1.0, **batches: Unpack[Batching]
) -> Tensor:
    """Return ELL_c - beta KL: the evidence lower bound of each context (targets are not looked at).

    Arguments:
        model: the network.
        batch: tasks cut in context and target, in the user's units.
        num_samples: number of particles S.
        generator: source of the draws.
        beta: weight of the KL divergence.
        batches: how points are read, see `Batching`; all at once where nothing is said.

    Returns:
        One value per task with shape (T,), in the precision of the factorisations.
    """
    with_data = _Pass(model, num_samples, generator, **batches)
    context = model.scale(batch.context)
    return with_data.done(with_data.elbo(with_data.particles(context), context, beta))


def npml(model: BNNP, batch: TaskBatch, num_samples: int, generator: torch.Generator, **batches: Unpack[Batching]) -> Tensor:
    """Return PPL_t = log 1/S sum_s p(Y_t | W_s), W_s from q(. | context), with shape (T,). Arguments as for `avi`.

    It rewards prediction only, and identifies neither prior nor posterior.
    """
    with_data = _Pass(model, num_samples, generator, **batches)
    target = model.scale(batch.target)
    return with_data.done(with_data.log_predictive(with_data.particles(model.scale(batch.context), target=target), target))


def pp_avi(
    model: BNNP, batch: TaskBatch, num_samples: int, generator: torch.Generator, beta: float = 1.0, **batches: Unpack[Batching]
) -> Tensor:
    """Return beta PPL_t + ELL_c - beta KL, the paper's objective, with shape (T,). Arguments as for `avi`.

    The same particles serve both parts; beta below 1 is for very sharp processes.
    """
    with_data = _Pass(model, num_samples, generator, **batches)
    context, target = model.scale(batch.context), model.scale(batch.target)
    particles = with_data.particles(context, target=target)
    predictive = with_data.log_predictive(particles, target)
    return with_data.done(beta * predictive + with_data.elbo(particles, context, beta))


def npvi(model: BNNP, batch: TaskBatch, num_samples: int, generator: torch.Generator, **batches: Unpack[Batching]) -> Tensor:
    """Return E_{q(W | c + t)}[log p(Y_t | W)] - KL(q(. | c + t) || q(. | c)) with shape (T,). Arguments as for `avi`.

    Both posteriors are taken along the same chain of sampled weights.
    """
    with_data = _Pass(model, num_samples, generator, **batches)
    context, target = model.scale(batch.context), model.scale(batch.target)
    streams = with_data.stream(context, with_data.context_batch_size), with_data.stream(target, with_data.target_batch_size)
    particles, kl = model.chain.paired_particles(*streams, num_samples, training_noise(model, generator))
    return with_data.done(with_data.expected_log_lik(particles, target).mean(0) - kl.mean(0) - with_data.volume(target))


def iw_avi(model: BNNP, batch: TaskBatch, num_samples: int, generator: torch.Generator, **batches: Unpack[Batching]) -> Tensor:
    """Return log 1/S sum_s p(Y_c | W_s) p(W_s) / q(W_s | context) with shape (T,), which tightens with S. Arguments as for `avi`.

    In its expectation it lies between the bound of `avi` and the log evidence. The last layer is integrated out, so the ratio is that of
    the hidden layers. Draws are those of `draw_canonical`: slower than the others where layers are wider than contexts.

    References:
        Importance weighted autoencoders (Burda, Grosse and Salakhutdinov, 2016), equation 8.
    """
    with_data = _Pass(model, num_samples, generator, **batches)
    context = model.scale(batch.context)
    particles = with_data.scored(with_data.particles(context, canonical=True), context)
    return with_data.done(particles.log_weights.logsumexp(0) - math.log(num_samples) - with_data.volume(context))


OBJECTIVES: dict[str, Objective] = {"avi": avi, "iw_avi": iw_avi, "npml": npml, "npvi": npvi, "pp_avi": pp_avi}
