"""Hamiltonian Monte Carlo with trajectories of random length: the plainest sampler that is exact, and the one that others are held against.

Use it where draws from the posterior itself are wanted and tens to hundreds of gradients per draw can be paid. All chains of all tasks take
the same number of leapfrog steps, so no lane waits for another, which is what a batch is good at; NUTS finds the length itself, but its
lanes wait. The length is uniform on (0, 2 trajectory): with a fixed one, a direction whose period it is would never move.

Cost: `trajectory / step_size` gradients of all points per chain and update.

References:
    MCMC using Hamiltonian dynamics (Neal, 2011), section 3.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from bnnp.inference.adaptation import BEYOND, accepted, gain, kinetic, leapfrog
from bnnp.inference.chains import Settings, State, advance, check_start, init, report, sample
from bnnp.inference.engine import Engine
from bnnp.inference.target import Target
from bnnp.seeds import check_count

__all__ = ["State", "build", "init", "report", "sample", "update"]


def build(
    target: Target,
    *,
    num_chains: int = 4,
    warmup: int = 500,
    draws: int = 500,
    trajectory: float = 2.0,
    num_leapfrog: int | None = None,
    max_leapfrog: int = 100,
    target_accept: float = 0.8,
    keep: int = 250,
    adapt_mass: bool = True,
    step_size: float | None = None,
    start: Tensor | None = None,
) -> Engine:
    """Build Hamiltonian Monte Carlo for a target.

    Arguments:
        target: a functional with a task axis, or another target.
        num_chains: chains of each task.
        warmup: updates that find step size and mass, and are not kept.
        draws: updates after these.
        trajectory: mean length of a trajectory, in prior standard deviations of eps divided by the square root of the mass.
        num_leapfrog: mean number of leapfrog steps; instead of `trajectory`.
        max_leapfrog: the largest number of leapfrog steps of one update.
        target_accept: acceptance that the step size is adapted to.
        keep: draws of eps kept of each chain, at most.
        adapt_mass: learn a diagonal mass.
        step_size: not adapted where given.
        start: draws (n, T, dim) that the chains start from; the prior's where not given.

    Raises:
        ValueError: a setting out of range.
    """
    settings = Settings("hmc", num_chains, warmup, draws, target_accept, keep, adapt_mass, step_size)
    if not 0.0 < trajectory < math.inf:
        raise ValueError(f"Expected trajectory as a positive number. Got {trajectory}.")
    check_count(max_leapfrog, "max_leapfrog")
    if num_leapfrog is not None:
        check_count(num_leapfrog, "num_leapfrog")
    check_start(start, target)
    return Engine(
        "hmc",
        target,
        settings.updates,
        partial(init, target=target, settings=settings, start=start),
        partial(update, target=target, settings=settings, trajectory=trajectory, num_leapfrog=num_leapfrog, max_leapfrog=max_leapfrog),
        partial(sample, settings=settings),
        report,
    )


def update(state: State, *, target: Target, settings: Settings, trajectory: float, num_leapfrog: int | None, max_leapfrog: int) -> State:
    """Move every chain along a trajectory, and accept where it ends with probability exp(H - H')."""
    state = state.forked()
    inverse_mass, step = state.inverse_mass, state.step.log_step.exp()
    # The number of steps is one for all, from the step sizes' geometric mean: it depends on no chain's state, so each chain stays exact.
    mean = num_leapfrog if num_leapfrog is not None else trajectory / float(state.step.log_step.mean().exp())
    part = float(torch.rand((), generator=state.generator))
    steps = min(max(math.ceil(2.0 * part * mean), 1), max_leapfrog)
    start = here = state.at
    energy = kinetic(start.momentum, inverse_mass) - start.value
    divergent = torch.zeros_like(start.value, dtype=torch.bool)
    for _ in range(steps):
        there = leapfrog(target, here, step, inverse_mass)
        gained = gain(energy, kinetic(there.momentum, inverse_mass) - there.value)
        divergent = divergent | (gained < -BEYOND)
        # A chain that has diverged stays where it is: further on its numbers may overflow.
        here = here.where(divergent, there)
    gained = gained.masked_fill(divergent, -torch.inf)
    accept = accepted(gained, state.generator)
    end = here.where(accept, start)
    return advance(
        state,
        target=target,
        settings=settings,
        to=(end.eps, end.value, end.gradient),
        acceptance=gained.clamp(max=0).exp(),
        divergent=divergent,
        gradients=steps,
    )
