"""The Metropolis-adjusted Langevin algorithm: one gradient per update, for targets so wide or so costly that a trajectory is too much.

A proposal drifts up the gradient and is jittered, N(eps + h^2 / 2 M^{-1} grad, h^2 M^{-1}); it is accepted by the ratio of the densities
times that of the proposal's densities there and back. Without the latter the draws are wrong at any step size that is of use. Draws are
correlated over about 1 / h^2 updates: HMC crosses the same distance in 1 / h.

References:
    Exponential convergence of Langevin distributions and their discrete approximations (Roberts and Tweedie, 1996).
    Optimal scaling of discrete approximations to Langevin diffusions (Roberts and Rosenthal, 1998): 0.574 accepted.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from bnnp.inference.adaptation import BEYOND, accepted, gain, value_and_grad
from bnnp.inference.chains import Settings, State, advance, check_start, init, report, sample
from bnnp.inference.engine import Engine
from bnnp.inference.target import Target

__all__ = ["State", "build", "init", "log_proposal", "report", "sample", "update"]


def build(
    target: Target,
    *,
    num_chains: int = 4,
    warmup: int = 2000,
    draws: int = 4000,
    target_accept: float = 0.574,
    keep: int = 250,
    adapt_mass: bool = True,
    step_size: float | None = None,
    start: Tensor | None = None,
) -> Engine:
    """Build the Metropolis-adjusted Langevin algorithm for a target.

    Arguments:
        target: a functional with a task axis, or another target.
        num_chains: chains of each task.
        warmup: updates that find step size and mass, and are not kept.
        draws: updates after these.
        target_accept: acceptance that the step size is adapted to.
        keep: draws of eps kept of each chain, at most.
        adapt_mass: learn a diagonal preconditioner.
        step_size: h, not adapted where given.
        start: draws (n, T, dim) that the chains start from; the prior's where not given.

    Raises:
        ValueError: a setting out of range.
    """
    settings = Settings("mala", num_chains, warmup, draws, target_accept, keep, adapt_mass, step_size)
    check_start(start, target)
    return Engine(
        "mala",
        target,
        settings.updates,
        partial(init, target=target, settings=settings, start=start),
        partial(update, target=target, settings=settings),
        partial(sample, settings=settings),
        report,
    )


def log_proposal(to: Tensor, eps: Tensor, gradient: Tensor, step: Tensor, inverse_mass: Tensor) -> Tensor:
    """Return log N(to; eps + h^2 / 2 M^{-1} grad, h^2 M^{-1}) with shape (C, T), up to a constant."""
    wide = step.unsqueeze(-1)
    away = to - eps - 0.5 * wide.square() * inverse_mass * gradient
    return -0.5 * (away.square() / (wide.square() * inverse_mass)).sum(-1)


def update(state: State, *, target: Target, settings: Settings) -> State:
    """Propose a step of Langevin dynamics in every chain, and accept it by Metropolis and Hastings."""
    state = state.forked()
    eps, step, inverse_mass = state.eps, state.step.log_step.exp(), state.inverse_mass
    wide = step.unsqueeze(-1)
    noise = torch.randn(eps.shape, generator=state.generator, dtype=eps.dtype).to(eps.device)
    to = eps + 0.5 * wide.square() * inverse_mass * state.gradient + wide * inverse_mass.sqrt() * noise
    value, gradient = value_and_grad(target, to)
    there = log_proposal(to, eps, state.gradient, step, inverse_mass)
    back = log_proposal(eps, to, gradient, step, inverse_mass)
    gained = gain(-state.value - there, -value - back)
    accept = accepted(gained, state.generator)
    moved = accept.unsqueeze(-1)
    return advance(
        state,
        target=target,
        settings=settings,
        to=(torch.where(moved, to, eps), torch.where(accept, value, state.value), torch.where(moved, gradient, state.gradient)),
        acceptance=gained.clamp(max=0).exp(),
        divergent=gained < -BEYOND,
        gradients=1,
    )
