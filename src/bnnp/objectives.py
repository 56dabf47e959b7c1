"""Objectives of meta-learning: plain functions, one number per task, to be maximised.

ELL_c is the expected log-likelihood of the context, PPL_t the log predictive density of the target points of a task together,
both over particles from q(. | context). With a Gaussian likelihood the last layer is integrated out in both (its expectation
and its evidence are closed form), which leaves the same expectations with far less variance.

References:
    Amortising inference and meta-learning priors in neural networks (Rochussen and Fortuin, 2026), section 3, Proposition 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bnnp.conjugate import Normal
from bnnp.linalg import compute_device, to_compute
from bnnp.networks import BNNP
from bnnp.posterior import Particles
from bnnp.tasks import Context, TaskBatch

__all__ = ["OBJECTIVES", "Objective", "avi", "npml", "npvi", "pp_avi"]

Objective = Callable[..., Tensor]


def _normal(model: BNNP, generator: torch.Generator) -> Normal:
    device = compute_device(model.device)

    def normal(shape: tuple[int, ...]) -> Tensor:
        # Drawn in float32, which is several times faster, and precise enough for noise.
        return torch.randn(shape, generator=generator, device=generator.device).to(device=device, dtype=model.factor_dtype)

    return normal


def _volume(model: BNNP, points: Context) -> Tensor:
    """Return what log-densities of these points lose on the way back to the user's units, with shape (T,)."""
    return points.counts.to(compute_device(model.device)) * to_compute(model.scaling.log_volume, model.factor_dtype)


def _drawn_log_lik(model: BNNP, particles: Particles, points: Context) -> Tensor:
    f = to_compute(particles.outputs(points.x), model.factor_dtype)
    each = model.likelihood.log_prob(f, to_compute(points.y, f.dtype)) * to_compute(points.mask, f.dtype)
    return each.sum(-1)


def _expected_log_lik(model: BNNP, particles: Particles, points: Context) -> Tensor:
    """Return ELL of these points (scaled) with shape (T,)."""
    if particles.last is None:
        return _drawn_log_lik(model, particles, points).mean(0)
    return particles.expected_log_lik(points.x, points.y, points.mask).mean(0)


def _elbo(model: BNNP, particles: Particles, context: Context, beta: float) -> Tensor:
    """Return ELL - beta KL of the context (scaled) with shape (T,)."""
    if particles.last is None:
        return (_drawn_log_lik(model, particles, context) - beta * particles.kl).mean(0)
    return particles.elbo(context.y, context.mask, beta).mean(0)


def _log_predictive(model: BNNP, particles: Particles, points: Context) -> Tensor:
    """Return PPL of these points (scaled) with shape (T,)."""
    if particles.last is None:
        each = _drawn_log_lik(model, particles, points)
    else:
        each = particles.joint_log_lik(points.x, points.y, points.mask)
    return each.logsumexp(0) - math.log(particles.num_samples)


def avi(model: BNNP, batch: TaskBatch, num_samples: int, generator: torch.Generator, beta: float = 1.0) -> Tensor:
    """Return ELL_c - beta KL: the evidence lower bound of each context (targets are not looked at).

    Arguments:
        model: the network.
        batch: tasks cut in context and target, in the user's units.
        num_samples: number of particles S.
        generator: source of the draws.
        beta: weight of the KL divergence.

    Returns:
        One value per task with shape (T,), in the precision of the factorisations.
    """
    context = model.scale(batch.context)
    particles = model.particles(context, num_samples, _normal(model, generator))
    return _elbo(model, particles, context, beta) - _volume(model, context)


def npml(model: BNNP, batch: TaskBatch, num_samples: int, generator: torch.Generator) -> Tensor:
    """Return PPL_t = log 1/S sum_s p(Y_t | W_s), W_s from q(. | context), with shape (T,). Arguments as for `avi`.

    It rewards prediction only, and identifies neither prior nor posterior.
    """
    particles = model.particles(model.scale(batch.context), num_samples, _normal(model, generator))
    return _log_predictive(model, particles, model.scale(batch.target)) - _volume(model, batch.target)


def pp_avi(model: BNNP, batch: TaskBatch, num_samples: int, generator: torch.Generator, beta: float = 1.0) -> Tensor:
    """Return beta PPL_t + ELL_c - beta KL, the paper's objective, with shape (T,). Arguments as for `avi`.

    The same particles serve both parts; beta below 1 is for very sharp processes.
    """
    context, target = model.scale(batch.context), model.scale(batch.target)
    particles = model.particles(context, num_samples, _normal(model, generator))
    predictive = _log_predictive(model, particles, target) - _volume(model, target)
    return beta * predictive + _elbo(model, particles, context, beta) - _volume(model, context)


def npvi(model: BNNP, batch: TaskBatch, num_samples: int, generator: torch.Generator) -> Tensor:
    """Return E_{q(W | c + t)}[log p(Y_t | W)] - KL(q(. | c + t) || q(. | c)) with shape (T,). Arguments as for `avi`.

    Both posteriors are taken along the same chain of sampled weights.
    """
    context, target = model.scale(batch.context), model.scale(batch.target)
    particles, kl = model.paired_particles(context, target, num_samples, _normal(model, generator))
    return _expected_log_lik(model, particles, target) - kl.mean(0) - _volume(model, target)


OBJECTIVES: dict[str, Objective] = {"avi": avi, "npml": npml, "npvi": npvi, "pp_avi": pp_avi}
